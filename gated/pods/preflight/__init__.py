"""What a run would cost on a machine that is not here: compiled for it, or by arithmetic.

  report = preflight.compiled_for(cfg, machine)     by the compiler, for TPUs and for what
                                                    is here
  report = preflight.by_arithmetic(cfg, machine)    an estimate, for anything

A report is a dict that JSON can hold; `table` makes it readable.
"""

import dataclasses
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

# So many ways to make a recipe fit are told.
FEW = 3
# So many times twice as many chips are tried.
DOUBLINGS = 6
# How XLA says that a program is too large, and by how much.
_TOO_LARGE = (
  re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'),
  re.compile(
    r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)'
  ),
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def compiled_for(cfg: plan.Config, of: Machine) -> dict[str, Any]:
  """A recipe and a machine -> what the compiler made of its train step."""
  what = plan.Plan(cfg, devices=devices(of), choose=estimate.sizes)
  start = time.perf_counter()
  lowered = what.train_step()
  executable, refused = None, ''
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = str(error)
    if 'RESOURCE_EXHAUSTED' not in refused:
      raise
  took = {'source': 'compiled', 'compile_seconds': time.perf_counter() - start}
  base = _recipe(cfg, what.mesh.shape, of) | took
  if executable is None:
    return _advised(base | _too_large(refused, what) | {'offences': []}, cfg, of)
  flat = list(what.mesh.devices.flat)
  where = [_slice(device) for device in flat]
  program = compiled.read(executable, dict(what.mesh.shape), where, assumed(what))
  assert program.memory is not None
  held = parts(what)
  memory = {
    **held,
    'outputs': program.memory.outputs,
    'temporaries': program.memory.temporaries,
    'code': program.memory.code,
  }
  # What a chip's layout adds to an argument.
  memory['padding'] = program.memory.arguments - sum(held.values())
  memory['total'] = program.memory.total
  limit = of.chip.memory if of.chip else None
  report = base | _fit(memory, limit, {}) | _costs(what, program, of)
  return _advised(report | {'offences': offences(what, program)}, cfg, of)


def _advised(report: dict[str, Any], cfg: plan.Config, of: Machine) -> dict[str, Any]:
  """A report, and what would make the recipe fit where it does not."""
  return report | {'advice': [] if report['fits'] else suggestions(cfg, of)[:FEW]}


def _too_large(error: str, what: plan.Plan) -> dict[str, Any]:
  """What XLA says of a program that does not fit -> by how much."""
  held = parts(what)
  for pattern in _TOO_LARGE:
    found = pattern.search(error)
    if found:
      used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
      if 'temporaries' in found[0]:
        held['temporaries'], used = int(used), used + sum(held.values())
      return _fit({'total': used}, limit, held)
  raise ValueError(f'the program does not fit: {error.splitlines()[0]}')


def assumed(what: plan.Plan) -> compiled.Assumed:
  """What depends on the data: that routers are balanced, so that one pass is enough."""
  m, sizes = what.cfg.model, what.mesh.shape
  if not m.moe.experts or sizes['expert'] == 1:
    return compiled.Assumed()
  tokens = what.micro // mesh.ways('batch', what.mesh)
  tokens *= what.cfg.data.length // mesh.ways('tokens', what.mesh)
  team, mine = sizes['expert'], m.moe.experts // sizes['expert']
  mean = tokens * m.moe.top_k
  rows = dropless.pass_rows(mean, worst=tokens * team * min(m.moe.top_k, mine))
  return compiled.Assumed(fill=mean / rows, idle=('gated/model/moe/dropless',))


def by_arithmetic(cfg: plan.Config, of: Machine) -> dict[str, Any]:
  """A recipe and a machine -> the same report, estimated; nothing is compiled."""
  if of.chip is None:
    raise ValueError(f'--topology={of.topology} is of no chip that is known here')
  sizes, reason = estimate.sizes(cfg, of.count, of.chip, of.slices)
  found = estimate.of(cfg, sizes, of.chip, of.slices)
  limit = of.chip.memory
  report = _recipe(cfg, sizes, of) | {'source': 'estimate', 'reason': reason}
  report |= _fit({**found.memory, 'total': found.bytes}, limit, {})
  sent: list[dict[str, Any]] = [
    {
      'kind': t.kind,
      'what': t.what,
      'axis': t.axis,
      'network': network,
      'bytes': number,
    }
    for t in found.traffic
    for network, number in (('links', t.link), ('network', t.network))
    if number
  ]
  report |= {
    'flops': {'model': found.model_flops, 'expected': dict(found.flops)},
    'bytes_moved': found.moved,
    'collectives': sorted(sent, key=lambda t: -t['bytes']),
  }
  report |= _time(found.time, found.model_flops, of.chip) | {'offences': []}
  return _advised(report, cfg, of)


def suggestions(cfg: plan.Config, of: Machine) -> list[dict[str, Any]]:
  """Meshes, remat policies and micro-batches that fit, by arithmetic, best first.

  Where none does, those of the fewest chips that are enough, in doublings.
  """
  if of.chip is None:
    return []
  for doubling in range(DOUBLINGS + 1):
    chips_of = of.count * 2**doubling
    found = estimate.suggest(cfg, of.chip, chips_of, of.slices)
    if found:
      return [_way(knobs, e, chips_of) for knobs, e in found]
  return []


def _way(knobs: Mapping[str, Any], found: estimate.Estimate, count: int) -> dict:
  return {
    'chips': count,
    'flags': estimate.tail(knobs),
    'mesh': dict(found.sizes),
    'memory': found.bytes,
    'seconds': found.time.step,
    'bound': found.time.bound,
    'mfu': found.mfu,
  }


def _slice(device: Any) -> int:
  """Which slice, or on other machines which host, a device is in."""
  index = getattr(device, 'slice_index', None)
  if index is not None or device.platform == 'tpu':
    return index or 0
  return device.process_index


def parts(what: plan.Plan) -> dict[str, int]:
  """Bytes on the fullest chip of what a step is given: weights, optimizer, batch."""
  batch = what.batch_shapes(what.cfg.batch)
  return {
    'weights': _bytes(what.state.model),
    'optimizer': _bytes(what.state.opt),
    'batch': _bytes(batch),
  }


def _bytes(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(tree):
    size = leaf.dtype.itemsize
    for n in leaf.sharding.shard_shape(leaf.shape):
      size *= n
    total += size
  return total


def _recipe(cfg: plan.Config, sizes: Mapping, of: Machine) -> dict[str, Any]:
  return {
    'name': cfg.name,
    'topology': of.topology,
    'slices': of.slices,
    'chips': of.count,
    'mesh': dict(sizes),
    'batch': [cfg.batch, cfg.data.length],
    'accum': cfg.accum,
    'remat': cfg.model.remat,
    'layers': cfg.model.layers,
    'jax': jax.__version__,
  }


def _fit(memory: Mapping[str, float], limit: float | None, held: Mapping) -> dict:
  """Bytes of a chip by name, `total` among them -> them, and whether they fit."""
  total = memory['total']
  over = total - limit if limit is not None else None
  return {
    'memory': {**held, **memory},
    'limit': limit,
    'fits': over is None or over <= 0,
    'over': over,
    'spare': None if limit is None else 1 - total / limit,
  }


def _costs(what: plan.Plan, program: compiled.Program, of: Machine) -> dict[str, Any]:
  """FLOPs, traffic, buffers and time of a step on one chip."""
  cfg, count = what.cfg, what.mesh.size
  needed = what.flops_per_token * what.tokens_per_step / count
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
  if of.chip is None:
    return report
  expected = estimate.of(cfg, dict(what.mesh.shape), of.chip, of.slices)
  report['flops']['expected'] = {**expected.flops, 'scores again': program.again}
  sent = [_sent(t, what, of) for t in program.collectives]
  time_of = estimate.roofline(
    flops=kinds(program), moved=program.bytes, sent=sent, chip=of.chip
  )
  return report | _time(time_of, needed, of.chip)


def _time(of: estimate.Roofline, needed: float, chip: chips.Chip) -> dict[str, Any]:
  return {
    'seconds': dataclasses.asdict(of) | {'bound': of.bound},
    'mfu': needed / (of.step * chip.flops),
    'assumed': {name: [n, text] for name, (n, text) in estimate.ASSUMED.items()},
  }


def kinds(program: compiled.Program) -> dict[str, float]:
  """FLOPs by the kind that a roofline tells apart."""
  found = {'matmul': 0.0, 'attention': 0.0, 'grouped': 0.0}
  for file, flops in program.work.items():
    if file.startswith(('gated/model/moe', *limits.NEITHER)):
      kind = 'grouped'
    elif file.startswith(limits.ATTENTION) and not file.startswith(limits.LOSS):
      kind = 'attention'
    else:
      kind = 'matmul'
    found[kind] += flops
  return found


def _sent(t: compiled.Traffic, what: plan.Plan, of: Machine) -> estimate.Traffic:
  """What was counted -> what the roofline takes.

  What travels along axes that only split rows and weights may hide behind compute.
  """
  assert of.chip is not None
  axes = t.axis.split('+') if t.axis else list(mesh.AXES)
  inside = 1
  for axis in axes:
    inside *= what.mesh.shape[axis]
  links = share(inside, of.count // of.slices, of.chip)
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


def offences(what: plan.Plan, program: compiled.Program) -> list[str]:
  """What a program of ours must not do (`compiled.limits`), and this one does."""
  cfg, m = what.cfg, what.cfg.model
  found = limits.large_buffers(program)
  parts_of_row = mesh.ways('tokens', what.mesh)
  heads, kv_heads = (n * m.attn.head_dim for n in (m.attn.heads, m.attn.kv_heads))
  sizes = (m.width, m.ffn, m.vocab, heads, kv_heads, m.attn.head_dim)
  found += limits.squares(program, length=cfg.data.length, parts=parts_of_row, also=sizes)
  if m.moe.experts:
    found += limits.whole_experts(
      program, experts=m.moe.experts, width=m.width, ffn=m.ffn
    )
  return found
