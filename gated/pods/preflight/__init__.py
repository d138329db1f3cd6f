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
from gated.pods.estimate.roofline import share
from gated.pods.preflight.machines import HERE, Machine, devices, machine

__all__ = ['HERE', 'Machine', 'by_arithmetic', 'compiled_for', 'devices', 'machine']

# A report's `advice` lists at most this many changes.
FEW = 3
# `suggestions` doubles the number of chips at most this many times.
DOUBLINGS = 6
# XLA's errors for a program that exceeds the memory.
_TOO_LARGE = (
  re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'),
  re.compile(
    r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)'
  ),
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def compiled_for(cfg: plan.Config, target: Machine) -> dict[str, Any]:
  """A recipe and a machine -> the report on its compiled train step."""
  layout = plan.Plan(cfg, devices=devices(target), choose=estimate.sizes)
  start = time.perf_counter()
  lowered = layout.train_step()
  executable, refused = None, ''
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = str(error)
    if 'RESOURCE_EXHAUSTED' not in refused:
      raise
  took = {'source': 'compiled', 'compile_seconds': time.perf_counter() - start}
  base = _recipe(cfg, layout.mesh.shape, target) | took
  if executable is None:
    return _advised(base | _too_large(refused, layout) | {'offences': []}, cfg, target)
  flat = list(layout.mesh.devices.flat)
  slices = [_slice(device) for device in flat]
  program = compiled.read(executable, dict(layout.mesh.shape), slices, assumed(layout))
  assert program.memory is not None
  held = parts(layout)
  memory = {
    **held,
    'outputs': program.memory.outputs,
    'temporaries': program.memory.temporaries,
    'code': program.memory.code,
  }
  # The chip's layout pads arguments.
  memory['padding'] = program.memory.arguments - sum(held.values())
  memory['total'] = program.memory.total
  limit = target.chip.memory if target.chip else None
  report = base | _fit(memory, limit, {}) | _costs(layout, program, target)
  return _advised(report | {'offences': offences(layout, program)}, cfg, target)


def _advised(report: dict[str, Any], cfg: plan.Config, target: Machine) -> dict[str, Any]:
  """Adds changes that would make the recipe fit, if it does not."""
  return report | {'advice': [] if report['fits'] else suggestions(cfg, target)[:FEW]}


def _too_large(error: str, layout: plan.Plan) -> dict[str, Any]:
  """XLA's error for a program that does not fit -> its memory."""
  held = parts(layout)
  for pattern in _TOO_LARGE:
    match = pattern.search(error)
    if match:
      used, limit = (float(match[i]) * _UNITS[match[i + 1]] for i in (1, 3))
      if 'temporaries' in match[0]:
        held['temporaries'], used = int(used), used + sum(held.values())
      return _fit({'total': used}, limit, held)
  raise ValueError(f'the program does not fit: {error.splitlines()[0]}')


def assumed(layout: plan.Plan) -> compiled.Assumed:
  """Assumes balanced routers: one pass over the experts, partly filled."""
  m, sizes = layout.cfg.model, layout.mesh.shape
  if not m.moe.experts or sizes['expert'] == 1:
    return compiled.Assumed()
  tokens = layout.micro // mesh.ways('batch', layout.mesh)
  tokens *= layout.cfg.data.length // mesh.ways('tokens', layout.mesh)
  team, mine = sizes['expert'], m.moe.experts // sizes['expert']
  mean = tokens * m.moe.top_k
  rows = dropless.pass_rows(mean, worst=tokens * team * min(m.moe.top_k, mine))
  return compiled.Assumed(fill=mean / rows, idle=('gated/model/moe/dropless',))


def by_arithmetic(cfg: plan.Config, target: Machine) -> dict[str, Any]:
  """A recipe and a machine -> an estimated report; nothing is compiled."""
  if target.chip is None:
    raise ValueError(
      f'--topology={target.topology} has a chip that is not in chips.CHIPS'
    )
  sizes, reason = estimate.sizes(cfg, target.count, target.chip, target.slices)
  e = estimate.of(cfg, sizes, target.chip, target.slices)
  limit = target.chip.memory
  report = _recipe(cfg, sizes, target) | {'source': 'estimate', 'reason': reason}
  report |= _fit({**e.memory, 'total': e.bytes}, limit, {})
  sent: list[dict[str, Any]] = [
    {
      'kind': t.kind,
      'what': t.what,
      'axis': t.axis,
      'network': network,
      'bytes': number,
    }
    for t in e.traffic
    for network, number in (('links', t.link), ('network', t.network))
    if number
  ]
  report |= {
    'flops': {'model': e.model_flops, 'expected': dict(e.flops)},
    'bytes_moved': e.moved,
    'collectives': sorted(sent, key=lambda t: -t['bytes']),
  }
  report |= _time(e.time, e.model_flops, target.chip) | {'offences': []}
  return _advised(report, cfg, target)


def suggestions(cfg: plan.Config, target: Machine) -> list[dict[str, Any]]:
  """Meshes, remat policies and micro-batches that fit by arithmetic, best first.

  If none fits, the number of chips doubles until one does.
  """
  if target.chip is None:
    return []
  for doubling in range(DOUBLINGS + 1):
    count = target.count * 2**doubling
    matches = estimate.suggest(cfg, target.chip, count, target.slices)
    if matches:
      return [_suggestion(knobs, e, count) for knobs, e in matches]
  return []


def _suggestion(knobs: Mapping[str, Any], e: estimate.Estimate, count: int) -> dict:
  return {
    'chips': count,
    'flags': estimate.tail(knobs),
    'mesh': dict(e.sizes),
    'memory': e.bytes,
    'seconds': e.time.step,
    'bound': e.time.bound,
    'mfu': e.mfu,
  }


def _slice(device: Any) -> int:
  """The slice of a TPU, or the host of another device."""
  index = getattr(device, 'slice_index', None)
  if index is not None or device.platform == 'tpu':
    return index or 0
  return device.process_index


def parts(layout: plan.Plan) -> dict[str, int]:
  """Bytes of a step's arguments on the fullest chip: weights, optimizer, batch."""
  return {
    'weights': _bytes(layout.state.model),
    'optimizer': _bytes(layout.state.opt),
    'batch': _bytes(layout.batch_shapes(layout.cfg.batch)),
  }


def _bytes(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(tree):
    size = leaf.dtype.itemsize
    for n in leaf.sharding.shard_shape(leaf.shape):
      size *= n
    total += size
  return total


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


def _fit(memory: Mapping[str, float], limit: float | None, held: Mapping) -> dict:
  """Bytes of a chip by name, with `total` -> a report's memory fields."""
  total = memory['total']
  over = total - limit if limit is not None else None
  return {
    'memory': {**held, **memory},
    'limit': limit,
    'fits': over is None or over <= 0,
    'over': over,
    'spare': None if limit is None else 1 - total / limit,
  }


def _costs(
  layout: plan.Plan, program: compiled.Program, target: Machine
) -> dict[str, Any]:
  """FLOPs, traffic, buffers and time of a step on one chip."""
  cfg, count = layout.cfg, layout.mesh.size
  needed = layout.flops_per_token * layout.tokens_per_step / count
  report: dict[str, Any] = {
    'flops': {
      'counted': program.flops,
      'model': needed,
      'kernels': dict(program.kernels),
    },
    'bytes_moved': program.bytes,
    'collectives': [dataclasses.asdict(t) for t in program.collectives],
    'buffers': [_buffer(b) for b in program.buffers[:10]],
    'uncounted': dict(program.uncounted),
    'unknown_loops': list(program.unknown_loops),
    'idle_loops': list(program.idle_loops),
    'conditionals': program.conditionals,
  }
  if target.chip is None:
    return report
  expected = estimate.of(cfg, dict(layout.mesh.shape), target.chip, target.slices)
  report['flops']['expected'] = {**expected.flops, 'scores again': program.again}
  sent = [_sent(t, layout, target) for t in program.collectives]
  time_of = estimate.roofline(
    flops=kinds(program), moved=program.bytes, sent=sent, chip=target.chip
  )
  return report | _time(time_of, needed, target.chip)


def _time(time_of: estimate.Roofline, needed: float, chip: chips.Chip) -> dict[str, Any]:
  return {
    'seconds': dataclasses.asdict(time_of) | {'bound': time_of.bound},
    'mfu': needed / (time_of.step * chip.flops),
    'assumed': {name: [n, text] for name, (n, text) in estimate.ASSUMED.items()},
  }


def kinds(program: compiled.Program) -> dict[str, float]:
  """FLOPs by the roofline's kinds of product."""
  totals = {'matmul': 0.0, 'attention': 0.0, 'grouped': 0.0}
  for file, flops in program.work.items():
    if file.startswith(('gated/model/moe', *limits.NEITHER)):
      kind = 'grouped'
    elif limits.attention_file(file):
      kind = 'attention'
    else:
      kind = 'matmul'
    totals[kind] += flops
  return totals


def _sent(t: compiled.Traffic, layout: plan.Plan, target: Machine) -> estimate.Traffic:
  """Traffic as counted -> traffic for the roofline.

  Only traffic along `data` and `fsdp` may hide behind compute.
  """
  assert target.chip is not None
  axes = t.axis.split('+') if t.axis else list(mesh.AXES)
  inside = math.prod(layout.mesh.shape[axis] for axis in axes)
  links = share(inside, target.count // target.slices, target.chip)
  return estimate.Traffic(
    what=t.kind,
    kind=t.kind,
    axis=t.axis or 'unknown',
    link=t.bytes if t.network == 'links' else 0.0,
    network=t.bytes if t.network == 'network' else 0.0,
    share=links,
    hidden=set(axes) <= {'data', 'fsdp'},
  )


def _buffer(b: compiled.Buffer) -> dict[str, Any]:
  return {
    'bytes': b.bytes,
    'shape': str(b.shape),
    'count': b.count,
    'place': str(b.place),
    'source': b.source,
  }


def offences(layout: plan.Plan, program: compiled.Program) -> list[str]:
  """The checks of `compiled.limits` that the program fails, as lines of text."""
  cfg, m = layout.cfg, layout.cfg.model
  violations = limits.large_buffers(program)
  shards = mesh.ways('tokens', layout.mesh)
  heads, kv_heads = (n * m.attn.head_dim for n in (m.attn.heads, m.attn.kv_heads))
  sizes = (m.width, m.ffn, m.vocab, heads, kv_heads, m.attn.head_dim)
  violations += limits.squares(program, length=cfg.data.length, parts=shards, also=sizes)
  if m.moe.experts:
    violations += limits.whole_experts(
      program, experts=m.moe.experts, width=m.width, ffn=m.ffn
    )
  return violations
