"""The row of what is done to the code, rather than to a run."""

from faults import mutations
from faults.world import Outcome, Row, Tally, World


def broken_code(world: World, times: int) -> Outcome:
  """The suite survives a mutation by not passing with it."""
  tally = Tally()
  for mutation in mutations.MUTATIONS[:times]:
    with tally.one(mutation.what):
      assert mutations.red(mutation), 'no test failed'
  return tally.outcome()


ROWS_C = [
  Row('25', 'the code broken: a test turns red', broken_code, len(mutations.MUTATIONS), 0)
]
