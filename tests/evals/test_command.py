"""eval.py: models side by side, in one table, one report and one figure."""

import json
import shutil
from pathlib import Path

import pytest
from faults import world
from test_train import command, ok

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def run(tmp_path_factory, run_python):
  """A workdir of two steps."""
  workdir = tmp_path_factory.mktemp('command') / 'run'
  ok(run_python(command(workdir, steps=2)))
  return workdir


@pytest.mark.full
def test_losses_of_forced_gates_and_another_run_by_position(run, run_python):
  pytest.importorskip('matplotlib')
  other = run.parent / 'other'
  shutil.copytree(run, other)
  flags = ['--rows=4', '--by_position', '--figures', '--xz_bytes=999']
  flags += [f'--beside={other}', '--force_gates=0.5@0-1']
  done = run_python(['eval.py', f'--workdir={run}', *flags])
  assert done.returncode == 0, done.stderr[-3000:]
  *table, last = done.stdout.splitlines()
  report = json.loads(last)
  assert report == json.loads((run / 'eval/2.json').read_text())
  labels = ['code', 'code, gates 0.5@0-1', 'code, other']
  assert [line.split('  ')[0] for line in table[1:4]] == labels
  forced, same = (report['beside'][name] for name in ('gates 0.5@0-1', 'other'))
  assert same['loss'] == report['loss'] != forced['loss']
  for each in (report, forced, same):
    curve = each['positions']
    pairs = [(x, n) for x, n in zip(curve['nats_per_token'], curve['tokens']) if n]
    mean = sum(x * n for x, n in pairs) / sum(n for _, n in pairs)
    assert mean == pytest.approx(each['loss'], rel=1e-6)
    assert curve['position_in'] == 'document' and len(curve['tokens']) <= 64
  for name in ('positions', 'domains'):
    assert (run / f'eval/2-{name}.svg').stat().st_size > 1000


@pytest.mark.full
def test_probes_of_forced_gates_are_drawn_beside_the_run(run, run_python):
  pytest.importorskip('matplotlib')
  flags = ['--probe', '--rows=2', '--figures', '--force_gates=mean']
  done = run_python(['eval.py', f'--workdir={run}', *flags])
  assert done.returncode == 0, done.stderr[-3000:]
  report = json.loads((run / 'probes/2.json').read_text())
  [(label, forced)] = report['beside'].items()
  assert label == 'gates mean' and forced['loss']['value'] != report['loss']['value']
  assert len([line for line in done.stdout.splitlines() if line.endswith(label)]) == 3
  assert label in (run / 'probes/2-sinks.svg').read_text()


@pytest.mark.full
def test_long_rows_of_domains_with_yarn_streaming_and_copying(run, run_python):
  pytest.importorskip('matplotlib')
  text = run.parent / 'text.md'
  text.write_text((ROOT / 'docs/evaluation.md').read_text()[:5000])
  flags = [f'--domain=docs={text}', f'--domain=command={__file__}', '--length=256']
  flags += ['--copying=32,128', '--yarn=4', '--by_position']
  done = run_python(['eval.py', f'--workdir={run}', *flags])
  assert done.returncode == 0, done.stderr[-3000:]
  report = json.loads(done.stdout.splitlines()[-1])
  [stored] = (run / 'evals').glob('2-yarn=4-long-*.json')
  assert json.loads(stored.read_text()) == report
  assert [*report['domains']] == ['docs', 'command'] and report['stride'] == 128
  assert report['domains']['docs']['tokens'] == len(text.read_text().encode()) - 1
  assert len(report['positions']['tokens']) == 256
  assert report['exp_of_mean_loss'] <= report['mean_of_perplexities']
  assert [*report['copying']['distances']] == ['32', '128']
  flags = [f'--domain=docs={text}', '--length=512', '--streaming=12:0,8:4']
  flags += ['--by_position', '--figures']
  done = run_python(['eval.py', f'--workdir={run}', *flags])
  assert done.returncode == 0, done.stderr[-3000:]
  report = json.loads(done.stdout.splitlines()[-1])
  assert report['label'] == 'run 12:0' and [*report['beside']] == ['run 8:4']
  for name in ('positions', 'domains'):
    [figure] = (run / 'evals').glob(f'2-long-*-{name}.svg')
    assert figure.stat().st_size > 1000


REFUSED = [
  (['--domain=a=nowhere'], '--domain=a=nowhere: '),
  (['--copying=64'], '--copying=64, but RoPE is prepared for 64 tokens: --yarn='),
  (['--domain=a=eval.py', '--probe'], '--probe=True is not allowed with --domain'),
  (['--stride=4'], '--stride=4 is not allowed without --domain or --copying'),
  (['--yarn=0.5'], '--yarn=0.5: config.model.attn.yarn.factor=0.5'),
  (['--force_gates=open@7'], "--force_gates='open@7': layers='7', but the model has"),
  (['--copying=64', '--figures'], '--figures=True needs --domain'),
  (['--tasks=arc_easy', '--figures'], '--figures=True is not allowed with --tasks'),
  (['--text=x'], '--text=x is not allowed without --probe'),
  (['--probe', '--by_position'], '--by_position=True is not allowed with --probe'),
  (['--prompt=a', '--force_gates=open'], "--force_gates='open' is not allowed with"),
]


@pytest.mark.full
def test_flags_that_do_not_fit_are_refused_by_name(run, tmp_path):
  commands = [['eval.py', f'--workdir={run}', *flags] for flags, _ in REFUSED]
  with world.World(tmp_path) as bench:
    ended = bench.many(commands)
  for (_, message), done in zip(REFUSED, ended, strict=True):
    assert done.code == 2 and message in done.err, done.err
    assert 'Traceback' not in done.err
