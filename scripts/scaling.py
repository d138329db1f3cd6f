"""Estimates of scaling: docs/scaling.md and its figure, without a machine.

  python scripts/scaling.py                  writes both in a few minutes
  python scripts/scaling.py --model=moe --chip=v6e --count=256,1024     prints one table

For each model, chip, context and number of chips, the page has the fastest fit of all
meshes, remat policies and micro-batches (`estimate.suggest`), at the recipe's 4.2M tokens
a step. It compares estimates with compiled programs (tests/golden/preflight). The figure
needs matplotlib.
"""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from gated import config, plan
from gated.devices import chips
from gated.devices.chips import GIB
from gated.plan import command
from gated.pods import estimate, preflight
from gated.pods.estimate.roofline import ASSUMED
from gated.run import terminal

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
# In smaller golden cases most of the memory is the program itself.
SMALL = GIB / 4
# A set of axes pays if its best mesh takes at most this multiple of the best time.
PAYS = 1.10


class Row(NamedTuple):
  """The meshes for a number of chips."""

  count: int
  slices: int
  meshes: dict[str, estimate.Estimate]  # the fastest fit of each set of axes, best first
  excess: float | None  # bytes over the memory, if none fits; None if none divides

  @property
  def best(self) -> estimate.Estimate:
    return next(iter(self.meshes.values()))

  @property
  def speed(self) -> float:
    """Steps per second and chip."""
    return 1 / (self.count * self.best.time.step)


# (model, chip, context) -> rows.
Tables = Mapping[tuple[str, str, int], Sequence[Row]]


def recipe(name: str, length: int) -> plan.Config:
  """A model's recipe at a context, with the same tokens a step."""
  module, arg, _ = MODELS[name]
  c = importlib.import_module(f'configs.{module}').get_config(arg)
  c.batch = c.batch * c.data.length // length
  c.data.length = length
  return config.build(plan.Config, c.to_dict(), 'config')


def row(cfg: plan.Config, chip: chips.Chip, count: int) -> Row:
  """A recipe and a number of chips -> the fastest meshes that fit."""
  slices = -(-count // chip.slice_size)
  meshes: dict[str, estimate.Estimate] = {}
  for e in estimate.suggest(cfg, chip, count, slices):
    meshes.setdefault(' + '.join(axis for axis, n in e.sizes.items() if n > 1), e)
  accums = [n for n in range(1, cfg.batch + 1) if cfg.batch % n == 0 and not meshes]
  least = [estimate.changed(cfg, 'full', accum) for accum in accums]
  excesses = [e.excess for c in least for e in estimate.meshes(c, count, chip, slices)]
  return Row(count, slices, meshes, min(excesses, default=None))


def table(rows: Sequence[Row]) -> list[str]:
  """Rows -> lines of Markdown."""
  lines = [
    '| chips | mesh | remat, micro-batches | GiB a chip | sent by a chip: links, network '
    '| s a step | MFU | efficiency | slowest term |',
    '| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |',
  ]
  first = None
  for r in rows:
    count = f'{r.count:,}' + (f' in {r.slices} slices' if r.slices > 1 else '')
    if not r.meshes:
      excess = r.excess and f'{r.excess / GIB:,.2f} GiB a chip too much'
      lines.append(f'| {count} | does not fit: {excess or "no mesh"} | | | | | | | |')
      continue
    e, first = r.best, first or r
    link, network = (
      sum(t.bytes for t in e.traffic if t.network == name)
      for name in ('links', 'network')
    )
    sent = f'{link / GIB:,.1f}' + (f', {network / GIB:,.2f}' if network else '')
    lines.append(
      f'| {count} | {estimate.named(e.sizes)} | {e.cfg.model.remat}, {e.cfg.accum} '
      f'| {e.bytes / GIB:.1f} | {sent} GiB | {e.time.step:.3g} | {e.mfu:.2f} '
      f'| {r.speed / first.speed:.2f} | {e.time.bound} |'
    )
  return lines


def remarks(rows: Sequence[Row]) -> list[str]:
  """The numbers of chips where each set of axes pays, and why it stops.

  Covers the sets of one or two axes, and the sets of the best meshes.
  """
  rows = [r for r in rows if r.meshes]
  best = {next(iter(r.meshes)) for r in rows}
  lines = []
  for name in dict.fromkeys(name for r in rows for name in r.meshes):
    ratios = {
      r.count: r.meshes[name].time.step / r.best.time.step if name in r.meshes else None
      for r in rows
    }
    pays = [count for count, ratio in ratios.items() if ratio and ratio <= PAYS]
    if not pays or (name.count('+') > 1 and name not in best):
      continue
    line = f'- **{name}** pays at {", ".join(f"{n:,}" for n in pays)} chips.'
    later = [r for r in rows if r.count > pays[-1]]
    if later and name in later[0].meshes:
      ratio, term = ratios[later[0].count], later[0].meshes[name].time.bound
      line += f' At {later[0].count:,} it takes {ratio:.2f} times the best time: {term}.'
    elif later:
      line += f' At {later[0].count:,} no mesh of these axes divides the recipe and fits.'
    lines.append(line)
  return lines


def compiled() -> list[str]:
  """Lines of Markdown: golden preflights beside estimates of the same recipes."""
  lines = [
    '| case | slice | mesh | compiled GiB a chip | estimated | ratio | compiled traffic, '
    'GiB | estimated | s a step from compiled counts | estimated |',
    '| --- | --- | --- |' + ' ---: |' * 7,
  ]
  for path in sorted(GOLDEN.glob('*.json')):
    case = json.loads(path.read_text())
    result = case['found']
    if not result or result['memory']['total'] < SMALL:
      continue
    cfg, machine = from_flags(case['flags'])
    assert machine.chip is not None
    e = estimate.Estimate(cfg, result['mesh'], machine.chip, machine.slices)
    total, sent = result['memory']['total'], sum(t.bytes for t in e.traffic)
    received = sum(result['received'].values())
    lines.append(
      f'| {path.stem} | {machine.topology} | {estimate.named(e.sizes)} '
      f'| {total / GIB:.2f} | {e.bytes / GIB:.2f} | {e.bytes / total:.2f} '
      f'| {received / GIB:.1f} | {sent / GIB:.1f} '
      f'| {result["step_seconds"]:.3g} | {e.time.step:.3g} |'
    )
  return lines


def from_flags(arguments: Sequence[str]) -> tuple[plan.Config, preflight.Machine]:
  """Flags of preflight.py -> the recipe and the machine, as preflight.py builds them."""
  argv = [COMMAND, *(a.replace('--config=', f'--config={ROOT}/') for a in arguments)]
  values = flags.FlagValues()
  command.define_recipe(flags, config_flags, flag_values=values, sys_argv=argv)
  flags.DEFINE_string('topology', '', '', flag_values=values)
  flags.DEFINE_integer('slices', 1, '', flag_values=values)
  values(argv)
  cfg = config.build(plan.Config, values.config.to_dict(), 'config')
  return cfg, preflight.machine(values.topology, values.slices)


PREFACE = f"""# Scaling on paper

Made by `{COMMAND}`. No number was typed by hand, and nothing was run on these
chips. Each row is the fastest fit of all meshes, remat policies and numbers of
micro-batches, at 4,194,304 tokens a step, from `gated/pods/estimate/`. Bytes are per
chip and step. Efficiency is the speed per chip relative to the smallest number of chips
that fits. v5e and v6e beyond 256 chips are several slices over the data-centre network.
If nothing fits, the row gives the excess of the mesh with the least memory, with full
remat.

![MFU against chips](scaling.svg)

## Assumed

| | | |
| --- | ---: | --- |
"""

LEFT_OUT = """
A step takes the slowest of compute, memory and hidden traffic, plus the exposed traffic.
Estimates leave out the latency of collectives, waits for the slowest chip and unbalanced
experts. A set of axes pays where its best mesh is within a tenth of the best time.

## Against the compiler
"""


def page(tables: Tables) -> str:
  """All of docs/scaling.md."""
  assumed = [f'| {name} | {n:g} | {text} |' for name, (n, text) in ASSUMED.items()]
  lines = [PREFACE + '\n'.join(assumed), LEFT_OUT, *compiled(), '']
  for (name, chip, length), rows in tables.items():
    lines += [f'## {MODELS[name][2]}, {chip}, {length:,} tokens of context', '']
    lines += [*table(rows), '', *remarks(rows), '']
  return '\n'.join(lines)


def figure(tables: Tables, path: Path) -> None:
  """Draws MFU against chips."""
  matplotlib = importlib.import_module('matplotlib')
  matplotlib.use('svg')
  matplotlib.rcParams['svg.hashsalt'] = 'scaling'  # The same file each time.
  pyplot = importlib.import_module('matplotlib.pyplot')
  names, lengths = (list(dict.fromkeys(key[i] for key in tables)) for i in (0, 2))
  drawing, panels = pyplot.subplots(
    len(names), len(lengths), figsize=(9, 6), sharex=True, sharey=True, squeeze=False
  )
  for (name, chip, length), rows in tables.items():
    panel = panels[names.index(name)][lengths.index(length)]
    points = [(r.count, r.best.mfu) for r in rows if r.meshes]
    panel.plot(*zip(*points), marker='o', label=chip)
    panel.set_title(f'{MODELS[name][2].split(" (")[0]}, {length:,} tokens', fontsize=9)
    panel.set_xscale('log', base=2)
    panel.grid(alpha=0.3)
    panel.set(xlabel='chips', ylabel='MFU, estimated')
    panel.label_outer()
  panels[0][0].legend()
  drawing.tight_layout()
  drawing.savefig(path, metadata={'Date': None})
  pyplot.close(drawing)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = lambda text: text.split(',')
  numbers = lambda text: [int(number) for number in text.split(',')]
  add, joined = parser.add_argument, ','.join
  add('--model', type=names, default=list(MODELS), help=f'default: {joined(MODELS)}')
  add('--chip', type=names, default=list(CHIPS), help=f'default: {joined(CHIPS)}')
  add(
    '--count', type=numbers, default=COUNTS, help=f'default: {joined(map(str, COUNTS))}'
  )
  args = parser.parse_args(argv)
  try:
    for flag, known in (('model', MODELS), ('chip', chips.CHIPS)):
      for name in getattr(args, flag):
        config.one_of(f'--{flag}', name, known)
  except ValueError as error:
    parser.error(str(error))
  jax.config.update('jax_platforms', 'cpu')
  tables = {
    (name, chip, length): [
      row(recipe(name, length), chips.CHIPS[chip], n) for n in args.count
    ]
    for name, length, chip in itertools.product(args.model, LENGTHS, args.chip)
  }
  if argv:
    for key, rows in tables.items():
      print('\n'.join([str(key), *table(rows), *remarks(rows), '']))
    return 0
  PAGE.write_text(page(tables))
  figure(tables, FIGURE)
  print(f'wrote {PAGE.relative_to(ROOT)} and {FIGURE.name}')
  return 0


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main(sys.argv[1:]))
