"""Rows of the fault table: tests of the suite, and the memory of a long run."""

import re
from collections.abc import Callable
from pathlib import Path

from faults import evidence
from faults.process import Child
from faults.world import Outcome, Row, Tally, World

# 20, 23 and 28

PROPERTIES = (
  'data/test_prepare_data.py::test_rows_have_every_token_as_a_target_once',
  'data/test_prepare_data.py::test_batches_mask_targets_in_another_document',
  'data/test_prepare_data.py::test_any_number_of_processes_gives_the_same_bytes',
  'data/test_data.py::test_every_window_of_a_mixture_holds_its_weights_exactly',
  'data/test_data.py::test_every_epoch_has_every_row_once_in_a_different_order',
  'data/test_data.py::test_a_late_start_gives_the_batches_of_an_early_start',
  'data/test_data.py::test_the_batches_of_all_hosts_form_the_batch_of_one_host',
  'train/test_optim.py::test_a_schedule_warms_up_linearly_and_ends_at_its_floor',
  'train/test_optim.py::test_a_run_may_end_within_its_warmup',
  'devices/test_mesh.py::test_every_parameter_is_split_as_its_axes_say',
)


def tests(*names: str) -> Callable[[World, int], Outcome]:
  """Names of tests -> a row's function, which runs and counts them in a process."""

  def run(world: World, times: int) -> Outcome:
    args = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-rfE']
    child = world.spawn([*args, *(f'tests/{name}' for name in names)])
    done = child.wait(900)
    total = done.out.splitlines()[-1] if done.out else done.tail()
    counts = {word.rstrip('s'): int(n) for n, word in re.findall(r'(\d+) (\w+)', total)}
    passed = counts.get('passed', 0)
    lost = counts.get('failed', 0) + counts.get('error', 0)
    failures = re.findall(r'(?m)^(?:FAILED|ERROR) (\S+)', done.out)
    finished = done.code == 0 or lost
    assert finished and passed + lost >= times, f'exit code {done.code}: {done.tail()}'
    return Outcome(passed + lost, passed, ', '.join(failures) or 'nothing')

  return run


# 26

LONG = dict(
  steps=600,
  checkpoint__every=15,
  eval__every=600,
  eval__rows=1,
  model__width=32,
  model__ffn=64,
  model__depth=1,
  data__length=64,
)
WARM = 150  # Steps, with ten saves, until malloc has an arena for every thread.


def memory(world: World, times: int) -> Outcome:
  tally = Tally()
  for _ in range(times):
    workdir = world.path('long')
    with tally.one('600 steps and 40 saves'):
      child = world.train(workdir, **LONG)
      grown, first, last = _growth(child, workdir)
      child.wait().expect(0)
      message = f'{first:.0f} MiB after {WARM} steps, {last:.0f} MiB at the end'
      print(f'memory: {message}', flush=True)
      assert grown < 30 or grown < 0.05 * first, message
  return tally.outcome()


def _growth(child: Child, workdir: Path) -> tuple[float, float, float]:
  """-> the growth of a run in MiB, its size after the warm-up, and at the end."""
  sizes: list[tuple[int, float]] = []

  def sample() -> bool:
    step = evidence.last_step(workdir)
    if step >= WARM and child.lives():
      lines = Path(f'/proc/{child.pid}/status').read_text().splitlines()
      sizes.extend((step, int(x.split()[1]) / 1024) for x in lines if 'VmRSS' in x)
    return False

  child.until(sample)
  early = [size for step, size in sizes if step < WARM + 100]
  late = [size for step, size in sizes if step >= LONG['steps'] - 100]
  assert early and late, f'too few samples: {sizes}'
  first, last = min(early), min(late)  # The minimum ignores temporary memory.
  return last - first, first, last


ROWS_B = [
  Row(
    '20', 'crafted tokenizers, data, exports, recipes', tests('test_crafted.py'), 100, 0
  ),
  Row('23', 'golden losses and recipes', tests('test_golden.py'), 10, 0),
  Row('26', 'host memory over 600 steps and 40 saves', memory, 1, 0),
  Row('28', 'properties of packing, mixing, schedules', tests(*PROPERTIES), 10, 0),
]
