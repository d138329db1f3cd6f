"""experiments/long/run.py: its commands are accepted, and only missing ones run again."""

import argparse
import csv
import json

import pytest

from experiments.long import run


def arguments(out, scale, start=()):
  paths = dict(out=str(out), library=str(out), text='', long='')
  return argparse.Namespace(scale=scale, start=start, **paths)


@pytest.mark.slow
def test_eval_accepts_every_command_but_for_its_missing_run(tmp_path, run_python):
  """A refused flag was found on a rented GPU, after the training."""
  commands = run.evaluations(arguments(tmp_path, 'proxy'))
  for name, command in commands.items():
    done = run_python(command)
    assert done.returncode == 2, name
    assert done.stderr.startswith(f'eval.py: --workdir={tmp_path}/'), (name, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('stage', 'arm'), [('start', 'baseline'), ('extend', 'elementwise')]
)
def test_train_accepts_every_command(stage, arm, tmp_path, run_python):
  command = run.training(arguments(tmp_path, 'test'), arm, stage)
  done = run_python([*command, '--print_config'])
  assert done.returncode == 0 and f'long-context-{arm}' in done.stdout, done.stderr


def test_models_that_were_trained_before_are_continued(tmp_path):
  args = arguments(tmp_path, 'test', start=['/before/a', '/before/b'])
  for arm, folder in zip(run.ARMS, args.start, strict=True):
    assert f'--config.init_from={folder}' in run.training(args, arm, 'extend')
    assert any(folder in word for word in run.evaluations(args)['probes'])
    assert not any(folder in word for word in run.evaluations(args)['ruler'])


def test_each_arm_trains_on_half_of_the_gpus():
  assert run.halves([]) == [''] and run.halves(['3']) == ['3']
  assert run.halves(['0', '1']) == ['0', '1']
  assert run.halves(['0', '1', '2', '3']) == ['0,1', '2,3']


def test_two_commands_at_a_time_share_a_gpu_and_its_memory(tmp_path):
  work, both = run.Work(tmp_path, ['a'], 2), tmp_path / 'both'
  # Each waits for the other, so they end only if they run together.
  wait = f"""
import os, pathlib, sys, time
print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'], os.environ['CUDA_VISIBLE_DEVICES'])
names = [pathlib.Path({str(both)!r} + name) for name in 'xy']
names['xy'.index(sys.argv[1])].touch()
end = time.monotonic() + 60
while not all(name.exists() for name in names):
  assert time.monotonic() < end
  time.sleep(0.02)
"""
  assert work.all({name: ['-c', wait, name] for name in 'xy'})
  assert {(tmp_path / f'{n}.txt').read_text() for n in 'xy'} == {'0.4 a\n'}


def test_a_command_runs_once_and_a_failed_one_again(tmp_path, capsys):
  work = run.Work(tmp_path, ['a', 'b'], 1)
  show = ['-c', 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])']
  assert work.all({'one': show, 'two': show})
  assert {(tmp_path / f'{n}.txt').read_text() for n in ('one', 'two')} <= {'a\n', 'b\n'}
  assert not work.all({'one': ['-c', 'raise SystemExit(3)'], 'three': ['-c', '1 / 0']})
  printed = capsys.readouterr().out
  assert 'one: done before' in printed and 'three: exit code 1' in printed
  assert 'ZeroDivisionError' in (tmp_path / 'three.failed').read_text()
  assert work.run('three', show) and not (tmp_path / 'three.failed').exists()


def test_the_summary_has_the_numbers_of_all_reports(tmp_path):
  def long(label, nats, gain):
    distance = {'nats_per_token': 1.5, 'gain': gain, 'gain_stderr': 0.1}
    positions = {'nats_per_token': nats, 'tokens': [2] * 64 + [1] * 36}
    about = {'label': label, 'length': 100, 'positions': positions}
    return about | {'copying': {'distances': {'64': distance}}}

  options = {'options': {'yarn': '4'}}
  gate = options | long('extend-elementwise', [1.0] * 32 + [3.0] * 32 + [4.0] * 36, 0.5)
  plain = long('extend-baseline', [5.0] * 99 + [None], 0.25)
  task = lambda loss: {'loss': loss, 'loss_stderr': 0.5, 'rank': 7.0}
  mean = lambda loss: {'vt': task(loss), 'mean': {'loss': loss, 'rank': 7.0}}
  ruler = {'yarn': '4', 'lengths': {'1024': mean(1.0), '4096': None}}
  ruler |= {'beside': {'extend-baseline yarn=4': {'lengths': {'4096': mean(2.0)}}}}
  for name, report in (('a', gate | {'beside': {'other baseline': plain}}), ('b', ruler)):
    (tmp_path / f'extend-{name}.json').write_text(json.dumps(report))
  run.summarize(tmp_path)
  rows = [*csv.reader((tmp_path / 'summary.csv').read_text().splitlines())]
  assert rows[0] == [*run.COLUMNS]
  at = lambda measure, end, arm, *rest: [measure, '100', '4', end, arm, *rest]
  assert rows[1:] == [
    at('position', '64', 'elementwise', '2.0000', '', ''),
    at('position', '100', 'elementwise', '4.0000', '', ''),
    at('copy', '64', 'elementwise', '1.5000', '', ''),
    at('copy gain', '64', 'elementwise', '0.5000', '0.1000', ''),
    at('position', '64', 'baseline', '5.0000', '', ''),
    at('position', '100', 'baseline', '4.8611', '', ''),
    at('copy', '64', 'baseline', '1.5000', '', ''),
    at('copy gain', '64', 'baseline', '0.2500', '0.1000', ''),
    ['ruler', '1024', '', 'vt', 'elementwise', '1.0000', '0.5000', '7.0000'],
    ['ruler', '1024', '', 'mean', 'elementwise', '1.0000', '', '7.0000'],
    ['ruler', '4096', '4', 'vt', 'baseline', '2.0000', '0.5000', '7.0000'],
    ['ruler', '4096', '4', 'mean', 'baseline', '2.0000', '', '7.0000'],
  ]
