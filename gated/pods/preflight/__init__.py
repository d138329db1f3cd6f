"""The cost of a run on another machine, from the compiler or by arithmetic.

  report = preflight.compiled_for(cfg, machine)     for TPUs and for the devices here
  report = preflight.by_arithmetic(cfg, machine)    an estimate, for any known chip

A report is a dict for JSON; `table` formats it as text.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from gated import plan
from gated.devices import chips, mesh
from gated.model.moe import dropless
from gated.pods import compiled, estimate
from gated.pods.compiled import limits
from gated.pods.estimate import roofline
from gated.pods.preflight.machines import HERE, Machine, devices, machine

__all__ = ['HERE', 'Machine', 'by_arithmetic', 'compiled_for', 'devices', 'machine']

# A report's `advice` lists at most this many changes.
FEW = 3
# XLA's errors for a program that exceeds the memory.
_TOO_LARGE = re.compile(
  r'(Used|temporaries) \(?([\d.]+)([KMGT]?)(?: of |\) exceeds available HBM \()'
  r'([\d.]+)([KMGT]?)'
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# Files of grouped products and of attention; other products are plain matmuls.
_KINDS = {
  'grouped': ('gated/model/moe', 'gated/kernels/grouped'),
  'attention': limits.ATTENTION,
}


def compiled_for(cfg: plan.Config, target: Machine) -> dict[str, Any]:
  """A recipe and a machine -> the report on its compiled train step."""
  layout = plan.Plan(cfg, devices=devices(target), choose=estimate.sizes)
  start = time.perf_counter()
  lowered = layout.train_step()
  executable, refusal = None, ''
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = str(error)
    if 'RESOURCE_EXHAUSTED' not in refusal:
      raise
  report = _recipe(cfg, layout.mesh.shape, target)
  report |= {'source': 'compiled', 'compile_seconds': time.perf_counter() - start}
  arguments = parts(layout)
  if executable is None:
    report |= _fit(*_too_large(refusal, arguments)) | {'offences': []}
    return report | _advice(report, cfg, target)
  slices = [_slice(device) for device in layout.mesh.devices.flat]
  shape = dict(layout.mesh.shape)
  program = compiled.read(executable.as_text(), shape, slices, **assumed(layout))
  stats = executable.memory_analysis()
  memory = {
    **arguments,
    'outputs': max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
    'temporaries': stats.temp_size_in_bytes,
    'code': stats.generated_code_size_in_bytes,
    # The chip's layout pads arguments.
    'padding': stats.argument_size_in_bytes - sum(arguments.values()),
  }
  memory['total'] = sum(memory.values())
  report |= _fit(memory, target.chip.memory if target.chip else None)
  report |= _costs(layout, program, target) | {'offences': offences(layout, program)}
  return report | _advice(report, cfg, target)


def _advice(report: Mapping[str, Any], cfg: plan.Config, target: Machine) -> dict:
  """Changes that would make the recipe fit, if it does not."""
  return {'advice': [] if report['fits'] else suggestions(cfg, target)[:FEW]}


def _too_large(error: str, arguments: Mapping[str, int]) -> tuple[dict, float]:
  """XLA's error for a program that does not fit -> its memory, and the chip's."""
  match = _TOO_LARGE.search(error)
  if not match:
    raise ValueError(f'the program does not fit: {error.splitlines()[0]}')
  part, *sizes = match.groups()
  used, limit = (float(n) * _UNITS[unit] for n, unit in zip(sizes[::2], sizes[1::2]))
  memory = dict(arguments)
  if part == 'temporaries':
    memory['temporaries'], used = int(used), used + sum(arguments.values())
  return memory | {'total': used}, limit


def assumed(layout: plan.Plan) -> dict[str, Any]:
  """Arguments of `compiled.read` for balanced routers: one pass, partly filled."""
  m, sizes = layout.cfg.model, layout.mesh.shape
  if not m.moe.experts or sizes['expert'] == 1:
    return {}
  tokens = layout.micro // mesh.ways('batch', layout.mesh)
  tokens *= layout.cfg.data.length // mesh.ways('tokens', layout.mesh)
  own = m.moe.experts // sizes['expert']
  mean = tokens * m.moe.top_k
  worst = tokens * sizes['expert'] * min(m.moe.top_k, own)
  rows = dropless.pass_rows(mean, worst=worst)
  return {'fill': mean / rows, 'idle': ('gated/model/moe/dropless',)}


def by_arithmetic(cfg: plan.Config, target: Machine) -> dict[str, Any]:
  """A recipe and a machine -> an estimated report; nothing is compiled."""
  if target.chip is None:
    raise ValueError(
      f'--topology={target.topology} has a chip that is not in chips.CHIPS'
    )
  sizes, reason = estimate.sizes(cfg, target.count, target.chip, target.slices)
  e = estimate.Estimate(cfg, sizes, target.chip, target.slices)
  names = ('kind', 'purpose', 'axis', 'network', 'bytes')
  transfers = [{name: getattr(t, name) for name in names} for t in e.traffic]
  report = _recipe(cfg, sizes, target) | {'source': 'estimate', 'reason': reason}
  report |= _fit({**e.memory, 'total': e.bytes}, target.chip.memory)
  report |= {
    'flops': {'model': e.model_flops, 'expected': e.flops},
    'bytes_moved': e.moved,
    'collectives': sorted(transfers, key=lambda t: -t['bytes']),
  }
  report |= _time(e.time, e.model_flops, target.chip) | {'offences': []}
  return report | _advice(report, cfg, target)


def suggestions(cfg: plan.Config, target: Machine) -> list[dict[str, Any]]:
  """Meshes, remat policies and micro-batches that fit by arithmetic, best first.

  If none fits, the number of chips doubles until one does.
  """
  if target.chip is None:
    return []
  return [
    {
      'chips': e.layout.devices,
      'flags': estimate.flags(cfg, e),
      'mesh': e.sizes,
      'memory': e.bytes,
      'seconds': e.time.step,
      'bound': e.time.bound,
      'mfu': e.mfu,
    }
    for e in estimate.advice(cfg, target.chip, target.count, target.slices)
  ]


def _slice(device: Any) -> int:
  """The slice of a TPU, or the host of another device."""
  host = 0 if device.platform == 'tpu' else device.process_index
  return getattr(device, 'slice_index', host)


def parts(layout: plan.Plan) -> dict[str, int]:
  """Bytes of a step's arguments on the fullest chip: weights, optimizer, batch."""
  return {
    'weights': _bytes(layout.state.model),
    'optimizer': _bytes(layout.state.opt),
    'batch': _bytes(layout.batch_shapes(layout.cfg.batch)),
  }


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _recipe(cfg: plan.Config, sizes: Mapping, target: Machine) -> dict[str, Any]:
  return {
    'name': cfg.name,
    'topology': target.topology,
    'slices': target.slices,
    'chips': target.count,
    'mesh': dict(sizes),
    'batch': [cfg.batch, cfg.data.length],
    'accum': cfg.accum,
    'remat': cfg.model.remat,
    'layers': cfg.model.layers,
    'jax': jax.__version__,
  }


def _fit(memory: Mapping[str, float], limit: float | None) -> dict[str, Any]:
  """Bytes of a chip by name, with `total` -> a report's memory fields."""
  over = None if limit is None else memory['total'] - limit
  return {
    'memory': memory,
    'limit': limit,
    'fits': over is None or over <= 0,
    'over': over,
    'spare': None if limit is None else 1 - memory['total'] / limit,
  }


def _costs(
  layout: plan.Plan, program: compiled.Program, target: Machine
) -> dict[str, Any]:
  """FLOPs, traffic, buffers and time of a step on one chip."""
  needed = layout.flops_per_token * layout.tokens_per_step / layout.mesh.size
  report: dict[str, Any] = {
    'flops': {'counted': program.flops, 'model': needed, 'kernels': program.kernels},
    'bytes_moved': program.bytes,
    'collectives': [dataclasses.asdict(t) for t in program.collectives],
    'buffers': [
      {
        'bytes': b.bytes,
        'shape': str(b.shape),
        'count': b.count,
        'place': str(b.place),
        'source': b.source,
      }
      for b in program.buffers[:10]
    ],
    'uncounted': program.uncounted,
    'unknown_loops': program.unknown_loops,
    'idle_loops': program.idle_loops,
    'conditionals': program.conditionals,
  }
  if target.chip is None:
    return report
  shape = dict(layout.mesh.shape)
  expected = estimate.Estimate(layout.cfg, shape, target.chip, target.slices).flops
  report['flops']['expected'] = {**expected, 'scores again': program.again}
  seconds = roofline.roofline(
    flops=kinds(program),
    moved=program.bytes,
    sent=[_sent(t, shape, target, target.chip) for t in program.collectives],
    chip=target.chip,
  )
  return report | _time(seconds, needed, target.chip)


def _time(seconds: roofline.Roofline, needed: float, chip: chips.Chip) -> dict[str, Any]:
  return {
    'seconds': dataclasses.asdict(seconds) | {'bound': seconds.bound},
    'mfu': needed / (seconds.step * chip.flops),
    'assumed': {name: [n, text] for name, (n, text) in roofline.ASSUMED.items()},
  }


def kinds(program: compiled.Program) -> dict[str, float]:
  """FLOPs by the roofline's kinds of product."""
  totals = {'matmul': 0.0, 'attention': 0.0, 'grouped': 0.0}
  for file, flops in program.work.items():
    matches = (kind for kind, files in _KINDS.items() if file.startswith(files))
    totals[next(matches, 'matmul')] += flops
  return totals


def _sent(
  t: compiled.Traffic, shape: Mapping[str, int], target: Machine, chip: chips.Chip
) -> roofline.Traffic:
  """Traffic as counted -> traffic for the roofline.

  Only traffic along `data` and `fsdp` may hide behind compute.
  """
  axes = t.axis.split('+') if t.axis else list(mesh.AXES)
  inside = math.prod(shape[axis] for axis in axes)
  return roofline.Traffic(
    axis=t.axis or 'unknown',
    network=t.network,
    bytes=t.bytes,
    share=roofline.share(inside, target.count // target.slices, chip),
    hidden=set(axes) <= {'data', 'fsdp'},
  )


def offences(layout: plan.Plan, program: compiled.Program) -> list[str]:
  """The checks of `compiled.limits` that the program fails, as lines of text."""
  cfg, m = layout.cfg, layout.cfg.model
  heads, kv_heads = (n * m.attn.head_dim for n in (m.attn.heads, m.attn.kv_heads))
  sizes = (m.width, m.ffn, m.vocab, heads, kv_heads, m.attn.head_dim)
  shards = mesh.ways('tokens', layout.mesh)
  violations = limits.large_buffers(program)
  violations += limits.squares(program, length=cfg.data.length, parts=shards, also=sizes)
  if m.moe.experts:
    violations += limits.whole_experts(
      program, experts=m.moe.experts, width=m.width, ffn=m.ffn
    )
  return violations
