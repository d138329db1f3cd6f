"""Injects a few of the faults of `make faults`."""

import pytest
from faults import table, world

ROWS = [row for row in table.rows() if row.few]


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
  with world.World(tmp_path_factory.mktemp('faults')) as bench:
    yield bench


@pytest.mark.full
@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.number)
def test_a_run_survives(row, bench):
  with bench.row(row.number) as space:
    try:
      outcome = row.run(space, row.few)
    except world.Skip as reason:
      pytest.skip(str(reason))
  assert outcome.lost == 'nothing'
  assert outcome.survived == outcome.injected > 0


@pytest.mark.full
def test_the_check_detects_differences_from_the_straight_run(bench):
  """Another seed, different bits at a step, a leftover file."""
  straight, other = bench.straight(), bench.straight(seed=1)
  bench.check(straight.workdir, straight)
  with pytest.raises(AssertionError, match='24 train records'):
    bench.check(other.workdir, straight)
  alike = straight._replace(losses=other.losses, heldout=other.heldout)
  with pytest.raises(AssertionError, match='different bits at step 24'):
    bench.check(other.workdir, alike)
  (other.workdir / 'checkpoints/4.orbax-checkpoint-tmp').mkdir()
  with pytest.raises(AssertionError, match='left behind'):
    bench.check(other.workdir, other)
