"""Teams of devices, against NumPy on what each of them holds."""

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from gated.devices import teams

WAYS, PART = 8, 8


def on_teams(n, run):
  """Runs on 8 devices in teams of n -> each one's result for its part of 0 .. 8 * 8."""
  on = small.mesh_of(fsdp=WAYS)
  x = np.arange(WAYS * PART * 2).reshape(WAYS * PART, 2)
  devices = teams.sharing(on, P(None, 'fsdp'), P('fsdp', None)).by(n)
  local = lambda x: run(devices, x)[None]
  sharded = jax.shard_map(
    local, mesh=on, in_specs=P('fsdp'), out_specs=P('fsdp'), check_vma=False
  )
  return x.reshape(WAYS, PART, 2), np.asarray(small.jit(sharded)(x))


def members(n, side):
  """Of each device the team, in its order, as places along the axis."""
  rows = np.arange(WAYS).reshape(-1, n)
  rows = rows if side == 'near' else rows.T
  return [next(row.tolist() for row in rows if place in row) for place in range(WAYS)]


CASES = [(n, side) for n in (1, 2, 4, 8) for side in ('near', 'far')]


@pytest.mark.parametrize(('n', 'side'), CASES)
def test_a_team_passes_on_what_numpy_would(n, side):
  def run(devices, x):
    team = getattr(devices, side)
    gathered = team.gather(x, 0)
    assert len(gathered) == PART * team.size
    return jax.numpy.concatenate(
      [
        team.sum(x),
        team.max(x),
        team.own(gathered, 0),
        team.scatter(gathered * (1 + team.place()), 0),
        team.exchange(team.exchange(x, split=0, join=1), split=1, join=0),
        team.exchange(x, split=0, join=1).reshape(PART, 2),
        jax.numpy.full((1, 2), team.place()),
      ]
    )

  x, found = on_teams(n, run)
  for place, team in enumerate(members(n, side)):
    here, size = team.index(place), len(team)
    rows = slice(here * PART // size, (here + 1) * PART // size)
    expected = [
      x[team].sum(0),
      x[team].max(0),
      x[place],
      x[place] * size * (size + 1) // 2,
      x[place],
      np.concatenate([x[other][rows] for other in team], 1).reshape(PART, 2),
      np.full((1, 2), here),
    ]
    np.testing.assert_array_equal(found[place], np.concatenate(expected))


def test_a_sharing_knows_who_splits_what():
  on = small.mesh_of(data=2, fsdp=2, tensor=2)
  batch = P(('data', 'fsdp'), None)
  devices = teams.sharing(on, P('tensor', 'fsdp'), batch)
  axes = lambda team: (team.axes, team.size)
  assert axes(devices.vocab) == (('tensor',), 2)
  assert axes(devices.width) == axes(devices.far) == (('fsdp',), 2)
  assert axes(devices.tokens) == (('data', 'fsdp'), 4)
  assert axes(devices.rest) == (('data',), 2)
  assert devices.near == teams.ALONE
  assert devices.by(2).near == devices.width
  assert devices.by(2).far == teams.ALONE


def test_the_sizes_of_teams_divide_their_team():
  assert teams.Team(('fsdp',), 12).sizes() == [1, 2, 3, 4, 6, 12]
