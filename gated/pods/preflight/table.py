"""A preflight's report -> lines to read."""

from collections.abc import Mapping
from typing import Any

from gated.devices.chips import GIB

# So many of what a program must not do are printed.
MOST = 5


def lines(report: Mapping[str, Any]) -> list[str]:
  found = [*_head(report), '', *_memory(report)]
  found += [f'  would fit: {_way(way)}' for way in report['advice']]
  if not report['fits'] and not report['advice']:
    found.append('  nothing fits by arithmetic: more chips, or chips with more memory')
  if 'flops' in report:
    found += ['', *_work(report), '', *_sent(report)]
  if report.get('buffers'):
    found += ['', 'largest buffers', *map(_buffer, report['buffers'])]
  if 'seconds' in report:
    found += ['', *_seconds(report)]
  offences = report['offences']
  found += [f'! {text}' for text in offences[:MOST]]
  if len(offences) > MOST:
    found.append(f'! and {len(offences) - MOST} more')
  return found


def suggested(ways: list[Mapping[str, Any]], most: int) -> list[str]:
  """What fits, best first -> lines to read."""
  if not ways:
    return ['nothing fits by arithmetic: more chips, or chips with more memory']
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
  axes = ' '.join(f'{axis}={n}' for axis, n in r['mesh'].items() if n > 1)
  rows, length = r['batch']
  slices = f' x {r["slices"]} slices' if r['slices'] > 1 else ''
  return [
    f'{r["name"]} on {r["topology"]}{slices}: {r["chips"]} chips, {axes or "one device"}',
    f'{rows} x {length} tokens a step in {r["accum"]} micro-batches, remat {r["remat"]}',
    _how(r),
    *([r['reason']] if r.get('reason') else []),
  ]


def _memory(r) -> list[str]:
  parts = {k: v for k, v in r['memory'].items() if k != 'total'}
  found = ['memory of a chip, GiB']
  found += [f'  {name:14}{size / GIB:10.3f}' for name, size in parts.items()]
  total, limit = r['memory']['total'], r['limit']
  found.append(f'  {"total":14}{total / GIB:10.3f}')
  if limit is None:
    return [*found, '  the chip has no limit that is known']
  of = f'of {limit / GIB:.2f}'
  if r['fits']:
    return [*found, f'  fits: {of}, {r["spare"]:.1%} to spare']
  return [*found, f'  DOES NOT FIT: {r["over"] / GIB:.2f} GiB over, {of}']


def _work(r) -> list[str]:
  flops = r['flops']
  found = ['work of a chip and step']
  found.append(f'  {"model":14}{flops["model"]:12.4g} FLOPs, without recomputation')
  expected = sum(flops.get('expected', {}).values())
  if expected:
    text = f'FLOPs by arithmetic, remat {r["remat"]} and what is done twice included'
    found.append(f'  {"expected":14}{expected:12.4g} {text}')
  if 'counted' in flops:
    ratio = f', {flops["counted"] / expected:.3f} of expected' if expected else ''
    found.append(f'  {"counted":14}{flops["counted"]:12.4g} FLOPs in the program{ratio}')
  for name, count in flops.get('kernels', {}).items():
    found.append(f'  {"":14}{count:12.4g} of them in {name}')
  for name, runs in r.get('uncounted', {}).items():
    found.append(f'  ! custom call {name!r}, {runs} runs, is not counted')
  for name in r.get('unknown_loops', ()):
    found.append(f'  ! a loop of unknown length is counted once: {name}')
  if r.get('idle_loops'):
    count = len(r['idle_loops'])
    found.append(f'  {count} loops that only unbalanced routers need are left out')
  if r.get('conditionals'):
    found.append(f'  {r["conditionals"]} conditionals: the branch that costs most counts')
  found.append(f'  {"moved":14}{r["bytes_moved"] / GIB:12.4g} GiB of memory, estimated')
  return found


def _sent(r) -> list[str]:
  if not r['collectives']:
    return ['no collectives']
  found = ['collectives, GiB that a chip receives in a step']
  for t in r['collectives']:
    name = f'{t["kind"]} {t.get("what", "")}'.strip()
    runs = f'{t["count"]} runs' if 'count' in t else ''
    where = f'{t["axis"] or "?"} ({t["network"]})'
    found.append(f'  {name:28}{where:24}{t["bytes"] / GIB:10.4f}  {runs}'.rstrip())
  return found


def _buffer(b) -> str:
  times = f' x {b["count"]}' if b['count'] > 1 else ''
  return (
    f'  {b["bytes"] / GIB:8.3f} GiB  {b["shape"]}{times}  {b["place"] or b["source"]}'
  )


def _seconds(r) -> list[str]:
  s = r['seconds']
  found = [
    f'a step takes {s["step"]:.4g} s at least, bound by {s["bound"]}: MFU {r["mfu"]:.1%}'
  ]
  found.append(f'  compute {s["compute"]:.4g} s, memory {s["memory"]:.4g} s')
  for name in ('hidden', 'exposed'):
    for axis, seconds in s[name].items():
      found.append(f'  {axis} {seconds:.4g} s, {name}')
  found.append(
    '  assumed: ' + '; '.join(f'{n} {text}' for n, text in r['assumed'].values())
  )
  return found
