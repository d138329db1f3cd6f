"""The page on scaling agrees with the estimates."""

import importlib
import json
import math

import pytest
from test_estimate import large, sizes

from configs import moe_15b
from gated.devices import chips
from gated.pods import estimate
from gated.pods.estimate.roofline import ASSUMED

scaling = importlib.import_module('scripts.scaling')
GIB = chips.GIB


@pytest.fixture(scope='module')
def tables():
  key = 'moe', 'v5e', 4096
  cfg = scaling.recipe('moe', 4096)
  return {key: [scaling.row(cfg, chips.CHIPS['v5e'], n) for n in (4, 64, 512)]}


def test_every_context_has_the_same_tokens_a_step():
  for name in scaling.MODELS:
    for length in scaling.LENGTHS:
      cfg = scaling.recipe(name, length)
      assert cfg.batch * cfg.data.length == 1024 * 4096
      assert cfg.data.length == length


def test_counts_are_whole_slices():
  for name in scaling.CHIPS:
    chip = chips.CHIPS[name]
    slice_sizes = {math.prod(shape) for shape in chips.topologies(name)}
    for count in scaling.COUNTS:
      slices = -(-count // chip.slice_size)
      assert count // slices in slice_sizes and count % slices == 0
  assert max(scaling.COUNTS) >= 1024 and min(scaling.COUNTS) == 4


@pytest.mark.slow
def test_a_row_has_the_best_fit_or_the_excess(tables):
  ((_, rows),) = tables.items()
  small, middle, large = rows
  assert not small.meshes and small.excess > 0
  assert middle.best.fits and large.best.fits and large.slices == 2
  cfg = estimate.changed(scaling.recipe('moe', 4096), 'full', 1024)
  least = min(e.excess for e in estimate.meshes(cfg, 4, chips.CHIPS['v5e']))
  assert small.excess <= least
  lines = scaling.table(rows)
  assert f'{small.excess / GIB:,.2f} GiB a chip too much' in lines[2]
  cells = [cell.strip() for cell in lines[3].split('|')[1:-1]]
  assert cells[0] == '64' and cells[1] == estimate.named(middle.best.sizes)
  assert float(cells[3]) == pytest.approx(middle.best.bytes / GIB, abs=0.06)
  assert float(cells[5]) == pytest.approx(middle.best.time.step, rel=0.01)
  assert cells[7] == '1.00' and '512 in 2 slices' in lines[4]
  speed = 64 * middle.best.time.step / (512 * large.best.time.step)
  assert float(lines[4].split('|')[8]) == pytest.approx(speed, abs=0.006)


def test_remarks_list_where_each_set_of_axes_pays(tables):
  ((_, rows),) = tables.items()
  lines = scaling.remarks(rows)
  for line in lines:
    name, counts = line.removeprefix('- **').split(' chips.')[0].split('** pays at ')
    for r in rows:
      e = r.meshes.get(name)
      pays = e is not None and e.time.step <= scaling.PAYS * r.best.time.step
      assert (f'{r.count:,}' in counts.split(', ')) == pays
      if f'At {r.count:,} ' in line:
        reason = (
          f'{e.time.step / r.best.time.step:.2f} times' if e else 'no mesh of these axes'
        )
        assert reason in line
  assert any(f'**{next(iter(rows[-1].meshes))}**' in line for line in lines)


def test_golden_preflights_stand_beside_their_estimates(tmp_path, monkeypatch):
  monkeypatch.setattr(scaling, 'GOLDEN', tmp_path)
  assert len(scaling.compiled()) == 2
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
  e = estimate.Estimate(cfg, sizes(fsdp=16, expert=4), chips.CHIPS['v5p'])
  line = scaling.compiled()[-1]
  assert line.startswith('| moe | v5p:4x4x4 | fsdp=16 expert=4 | 20.00 ')
  assert f'| {e.bytes / GIB:.2f} | {e.bytes / GIB / 20:.2f} |' in line
  assert line.endswith(f'| 7.5 | {e.time.step:.3g} |')


def test_the_page_names_its_command_and_its_assumptions(tables, monkeypatch, tmp_path):
  monkeypatch.setattr(scaling, 'GOLDEN', tmp_path)
  page = scaling.page(tables)
  assert scaling.COMMAND in page.split('\n\n')[1]
  for name, (_, text) in ASSUMED.items():
    assert f'| {name} |' in page and text in page
  assert all(line in page for line in scaling.table(tables['moe', 'v5e', 4096]))


def test_the_page_in_docs_has_these_chips_and_contexts():
  page = scaling.PAGE.read_text()
  for name in scaling.MODELS:
    for chip in scaling.CHIPS:
      for length in scaling.LENGTHS:
        head = f'## {scaling.MODELS[name][2]}, {chip}, {length:,} tokens of context'
        assert head in page, f'run {scaling.COMMAND}'


def test_the_figure_is_drawn(tables, tmp_path):
  pytest.importorskip('matplotlib')
  path = tmp_path / 'scaling.svg'
  scaling.figure(tables, path)
  assert '<svg' in path.read_text()


def test_the_command_line_prints_one_table(monkeypatch, capsys):
  monkeypatch.setattr(scaling, 'LENGTHS', (4096,))
  assert scaling.main(['--model=dense', '--chip=v6e', '--count=16']) == 0
  assert '| 16 | fsdp=16 |' in capsys.readouterr().out
