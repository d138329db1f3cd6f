"""The page on scaling says what the estimates say."""

import importlib
import json
import math

import pytest
from test_estimate import large, sizes

from configs import moe_15b
from gated.devices import chips
from gated.pods import estimate

scaling = importlib.import_module('scripts.scaling')
GIB = chips.GIB


@pytest.fixture(scope='module')
def tables():
  key = 'moe', 'v5e', 4096
  cfg = scaling.recipe('moe', 4096)
  return {key: [scaling.row(cfg, chips.CHIPS['v5e'], n) for n in (4, 64, 512)]}


def test_every_context_has_the_recipes_tokens():
  for name in scaling.MODELS:
    for length in scaling.LENGTHS:
      cfg = scaling.recipe(name, length)
      assert cfg.batch * cfg.data.length == 1024 * 4096
      assert cfg.data.length == length


def test_counts_are_slices_that_there_are():
  for name in scaling.CHIPS:
    chip = chips.CHIPS[name]
    there = {math.prod(shape) for shape in chips.topologies(name)}
    for count in scaling.COUNTS:
      slices = -(-count // chip.slice_size)
      assert count // slices in there and count % slices == 0
  assert max(scaling.COUNTS) >= 1024 and min(scaling.COUNTS) == 4


def test_a_row_is_the_best_that_fits_or_says_by_how_much_it_does_not(tables):
  ((_, rows),) = tables.items()
  small, middle, large = rows
  assert small.best is None and small.over > 0
  assert middle.best.fits and large.best.fits and large.slices == 2
  cfg = estimate.changed(scaling.recipe('moe', 4096), 'full', 1024)
  least = min(e.excess for e in estimate.meshes(cfg, 4, chips.CHIPS['v5e']))
  assert small.over <= least
  lines = scaling.table(rows)
  assert f'{small.over / GIB:,.2f} GiB a chip too much' in lines[2]
  cells = [cell.strip() for cell in lines[3].split('|')[1:-1]]
  assert cells[0] == '64' and cells[1] == estimate.named(middle.best.sizes)
  assert float(cells[3]) == pytest.approx(middle.best.bytes / GIB, abs=0.06)
  assert float(cells[5]) == pytest.approx(middle.best.time.step, rel=0.01)
  assert cells[7] == '1.00' and '512 in 2 slices' in lines[4]
  speed = 64 * middle.best.time.step / (512 * large.best.time.step)
  assert float(lines[4].split('|')[8]) == pytest.approx(speed, abs=0.006)


def test_an_axis_that_stops_paying_is_told_with_what_takes_over(tables):
  ((_, rows),) = tables.items()
  lines = scaling.remarks(rows)
  for line in lines[:-1]:
    name = line.split('**')[1]
    after = next(r for r in rows if f'At {r.count:,} ' in line)
    found = after.families.get(name)
    assert found is None or found.time.step > scaling.PAYS * after.best.time.step
    assert found is None or f'{found.time.step / after.best.time.step:.2f} times' in line
  best = scaling.family(rows[-1].best)
  assert lines[-1].startswith('- To the most chips') and f'**{best}**' in lines[-1]


def test_what_was_compiled_stands_beside_its_estimate(tmp_path, monkeypatch):
  monkeypatch.setattr(scaling, 'GOLDEN', tmp_path)
  assert 'No compiled preflight' in scaling.compiled()[0]
  case = {
    'flags': [
      '--config=configs/moe_15b.py:gate=headwise',
      '--topology=v5p:4x4x4',
      '--config.accum=4',
      '--config.model.layers=scan',
      '--config.mesh.expert=4',
    ],
    'needs': {'spare': 0.05, 'counted': True},
    'found': {
      'mesh': sizes(fsdp=16, expert=4),
      'memory': {'total': 20 * GIB},
      'received': {'all-gather (links)': 8 * GIB},
      'step_seconds': 7.5,
      'mfu': 0.3,
    },
  }
  (tmp_path / 'moe.json').write_text(json.dumps(case))
  cfg = large(moe_15b, 'gate=headwise', accum=4, model__layers='scan', mesh__expert=4)
  e = estimate.of(cfg, sizes(fsdp=16, expert=4), chips.CHIPS['v5p'])
  line = scaling.compiled()[-1]
  assert line.startswith('| moe | v5p:4x4x4 | fsdp=16 expert=4 | 20.00 ')
  assert f'| {e.bytes / GIB:.2f} | {e.bytes / GIB / 20:.2f} |' in line
  assert line.endswith(f'| 7.5 | {e.time.step:.3g} |')


def test_the_page_names_its_command_and_all_that_is_assumed(
  tables, monkeypatch, tmp_path
):
  monkeypatch.setattr(scaling, 'GOLDEN', tmp_path)
  page = scaling.page(tables)
  assert scaling.COMMAND in page.split('\n\n')[1]
  for name, (_, text) in estimate.ASSUMED.items():
    assert f'| {name} |' in page and text in page
  assert all(line in page for line in scaling.table(tables['moe', 'v5e', 4096]))


def test_the_page_that_is_kept_is_of_these_chips_and_contexts():
  page = scaling.PAGE.read_text()
  for name in scaling.MODELS:
    for chip in scaling.CHIPS:
      for length in scaling.LENGTHS:
        head = f'## {scaling.MODELS[name][2]}, {chip}, {length:,} tokens of context'
        assert head in page, f'run {scaling.COMMAND}'


def test_the_figure_is_drawn_where_there_is_something_to_draw_with(tables, tmp_path):
  path = tmp_path / 'scaling.svg'
  drawn = scaling.figure(tables, path)
  assert drawn == path.exists()
  assert not drawn or '<svg' in path.read_text()


def test_the_command_line_prints_one_table(monkeypatch, capsys):
  monkeypatch.setattr(scaling, 'LENGTHS', (4096,))
  assert scaling.main(['--model=dense', '--chip=v6e', '--count=16']) == 0
  assert '| 16 | fsdp=16 |' in capsys.readouterr().out
