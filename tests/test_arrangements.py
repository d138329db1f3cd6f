"""A real run over real processes: whatever the arrangement, the losses of one device.

It trains the first half of its steps in one arrangement and goes on from the checkpoint
in another, and every loss is held to a run on one device.
"""

import json
from typing import NamedTuple

import numpy as np
import pytest
from faults import evidence, process

HALF, STEPS = 3, 6

RECIPE = 'configs/moe_15b.py:gate=headwise,scale=test'

KNOBS = {
  'model.depth': 2,
  'optim.schedule': 'constant',  # So that a run may end early and go on.
  'optim.lr': 1e-3,
  'checkpoint.every': HALF,
  'eval.every': STEPS,
  'log.tensorboard': False,
}


class Arrangement(NamedTuple):
  processes: int
  devices: int  # of each process
  mesh: dict


def over(processes, devices=1, **mesh):
  return Arrangement(processes, devices, mesh)


# The first axis of a mesh that is larger than 1 is the one between processes, the last
# the one between the devices of a process.
FIRST, THEN = over(2, 2, fsdp=2, expert=2), over(4, expert=2, context=2)


@pytest.fixture(scope='module')
def train(spawn_python):
  """Trains in an arrangement: (workdir, arrangement, steps)."""

  def run(workdir, arrangement, steps):
    count, devices, sizes = arrangement
    knobs = KNOBS | {'steps': steps, 'mesh.fsdp': 1}
    knobs |= {f'mesh.{axis}': size for axis, size in sizes.items()}
    args = ['train.py', f'--config={RECIPE}', f'--workdir={workdir}']
    args += [f'--config.{knob}={value}' for knob, value in knobs.items()]
    if count > 1:
      where = f'--coordinator=127.0.0.1:{process.free_port()}'
      args += [where, f'--processes={count}']
    which = [[f'--process={i}'] if count > 1 else [] for i in range(count)]
    children = [spawn_python([*args, *flag], devices=devices) for flag in which]
    process.outputs(children, timeout=600)

  return run


# From one process of eight devices to two and back to one: tests/test_train.py.
@pytest.mark.full
def test_a_run_goes_on_in_another_arrangement_with_the_losses_of_one_device(
  train, tmp_path
):
  workdir = tmp_path / 'run'
  train(workdir, FIRST, HALF)
  train(workdir, THEN, STEPS)
  train(tmp_path / 'straight', over(1), STEPS)
  expected, actual = map(evidence.losses, (tmp_path / 'straight', workdir))
  assert [step for step, _ in expected] == list(range(1, STEPS + 1))
  assert [step for step, _ in actual] == [step for step, _ in expected]
  difference = [loss - at_one for (_, loss), (_, at_one) in zip(actual, expected)]
  np.testing.assert_allclose(difference, 0, atol=1e-5)
  sessions = json.loads((workdir / 'run.json').read_text())['sessions']
  assert [s['restored_step'] for s in sessions] == [-1, HALF]
  assert [s['processes'] for s in sessions] == [FIRST.processes, THEN.processes]
