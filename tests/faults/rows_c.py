"""The row of the fault table that breaks the code."""

from faults import mutations
from faults.world import Outcome, Row, Tally, World


def broken_code(world: World, times: int) -> Outcome:
  """The suite survives a mutation if a test fails."""
  tally = Tally()
  for mutation in mutations.MUTATIONS[:times]:
    with tally.one(mutation.change):
      assert mutations.failing_test(mutation), 'no test failed'
  return tally.outcome()


ROWS_C = [
  Row('25', 'broken code: a test fails', broken_code, len(mutations.MUTATIONS), 0)
]
