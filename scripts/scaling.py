"""Scaling on paper: docs/scaling.md and its figure, by arithmetic and without a machine.

  python scripts/scaling.py                  writes both; a few minutes
  python scripts/scaling.py --model=moe --chip=v6e --count=256,1024     prints one table

Of each model, chip, context and number of chips it takes the fastest that fits of all
meshes, remat policies and numbers of micro-batches (`estimate.suggest`), at the recipe's
4.2M tokens a step. What a compiler found of the same code (tests/golden/preflight) stands
beside the estimates. The figure needs matplotlib, and is left as it is without it.
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from gated import config, plan
from gated.devices import chips
from gated.devices.chips import GIB
from gated.pods import estimate

ROOT = Path(__file__).resolve().parents[1]
COMMAND = 'python scripts/scaling.py'
PAGE, FIGURE = ROOT / 'docs/scaling.md', ROOT / 'docs/scaling.svg'
GOLDEN = ROOT / 'tests/golden/preflight'
MODELS = {
  'dense': ('dense_1b7', '28l', 'dense 1.7B, 28 layers (`dense_1b7.py:28l`)'),
  'moe': ('moe_15b', 'gate=elementwise', 'MoE 15B (`moe_15b.py:gate=elementwise`)'),
}
CHIPS = ('v5e', 'v5p', 'v6e')
COUNTS = (4, 16, 64, 256, 1024, 4096)
LENGTHS = (4096, 32_768)
# Of a smaller kept case most of the memory is the program itself.
SMALL = GIB / 4
# A mesh pays as long as it is so near to the best one.
PAYS = 1.10


@dataclass(frozen=True, kw_only=True)
class Row:
  """So many chips: the best there is, or by how much the least does not fit."""

  count: int
  slices: int
  remat: str
  accum: int
  best: estimate.Estimate | None
  families: Mapping[str, estimate.Estimate]  # the best of each set of axes
  shape: tuple[int, int]  # rows of a step, KV heads
  over: float  # bytes, where nothing fits

  @property
  def rate(self) -> float:
    """Of a chip; tokens are the same in every row."""
    assert self.best is not None
    return 1 / (self.count * self.best.time.step)


def recipe(name: str, length: int) -> plan.Config:
  """A model's recipe at a context, with as many tokens a step."""
  module, arg, _ = MODELS[name]
  c = importlib.import_module(f'configs.{module}').get_config(arg)
  c.batch = c.batch * c.data.length // length
  c.data.length = length
  return config.build(plan.Config, c.to_dict(), 'config')


def row(cfg: plan.Config, chip: chips.Chip, count: int) -> Row:
  slices = -(-count // chip.slice_size)
  found = estimate.suggest(cfg, chip, count, slices)
  families: dict[str, estimate.Estimate] = {}
  for _, e in found:
    families.setdefault(family(e), e)
  over = 0.0 if found else least(cfg, chip, count, slices)
  changes, best = found[0] if found else ({}, None)
  at = lambda knob, start: changes.get(f'config.{knob}', start)
  return Row(
    count=count,
    slices=slices,
    remat=at('model.remat', cfg.model.remat),
    accum=at('accum', cfg.accum),
    best=best,
    families=families,
    shape=(cfg.batch, cfg.model.attn.kv_heads),
    over=over,
  )


def family(e: estimate.Estimate) -> str:
  """The axes that a mesh splits anything by: 'fsdp + expert'."""
  return ' + '.join(axis for axis, n in e.sizes.items() if n > 1)


def least(cfg: plan.Config, chip: chips.Chip, count: int, slices: int) -> float:
  """By how many bytes the mesh that needs the least memory does not fit."""
  found = [
    e.excess
    for accum in range(1, cfg.batch + 1)
    if cfg.batch % accum == 0
    for e in estimate.meshes(estimate.changed(cfg, 'full', accum), count, chip, slices)
  ]
  return min(found, default=float('inf'))


def table(rows: list[Row]) -> list[str]:
  """Rows -> lines of Markdown."""
  lines = [
    '| chips | mesh | remat, micro-batches | GiB a chip | sent by a chip: links, network '
    '| s a step | MFU | efficiency | takes the most |',
    '| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |',
  ]
  first = next((r for r in rows if r.best), None)
  for r in rows:
    count = f'{r.count:,}' + (f' in {r.slices} slices' if r.slices > 1 else '')
    if r.best is None or first is None:
      short = f'{r.over / GIB:,.2f} GiB a chip too much' if r.over < 1e18 else 'no mesh'
      lines.append(f'| {count} | does not fit: {short} | | | | | | | |')
      continue
    e = r.best
    link, network = (sum(getattr(t, w) for t in e.traffic) for w in ('link', 'network'))
    sent = f'{link / GIB:,.1f}' + (f', {network / GIB:,.2f}' if network else '') + ' GiB'
    lines.append(
      f'| {count} | {estimate.named(e.sizes)} | {r.remat}, {r.accum} '
      f'| {e.bytes / GIB:.1f} | {sent} | {e.time.step:.3g} | {e.mfu:.2f} '
      f'| {r.rate / first.rate:.2f} | {e.time.bound} |'
    )
  return lines


def remarks(rows: list[Row]) -> list[str]:
  """Where each set of axes stops paying, and which term takes over.

  Of one or two axes, and those of the best meshes.
  """
  fit = [r for r in rows if r.best]
  best = {family(r.best) for r in fit if r.best}
  names = dict.fromkeys(name for r in fit for name in r.families)
  told = [n for n in names if (n.count('+') < 2 or n in best) and _held(fit, n)]
  lasting = [n for n in told if _held(fit, n)[-1] is fit[-1]]
  lines = []
  for name in told:
    if name in lasting:
      continue
    held = _held(fit, name)
    last = held[-1].count
    span = f'{held[0].count:,}' + (f' to {last:,}' if held[1:] else '')
    after = next(r for r in fit if r.count > last)
    lines.append(
      f'- **{name}** pays at {span} chips. At {after.count:,} {_why(after, name)}.'
    )
  if lasting:
    what = ', '.join(f'**{n}** from {_held(fit, n)[0].count:,} chips' for n in lasting)
    lines.append(f'- To the most chips here pay {what}.')
  return lines


def _why(after: Row, name: str) -> str:
  """Why a set of axes does not pay there."""
  e, best = after.families.get(name), after.best
  assert best is not None
  if e is None:
    (rows, heads), axes = after.shape, set(name.split(' + '))
    caps = {f'{rows:,} rows': rows} if axes & {'data', 'fsdp', 'expert'} else {}
    caps |= {f'{heads} KV heads': heads} if 'tensor' in axes else {}
    few = after.count > math.prod(caps.values()) and 'context' not in axes
    return f'there are only {" and ".join(caps)} to split' if few else 'none of it fits'
  times = e.time.step / best.time.step
  return (
    f'its best, {estimate.named(e.sizes)}, takes {times:.2f} times as long as '
    f'{estimate.named(best.sizes)}: {_terms(e)}'
  )


def _held(rows: list[Row], name: str) -> list[Row]:
  """The rows in which a set of axes pays."""
  near = lambda r, e: r.best and e and e.time.step <= PAYS * r.best.time.step
  return [r for r in rows if near(r, r.families.get(name))]


def _terms(e: estimate.Estimate) -> str:
  """'fsdp (network) 0.41 s, compute 0.20 s'."""
  terms = {'compute': e.time.compute, 'memory': e.time.memory}
  for group in (e.time.hidden, e.time.exposed):
    for name, seconds in group.items():
      terms[name] = terms.get(name, 0.0) + seconds
  first = sorted(terms.items(), key=lambda item: -item[1])[:2]
  return ', '.join(f'{name} {seconds:.2g} s' for name, seconds in first)


def summary(tables: Mapping[tuple, list[Row]]) -> list[str]:
  """A sentence for each model and context, of all chips."""
  lines = []
  for name in dict.fromkeys(key[0] for key in tables):
    for length in dict.fromkeys(key[2] for key in tables):
      parts = []
      for chip in dict.fromkeys(key[1] for key in tables):
        fit = [r for r in tables[name, chip, length] if r.best]
        if not fit:
          parts.append(f'{chip} fits nowhere')
          continue
        first, last = fit[0], fit[-1]
        assert first.best is not None and last.best is not None
        parts.append(
          f'{chip} fits from {first.count:,} chips (MFU {first.best.mfu:.2f}), and at '
          f'{last.count:,} keeps {last.rate / first.rate:.0%} of that speed a chip, '
          f'{last.best.time.bound} taking the most'
        )
      title = MODELS[name][2].split(' (')[0]
      lines.append(
        f'- {title} at {length:,} tokens of context: ' + '; '.join(parts) + '.'
      )
  return lines


def compiled() -> list[str]:
  """What the compiler found in kept preflights, beside the estimates of the same."""
  lines = []
  for path in sorted(GOLDEN.glob('*.json')):
    case = json.loads(path.read_text())
    if not case['found'] or case['found']['memory']['total'] < SMALL:
      continue
    found = case['found']
    flags = dict(f.removeprefix('--').split('=', 1) for f in case['flags'])
    name, _, shape = flags.pop('topology').partition(':')
    slices = int(flags.pop('slices', 1))
    cfg = from_flags(flags)
    e = estimate.of(cfg, found['mesh'], chips.CHIPS[name], slices)
    total, sent = found['memory']['total'], sum(t.link + t.network for t in e.traffic)
    received = sum(found['received'].values())
    lines.append(
      f'| {path.stem} | {name}:{shape} | {estimate.named(found["mesh"])} '
      f'| {total / GIB:.2f} | {e.bytes / GIB:.2f} | {e.bytes / total:.2f} '
      f'| {received / GIB:.1f} | {sent / GIB:.1f} '
      f'| {found["step_seconds"]:.3g} | {e.time.step:.3g} |'
    )
  if not lines:
    return ['No compiled preflight is kept in tests/golden/preflight yet.']
  head = (
    '| case | slice | mesh | compiled GiB a chip | estimated | ratio | compiled traffic, '
    'GiB | estimated | s a step from compiled counts | estimated |'
  )
  return [head, '| --- | --- | --- |' + ' ---: |' * 7, *lines]


def from_flags(flags: Mapping[str, str]) -> plan.Config:
  """'config' and 'config.KNOB' -> the recipe, as the command line would build it."""
  file, _, arg = flags['config'].partition(':')
  c = importlib.import_module(f'configs.{Path(file).stem}').get_config(arg)
  for name, value in flags.items():
    if name.startswith('config.'):
      *path, last = name.split('.')[1:]
      group = c
      for part in path:
        group = group[part]
      kind = type(group[last])
      group[last] = value == 'True' if kind is bool else kind(value)
  return config.build(plan.Config, c.to_dict(), 'config')


PREFACE = f"""# Scaling on paper

Made by `{COMMAND}`. No number was typed by hand, and nothing was run on these
chips. Each row is the fastest fit of all meshes, remat policies and numbers of
micro-batches, at 4,194,304 tokens a step, from `gated/pods/estimate/`. Bytes are per
chip and step. Efficiency is the speed per chip relative to the smallest number of chips
that fits. v5e and v6e beyond 256 chips are several slices over the data-centre network.
If nothing fits, the row gives the excess of the mesh with the least memory, with full
remat.
"""

LEFT_OUT = """The step is the slowest of compute, memory and traffic that hides, plus what
cannot hide. Latency of collectives, waiting for the slowest chip and unbalanced experts
are left out. A set of axes pays where its best mesh is within a tenth of the best of all.
"""


def page(tables: Mapping[tuple, list[Row]]) -> str:
  """All of docs/scaling.md."""
  table_of = estimate.ASSUMED.items()
  lines = [PREFACE, *summary(tables), '', '![MFU against chips](scaling.svg)', '']
  lines += ['## Assumed', '', '| | | |', '| --- | ---: | --- |']
  lines += [f'| {name} | {n:g} | {text} |' for name, (n, text) in table_of]
  lines += ['', LEFT_OUT, '## Against the compiler', '', *compiled(), '']
  for (name, chip, length), rows in tables.items():
    lines += [f'## {MODELS[name][2]}, {chip}, {length:,} tokens of context', '']
    lines += [*table(rows), '', *remarks(rows), '']
  return '\n'.join(lines)


def figure(tables: Mapping[tuple, list[Row]], path: Path) -> bool:
  """Draws MFU against chips; False where matplotlib is missing."""
  if importlib.util.find_spec('matplotlib') is None:
    return False
  matplotlib = importlib.import_module('matplotlib')
  matplotlib.use('svg')
  matplotlib.rcParams['svg.hashsalt'] = 'scaling'  # The same file each time.
  pyplot = importlib.import_module('matplotlib.pyplot')
  names, lengths = (list(dict.fromkeys(key[i] for key in tables)) for i in (0, 2))
  opts: dict[str, bool] = dict.fromkeys(('sharex', 'sharey'), True) | {'squeeze': False}
  drawing, axes = pyplot.subplots(len(names), len(lengths), figsize=(9, 6), **opts)
  for (name, chip, length), rows in tables.items():
    axis = axes[names.index(name)][lengths.index(length)]
    points = [(r.count, r.best.mfu) for r in rows if r.best]
    axis.plot(*zip(*points), marker='o', label=chip)
    axis.set_title(f'{MODELS[name][2].split(" (")[0]}, {length:,} tokens', fontsize=9)
    axis.set_xscale('log', base=2)
    axis.grid(alpha=0.3)
    axis.set(xlabel='chips', ylabel='MFU, estimated')
    axis.label_outer()
  axes[0][0].legend()
  drawing.tight_layout()
  drawing.savefig(path, metadata={'Date': None})
  pyplot.close(drawing)
  return True


def main(argv: list[str]) -> int:
  jax.config.update('jax_platforms', 'cpu')
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  words, numbers = (lambda t: t.split(',')), (lambda t: [int(n) for n in t.split(',')])
  parser.add_argument('--model', type=words, default=list(MODELS))
  parser.add_argument('--chip', type=words, default=list(CHIPS))
  parser.add_argument('--count', type=numbers, default=COUNTS)
  asked = parser.parse_args(argv)
  at = lambda name, chip, length: [
    row(recipe(name, length), chips.CHIPS[chip], n) for n in asked.count
  ]
  keys = itertools.product(asked.model, LENGTHS, asked.chip)
  tables = {(name, chip, length): at(name, chip, length) for name, length, chip in keys}
  if argv:
    for key, rows in tables.items():
      print('\n'.join([str(key), *table(rows), *remarks(rows), '']))
    return 0
  PAGE.write_text(page(tables))
  drawn = figure(tables, FIGURE)
  left = '' if drawn else f'; {FIGURE.name} is left as it was, for want of matplotlib'
  print(f'wrote {PAGE.relative_to(ROOT)}{left}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
