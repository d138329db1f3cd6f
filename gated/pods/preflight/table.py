"""A preflight's report -> lines of text."""

from collections.abc import Mapping
from typing import Any

from gated.devices.chips import GIB
from gated.pods.estimate import named

# At most this many failed checks are printed.
MOST = 5
NOTHING = 'nothing fits by arithmetic: more chips, or chips with more memory'


def lines(report: Mapping[str, Any]) -> list[str]:
  rows = [*_head(report), '', *_memory(report)]
  rows += [f'  would fit: {_way(way)}' for way in report['advice']]
  if not report['fits'] and not report['advice']:
    rows.append(f'  {NOTHING}')
  if 'flops' in report:
    rows += ['', *_work(report), '', *_sent(report)]
  if report.get('buffers'):
    rows += ['', 'largest buffers', *map(_buffer, report['buffers'])]
  if 'seconds' in report:
    rows += ['', *_seconds(report)]
  offences = report['offences']
  rows += [f'! {text}' for text in offences[:MOST]]
  if len(offences) > MOST:
    rows.append(f'! and {len(offences) - MOST} more')
  return rows


def suggested(ways: list[Mapping[str, Any]], most: int) -> list[str]:
  """Suggestions, best first -> lines of text."""
  if not ways:
    return [NOTHING]
  rest = [f'and {len(ways) - most} more'] if len(ways) > most else []
  return [f'{len(ways)} ways fit, by arithmetic', *map(_way, ways[:most]), *rest]


def _way(way: Mapping[str, Any]) -> str:
  size, mfu = way['memory'] / GIB, way['mfu']
  time = f'{way["chips"]} chips, est. {way["seconds"]:.3g} s a step, MFU {mfu:.1%}'
  return f'{time}, {size:.3g} GiB, {way["bound"]} bound: {way["flags"] or "as it is"}'


def _how(r) -> str:
  if r['source'] == 'estimate':
    return 'an estimate by arithmetic: nothing was compiled'
  did = 'compiled by XLA in' if 'flops' in r else 'refused by XLA after'
  return f'{did} {r["compile_seconds"]:.0f} s, jax {r["jax"]}'


def _head(r) -> list[str]:
  batch, length = r['batch']
  slices = f' x {r["slices"]} slices' if r['slices'] > 1 else ''
  return [
    f'{r["name"]} on {r["topology"]}{slices}: {r["chips"]} chips, {named(r["mesh"])}',
    f'{batch} x {length} tokens a step in {r["accum"]} micro-batches, remat {r["remat"]}',
    _how(r),
    *([r['reason']] if r.get('reason') else []),
  ]


def _memory(r) -> list[str]:
  parts = {k: v for k, v in r['memory'].items() if k != 'total'}
  rows = ['memory of a chip, GiB']
  rows += [f'  {name:14}{size / GIB:10.3f}' for name, size in parts.items()]
  total, limit = r['memory']['total'], r['limit']
  rows.append(f'  {"total":14}{total / GIB:10.3f}')
  if limit is None:
    return [*rows, '  the chip has no limit that is known']
  share = f'of {limit / GIB:.2f}'
  if r['fits']:
    return [*rows, f'  fits: {share}, {r["spare"]:.1%} to spare']
  return [*rows, f'  DOES NOT FIT: {r["over"] / GIB:.2f} GiB over, {share}']


def _work(r) -> list[str]:
  flops = r['flops']
  rows = ['work of a chip and step']
  rows.append(f'  {"model":14}{flops["model"]:12.4g} FLOPs, without recomputation')
  expected = sum(flops.get('expected', {}).values())
  if expected:
    text = f'FLOPs by arithmetic, remat {r["remat"]} and what is done twice included'
    rows.append(f'  {"expected":14}{expected:12.4g} {text}')
  if 'counted' in flops:
    ratio = f', {flops["counted"] / expected:.3f} of expected' if expected else ''
    rows.append(f'  {"counted":14}{flops["counted"]:12.4g} FLOPs in the program{ratio}')
  for name, count in flops.get('kernels', {}).items():
    rows.append(f'  {"":14}{count:12.4g} of them in {name}')
  for name, runs in r.get('uncounted', {}).items():
    rows.append(f'  ! custom call {name!r}, {runs} runs, is not counted')
  for name in r.get('unknown_loops', ()):
    rows.append(f'  ! a loop of unknown length is counted once: {name}')
  if r.get('idle_loops'):
    count = len(r['idle_loops'])
    rows.append(f'  {count} loops that only unbalanced routers need are left out')
  if r.get('conditionals'):
    rows.append(f'  {r["conditionals"]} conditionals: the branch that costs most counts')
  rows.append(f'  {"moved":14}{r["bytes_moved"] / GIB:12.4g} GiB of memory, estimated')
  return rows


def _sent(r) -> list[str]:
  if not r['collectives']:
    return ['no collectives']
  rows = ['collectives, GiB that a chip receives in a step']
  for t in r['collectives']:
    name = f'{t["kind"]} {t.get("what", "")}'.strip()
    runs = f'{t["count"]} runs' if 'count' in t else ''
    path = f'{t["axis"] or "?"} ({t["network"]})'
    rows.append(f'  {name:28}{path:24}{t["bytes"] / GIB:10.4f}  {runs}'.rstrip())
  return rows


def _buffer(b) -> str:
  times = f' x {b["count"]}' if b['count'] > 1 else ''
  return (
    f'  {b["bytes"] / GIB:8.3f} GiB  {b["shape"]}{times}  {b["place"] or b["source"]}'
  )


def _seconds(r) -> list[str]:
  s = r['seconds']
  rows = [
    f'a step takes {s["step"]:.4g} s at least, bound by {s["bound"]}: MFU {r["mfu"]:.1%}'
  ]
  rows.append(f'  compute {s["compute"]:.4g} s, memory {s["memory"]:.4g} s')
  for name in ('hidden', 'exposed'):
    for axis, seconds in s[name].items():
      rows.append(f'  {axis} {seconds:.4g} s, {name}')
  rows.append(
    '  assumed: ' + '; '.join(f'{n} {text}' for n, text in r['assumed'].values())
  )
  return rows
