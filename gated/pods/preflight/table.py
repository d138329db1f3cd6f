"""A preflight's report -> lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from gated.devices.chips import GIB
from gated.pods.estimate import named

# At most this many failed checks are printed.
MOST = 5
NOTHING = 'nothing fits by arithmetic: use more chips, or chips with more memory'


def lines(report: Mapping[str, Any]) -> list[str]:
  """A preflight's report -> lines of text."""
  rows = [*_head(report), '', *_memory(report)]
  rows += [f'  would fit: {_suggestion(s)}' for s in report['advice']]
  if not report['fits'] and not report['advice']:
    rows.append(f'  {NOTHING}')
  if 'flops' in report:
    rows += ['', *_work(report), '', *_collectives(report['collectives'])]
  if 'buffers' in report:
    rows += ['', 'largest buffers', *map(_buffer, report['buffers'])]
  if 'seconds' in report:
    rows += ['', *_seconds(report)]
  offences = report['offences']
  rows += [f'! {text}' for text in offences[:MOST]]
  if len(offences) > MOST:
    rows.append(f'! and {len(offences) - MOST} more')
  return rows


def suggested(suggestions: Sequence[Mapping[str, Any]], most: int) -> list[str]:
  """Suggestions, best first -> lines of text."""
  if not suggestions:
    return [NOTHING]
  rows = [f'{len(suggestions)} ways fit, by arithmetic']
  rows += map(_suggestion, suggestions[:most])
  if len(suggestions) > most:
    rows.append(f'and {len(suggestions) - most} more')
  return rows


def _suggestion(s: Mapping[str, Any]) -> str:
  time = f'{s["chips"]} chips, est. {s["seconds"]:.3g} s a step, MFU {s["mfu"]:.1%}'
  memory = f'{s["memory"] / GIB:.3g} GiB'
  return f'{time}, {memory}, {s["bound"]} bound: {s["flags"] or "without changes"}'


def _head(r: Mapping[str, Any]) -> list[str]:
  batch, length = r['batch']
  slices = f' x {r["slices"]} slices' if r['slices'] > 1 else ''
  rows = [
    f'{r["name"]} on {r["topology"]}{slices}: {r["chips"]} chips, {named(r["mesh"])}',
    f'{batch} x {length} tokens a step in {r["accum"]} micro-batches, remat {r["remat"]}',
  ]
  if r['source'] == 'estimate':
    rows += ['an estimate by arithmetic: nothing was compiled', r['reason']]
    return [row for row in rows if row]
  result = 'compiled by XLA in' if 'flops' in r else 'refused by XLA after'
  return [*rows, f'{result} {r["compile_seconds"]:.0f} s, jax {r["jax"]}']


def _memory(r: Mapping[str, Any]) -> list[str]:
  rows = ['memory of a chip, GiB']
  rows += [f'  {name:14}{size / GIB:10.3f}' for name, size in r['memory'].items()]
  if r['limit'] is None:
    return [*rows, '  the chip has no known limit']
  limit = f'of {r["limit"] / GIB:.2f}'
  if r['fits']:
    return [*rows, f'  fits: {limit}, {r["spare"]:.1%} free']
  return [*rows, f'  DOES NOT FIT: {r["over"] / GIB:.2f} GiB over, {limit}']


def _work(r: Mapping[str, Any]) -> list[str]:
  flops = r['flops']
  row = lambda name, number, text: f'  {name:14}{number:12.4g} {text}'
  rows = ['work of a chip and step']
  rows.append(row('model', flops['model'], 'FLOPs, without recomputation'))
  expected = sum(flops['expected'].values()) if 'expected' in flops else 0.0
  if expected:
    text = f'FLOPs by arithmetic, with recomputation (remat {r["remat"]})'
    rows.append(row('expected', expected, text))
  if 'counted' in flops:
    share = f', {flops["counted"] / expected:.3f} of expected' if expected else ''
    rows.append(row('counted', flops['counted'], f'FLOPs in the program{share}'))
    rows += [row('', n, f'of them in {name}') for name, n in flops['kernels'].items()]
    rows += [
      f'  ! the custom call {name!r} is not counted: {runs} runs'
      for name, runs in r['uncounted'].items()
    ]
    rows += [
      f'  ! a loop of unknown length is counted once: {name}'
      for name in r['unknown_loops']
    ]
    if r['idle_loops']:
      count = len(r['idle_loops'])
      rows.append(f'  {count} loops for unbalanced routers are not counted')
    if r['conditionals']:
      rows.append(f'  {r["conditionals"]} conditionals count by their costliest branch')
  return [*rows, row('moved', r['bytes_moved'] / GIB, 'GiB of memory, estimated')]


def _collectives(collectives: list[Mapping[str, Any]]) -> list[str]:
  if not collectives:
    return ['no collectives']
  rows = ['collectives, GiB that a chip receives in a step']
  for t in collectives:
    # An estimate has the purpose, a program the number of runs.
    name = f'{t["kind"]} {t["purpose"]}' if 'purpose' in t else t['kind']
    runs = f'  {t["count"]} runs' if 'count' in t else ''
    path = f'{t["axis"] or "?"} ({t["network"]})'
    rows.append(f'  {name:28}{path:24}{t["bytes"] / GIB:10.4f}{runs}')
  return rows


def _buffer(b: Mapping[str, Any]) -> str:
  times = f' x {b["count"]}' if b['count'] > 1 else ''
  origin = b['place'] or b['source']
  return f'  {b["bytes"] / GIB:8.3f} GiB  {b["shape"]}{times}  {origin}'


def _seconds(r: Mapping[str, Any]) -> list[str]:
  s = r['seconds']
  assumed = '; '.join(f'{n} {text}' for n, text in r['assumed'].values())
  return [
    f'a step takes {s["step"]:.4g} s at least, bound by {s["bound"]}: MFU {r["mfu"]:.1%}',
    f'  compute {s["compute"]:.4g} s, memory {s["memory"]:.4g} s',
    *(
      f'  {axis} {seconds:.4g} s, {name}'
      for name in ('hidden', 'exposed')
      for axis, seconds in s[name].items()
    ),
    f'  assumed: {assumed}',
  ]
