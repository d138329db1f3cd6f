"""Rows of the fault table: long waits, and environments of runs that are compared."""

import json
import shutil
import signal
import time

from faults.rows_e import each
from faults.rows_e_blame import one_line
from faults.world import Outcome, Row, Straight, Tally, World

# 42


def waits(world: World, times: int) -> Outcome:
  return each(world, WAITS[:times])


def _yardsticks(world: World, straight: Straight) -> None:
  """eval.py without yardsticks, with one of them, and with a wrong one"""
  copy = world.path('copy')
  shutil.copytree(straight.workdir, copy)
  command = ['eval.py', f'--workdir={copy}', '--rows=8', '--bigram_rows=64']
  for flag, keys in {'none': set(), 'xz': {'xz'}, 'bigram,xz': {'bigram', 'xz'}}.items():
    done = world.spawn([*command, f'--yardsticks={flag}']).wait().expect(0)
    report = json.loads(done.out.splitlines()[-1])
    for summary in report['domains'].values():
      names = (name for name in summary if name.endswith('_bits_per_byte'))
      assert {name.partition('_')[0] for name in names} == keys, summary
  wrong = world.spawn([*command, '--yardsticks=zip']).wait()
  one_line(wrong, 2, '--yardsticks=zip', 'bigram')


def _building(world: World, _: Straight) -> None:
  """SIGTERM and SIGHUP while the embedded corpus is built leave nothing of it"""
  for number in (signal.SIGTERM, signal.SIGHUP):
    cache = world.path('cache')
    flags = ['--dry_run', f'--config.data.cache={cache}']
    child = world.train(world.path('run'), flags=flags)
    begun = lambda child=child: 'building the embedded corpus' in child.err
    assert child.until(begun), child.err
    time.sleep(1.5)
    child.signal(number)
    done = child.wait(30)
    assert done.code == 128 + number, f'exit code {done.code}: {done.tail()}'
    assert 'Traceback' not in done.err, done.err[-2000:]
    left = {path.name: path.stat().st_size for path in cache.rglob('*')}
    assert not any(left.values()) and len(left) <= 1, f'left in the cache: {left}'


WAITS = (_building, _yardsticks)

# 43

SAME = {
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  'JAX_LOG_COMPILES': '0',
  'JAX_TRACEBACK_FILTERING': 'off',
  'XLA_FLAGS': '--xla_force_host_platform_device_count=1 --xla_dump_hlo_as_text',
  'NCCL_DEBUG': 'WARN',
}
OTHER = {
  'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
  'XLA_FLAGS': (
    '--xla_force_host_platform_device_count=1 --xla_cpu_enable_fast_min_max=true'
  ),
  'NVIDIA_TF32_OVERRIDE': '0',
  'JAX_ENABLE_X64': '1',
}


def environments(world: World, times: int) -> Outcome:
  """Two runs with other variables are comparable, unless one can change numbers."""
  straight, tally = world.straight(), Tally()
  compare = ['scripts/sweep.py', 'compare', straight.workdir]
  for listed, variables in ((False, SAME), (True, OTHER)):
    for name, value in list(variables.items())[:times]:
      with tally.one(f'{name}={value}'):
        workdir = world.path('other')
        world.finish(workdir, env={name: value})
        done = world.spawn([*compare, workdir]).wait()
        # The code of a checkout with changes is not comparable either.
        matters, _, harmless = done.out.partition('differences that change no loss:')
        shown = value.split()[-1].partition('=')[0] if name == 'XLA_FLAGS' else name
        assert shown in (matters if listed else harmless), done.out
        assert shown not in (harmless if listed else matters), done.out
  return tally.outcome()


ROWS_E = [
  Row('42', 'waits that are shortened or ended', waits, 2, 1),
  Row('43', 'environments of two runs that are compared', environments, 9, 0),
]
