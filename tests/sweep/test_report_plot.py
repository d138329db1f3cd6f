"""Plots of single runs: scripts/plot.py."""

import importlib
import sys

import numpy as np
import pytest
from lab import STEPS, losses, run

from gated import storage
from gated.run.metrics import records
from gated.sweep.report import logs
from scripts import plot

PROBES = {'gate_mean': 0.25, 'm_act': 12.0}


def trained(folder, kind='calm', seed=0, **options) -> str:
  run(storage.path(folder), kind, 2.5, seed, **options)
  path = folder / 'run.json'
  about = storage.read_json(path, 1 << 20)
  storage.write_json(path, about | {'config': {'steps': STEPS}})
  return str(folder)


def test_a_log_holds_the_numbers_of_its_records_along_three_axes(tmp_path):
  workdir = storage.path(trained(tmp_path / 'run', heldout=True, probes=PROBES))
  log = logs.read(workdir, STEPS)
  np.testing.assert_array_equal(log.train.values, losses('calm', 2.5, 0))
  assert log.heldout.steps.tolist() == [STEPS]
  probed = log.curves['probes/gate_mean']
  assert probed.values.tolist() == [9 * 0.25, 0.25]
  assert log.along(probed, 'step').tolist() == [1, STEPS - 2]
  assert log.along(probed, 'tokens').tolist() == [256, 256 * (STEPS - 2)]
  assert log.along(probed, 'hours') == pytest.approx([0.5 / 3600, 99 / 3600])


def test_steps_between_two_records_count_along_tokens_and_hours(tmp_path):
  workdir = storage.path(trained(tmp_path / 'run'))
  path = workdir / 'metrics.jsonl'
  kept = [r for r in records.read(path) if r['step'] % 50 == 0]
  storage.write(path, b''.join(map(records.line, kept)))
  log = logs.read(workdir, STEPS)
  assert log.along(log.train, 'tokens').tolist() == [256 * x for x in (50, 100, 150, 200)]
  assert log.seconds == pytest.approx(0.5 * STEPS)


def test_the_label_of_a_run_is_the_end_of_its_path_that_tells_it_apart(tmp_path):
  names = [trained(tmp_path / name) for name in ('a/gate', 'b/gate')]
  assert list(plot.read(names[:1])) == ['gate']
  assert list(plot.read(names)) == ['a/gate', 'b/gate']
  with pytest.raises(ValueError, match='named twice'):
    plot.read([names[0], names[0] + '/'])


def test_a_folder_that_is_not_a_run_is_refused(tmp_path, capsys):
  assert plot.main([str(tmp_path)]) == 2
  assert f'{tmp_path} is not a run: run.json is missing' in capsys.readouterr().err
  name = trained(tmp_path / 'run')
  storage.write(storage.path(name) / 'metrics.jsonl', b'')
  assert plot.main([name]) == 2
  assert 'has no training step' in capsys.readouterr().err
  assert storage.names(tmp_path / 'run') == ['metrics.jsonl', 'outcome.json', 'run.json']


def test_an_unknown_baseline_and_a_missing_package_are_refused(
  tmp_path, capsys, monkeypatch
):
  pytest.importorskip('matplotlib')
  name = trained(tmp_path / 'gate')
  assert plot.main([name, '--baseline=none']) == 2
  assert '--baseline=none, but the runs are gate' in capsys.readouterr().err
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  report = importlib.import_module('gated.sweep.report')
  for module in ('figures', 'overlay'):
    monkeypatch.delitem(sys.modules, f'gated.sweep.report.{module}', raising=False)
    monkeypatch.delattr(report, module, raising=False)
  assert plot.main([name]) == 2
  assert 'requirements-report.txt' in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_plotted_as_svg_png_and_one_page(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  names = [
    trained(tmp_path / 'plain', seed=0, heldout=True),
    trained(tmp_path / 'gated', kind='partial', seed=1, probes=PROBES),
  ]
  assert plot.main([*names, '--by=tokens', '--baseline=plain']) == 0
  out = tmp_path / 'plain/plots'
  assert capsys.readouterr().out == f'{out}/index.html\n'
  figures = ('indicators', 'loss', 'probes', 'training')
  files = [f'{name}.{kind}' for name in figures for kind in ('png', 'svg')]
  assert storage.names(out) == sorted([*files, 'index.html'])
  page = (out / 'index.html').read_text()
  assert page.count('<img alt=') == 4 and 'src="http' not in page
  assert 'minus the loss of plain' in page and '<td>partial</td>' in page
  assert 'gate mean' in page and 'learning rate' in page
