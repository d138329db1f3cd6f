"""experiments/long/run.py: its commands are accepted, and only missing ones run again."""

import argparse

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
