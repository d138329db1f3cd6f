"""Collectives of groups of devices, against NumPy on each device's shard."""

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from gated.devices import collectives

WAYS, PART = 8, 8


def run_on_groups(n, run):
  """Runs on 8 devices with inner groups of n -> the shards and each device's result."""
  mesh = small.mesh_of(fsdp=WAYS)
  x = np.arange(WAYS * PART * 2).reshape(WAYS * PART, 2)
  groups = collectives.table_groups(mesh, P(None, 'fsdp'), P('fsdp', None))
  groups = groups.with_inner(n)
  local = lambda x: run(groups, x)[None]
  sharded = jax.shard_map(
    local, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'), check_vma=False
  )
  return x.reshape(WAYS, PART, 2), np.asarray(jax.jit(sharded)(x))


def members(n, level):
  """For each device, the indices along the axis of its group's members, in order."""
  rows = np.arange(WAYS).reshape(-1, n)
  rows = rows if level == 'inner' else rows.T
  return [next(row.tolist() for row in rows if device in row) for device in range(WAYS)]


CASES = [(n, level) for n in (1, 2, 4, 8) for level in ('inner', 'outer')]


@pytest.mark.slow
@pytest.mark.parametrize(('n', 'level'), CASES)
def test_the_collectives_of_a_group_equal_numpy(n, level):
  def run(groups, x):
    group = getattr(groups, level)
    gathered = group.all_gather(x, 0)
    assert len(gathered) == PART * group.size
    swapped = group.all_to_all(x, split=0, join=1)
    return jax.numpy.concatenate(
      [
        group.sum(x),
        group.max(x),
        group.shard(gathered, 0),
        group.reduce_scatter(gathered * (1 + group.index()), 0),
        group.all_to_all(swapped, split=1, join=0),
        swapped.reshape(PART, 2),
        jax.numpy.full((1, 2), group.index()),
      ]
    )

  x, results = run_on_groups(n, run)
  for device, group in enumerate(members(n, level)):
    index, size = group.index(device), len(group)
    rows = slice(index * PART // size, (index + 1) * PART // size)
    expected = [
      x[group].sum(0),
      x[group].max(0),
      x[device],
      x[device] * size * (size + 1) // 2,
      x[device],
      np.concatenate([x[other][rows] for other in group], 1).reshape(PART, 2),
      np.full((1, 2), index),
    ]
    np.testing.assert_array_equal(results[device], np.concatenate(expected))


def test_table_groups_follow_from_the_partition_specs():
  mesh = small.mesh_of(data=2, fsdp=2, tensor=2)
  batch = P(('data', 'fsdp'), None)
  groups = collectives.table_groups(mesh, P('tensor', 'fsdp'), batch)
  axes = lambda group: (group.axes, group.size)
  assert axes(groups.vocab) == (('tensor',), 2)
  assert axes(groups.width) == axes(groups.outer) == (('fsdp',), 2)
  assert axes(groups.tokens) == (('data', 'fsdp'), 4)
  assert axes(groups.replicas) == (('data',), 2)
  assert groups.inner == collectives.ALONE
  assert groups.with_inner(2).inner == groups.width
  assert groups.with_inner(2).outer == collectives.ALONE


def test_the_sizes_of_subgroups_divide_the_size_of_the_group():
  assert collectives.Group(('fsdp',), 12).sizes() == [1, 2, 3, 4, 6, 12]
