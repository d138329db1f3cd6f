"""The mesh has the sizes asked for, and every array the place its axes say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from gated import model
from gated.devices import mesh

ONES = dict(data=1, fsdp=1, expert=1, tensor=1, context=1)


def make(**sizes):
  return mesh.make(**(ONES | sizes))


def test_minus_one_is_all_the_devices_left():
  assert dict(make(fsdp=-1).shape) == ONES | {'fsdp': 8}
  assert dict(make(data=2, tensor=2, context=-1).shape) == ONES | {
    'data': 2,
    'tensor': 2,
    'context': 2,
  }
  assert dict(mesh.make(**ONES | {'fsdp': -1}, devices=jax.devices()[:2]).shape) == (
    ONES | {'fsdp': 2}
  )


def test_every_axis_is_left_to_the_partitioner():
  assert set(make(fsdp=8).axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(fsdp=4), r'^8 devices are available, but config\.mesh\.fsdp=4 needs exactly 4'),
    (
      dict(fsdp=16),
      r'^8 devices are .*config\.mesh\.fsdp=16 needs exactly 16',
    ),
    (dict(data=3, fsdp=-1), r'^8 devices .*config\.mesh\.data=3 needs a multiple of 3'),
    (dict(), r'^8 devices are available, but config\.mesh with only axes of 1 needs'),
    (dict(fsdp=-1, tensor=-1), r'config\.mesh\.fsdp and \.tensor are -1'),
    (dict(tensor=0), r'config\.mesh\.tensor=0'),
    (dict(context=-2), r'config\.mesh\.context=-2'),
  ],
)
def test_sizes_that_do_not_make_the_devices_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    make(**sizes)


@dataclasses.dataclass(frozen=True)
class Device:
  """One of a slice, as far as a mesh looks at it."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def slices(count, size):
  """The devices of some slices, as they come from a cluster: in no order."""
  each = [Device(i, i // size, i // size) for i in range(count * size)]
  return [each[i] for i in np.random.default_rng(0).permutation(count * size)]


def crossing(on):
  """The axes along which a mesh goes from slice to slice."""
  slice_of = np.vectorize(lambda device: device.slice_index)(on.devices)
  return [a for i, a in enumerate(mesh.AXES) if np.diff(slice_of, axis=i).any()]


ACROSS = [
  (dict(data=2, fsdp=4), ['data']),
  (dict(data=4, context=2), ['data']),
  (dict(fsdp=8), ['fsdp']),
  (dict(fsdp=2, expert=4), ['fsdp']),
  (dict(data=-1, expert=2, tensor=2), ['data']),
  (dict(fsdp=2, tensor=2, context=2), ['fsdp']),
]


@pytest.mark.parametrize(('sizes', 'axes'), ACROSS)
def test_between_slices_lies_data_or_else_fsdp(sizes, axes):
  on = mesh.make(**ONES | sizes, devices=slices(2, 4))
  assert crossing(on) == axes
  assert sorted(device.id for device in on.devices.flat) == list(range(8))
  # Data splits into two, and fsdp into the slices.
  assert crossing(mesh.make(**ONES | {'fsdp': 6, 'data': 2}, devices=slices(3, 4))) == [
    'fsdp'
  ]


def test_machines_of_gpus_are_no_slices():
  gpus = [Device(i, i // 4, i // 4, 'gpu') for i in range(8)]
  on = mesh.make(**ONES | dict(expert=2, context=4), devices=gpus)
  assert crossing(on) == ['expert']
  assert crossing(mesh.make(**ONES | {'expert': 8}, devices=gpus)) == ['expert']


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(tensor=8), r'config\.mesh\.data=1 or config\.mesh\.fsdp=1 must be .* 2 slices'),
    (dict(expert=8), 'no other axis may cross'),
    (dict(context=4, expert=2), 'no other axis may cross'),
  ],
)
def test_no_other_axis_may_cross_slices(sizes, message):
  with pytest.raises(ValueError, match=message):
    mesh.make(**ONES | sizes, devices=slices(2, 4))


# Two slices of four chips each -> the slice of each chip on each mesh.
SLICES = """
import json, sys
from jax.experimental import topologies
from gated.devices import mesh
how = dict(platform='tpu', topology_name=sys.argv[1], num_slices=2)
devices = topologies.get_topology_desc(**how).devices
for sizes in json.loads(sys.argv[2]):
  on = mesh.make(**sizes, devices=devices)
  assert set(on.devices.flat) == set(devices)
  print(json.dumps([device.slice_index for device in on.devices.flat]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v6e:2x2'])
def test_between_slices_of_tpus_lies_data_or_else_fsdp(topology, run_for_tpu):
  asked = json.dumps([ONES | sizes for sizes, _ in ACROSS])
  done = run_for_tpu(['-c', SLICES, topology, asked])
  assert done.returncode == 0, done.stderr[-3000:]
  # Data and fsdp are the outer axes: the first half of a mesh is of one slice.
  for line in done.stdout.splitlines()[-len(ACROSS) :]:
    assert json.loads(line) in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_an_axis_of_size_one_carries_no_name():
  on = make(fsdp=2, tensor=4)
  assert mesh.spec(('batch', 'tokens'), on) == P('fsdp', None)
  assert mesh.spec(('embed', 'heads', 'head_dim'), on) == P('fsdp', 'tensor', None)
  both = make(data=2, fsdp=2, context=2)
  assert mesh.spec(('batch', 'tokens', None), both) == P(
    ('data', 'fsdp'), 'context', None
  )
  assert mesh.spec(('layers', 'vocab'), both) == P(None, None)


def test_a_size_that_the_mesh_cannot_split_is_refused_by_its_knob():
  on = make(data=2, fsdp=4)
  mesh.check('batch', 16, on)
  message = r'config\.batch=12 .* config\.mesh\.data=2 \* config\.mesh\.fsdp=4'
  with pytest.raises(ValueError, match=message):
    mesh.check('batch', 12, on)


def test_every_parameter_is_split_as_its_axes_say():
  on = make(fsdp=2, tensor=2, context=2)
  gate = dict(attn__gate__position='sdpa')
  shapes = model.abstract(small.model_config(tied=False, attn__bias=True, **gate))
  split = mesh.shardings(shapes, on)
  specs = {
    'table': split.embed.table.spec,
    'query': split.blocks.attn.query.weight.spec,
    'query bias': split.blocks.attn.query.bias.spec,
    'key': split.blocks.attn.key.weight.spec,
    'out': split.blocks.attn.out.weight.spec,
    'gate': split.blocks.attn.gate.weight.spec,
    'down': split.blocks.ffn.down.weight.spec,
    'norm': split.blocks.attn_norm.scale.spec,
  }
  assert specs == {
    'table': P('tensor', 'fsdp'),
    'query': P(None, 'fsdp', 'tensor', None),
    'query bias': P(None, 'tensor', None),
    'key': P(None, 'fsdp', 'tensor', None),
    'out': P(None, 'tensor', None, 'fsdp'),
    'gate': P(None, 'fsdp', 'tensor', None),
    'down': P(None, 'tensor', 'fsdp'),
    'norm': P(None, None),
  }


def test_a_leaf_that_is_no_parameter_lies_on_all_devices():
  split = mesh.shardings({'count': jax.ShapeDtypeStruct((), np.int32)}, make(fsdp=8))
  assert split['count'].spec == P()


def test_a_parameter_that_does_not_split_is_refused():
  with pytest.raises(
    ValueError, match=r'config\.model\.width=12 .* config\.mesh\.fsdp=8'
  ):
    mesh.shardings(model.abstract(small.model_config(width=12)), make(fsdp=8))


@pytest.mark.parametrize('sizes', [dict(fsdp=8), dict(data=2, fsdp=2, context=2)])
def test_place_puts_the_rows_of_a_batch_where_they_belong(sizes):
  on = make(**sizes)
  assert mesh.rows(on, 8) == tuple(range(8))
  local = {'x': np.arange(8 * 6).reshape(8, 6)}
  placed = mesh.place(local, on, 8)['x']
  np.testing.assert_array_equal(placed, local['x'])
  assert placed.sharding == mesh.batch_sharding(on)
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, local['x'][shard.index])


def test_place_takes_only_the_rows_that_this_process_holds():
  """As on the second of two hosts: it has rows 4 to 7, and must not want the others."""
  on = make(fsdp=8)

  class Second:
    def addressable_devices_indices_map(self, shape):
      return {
        d: (slice(i, i + 1), slice(0, shape[1])) for i, d in enumerate(range(4, 8), 4)
      }

  whole = mesh.batch_sharding
  try:
    mesh.batch_sharding = lambda _: Second()
    assert mesh.rows(on, 8) == (4, 5, 6, 7)
  finally:
    mesh.batch_sharding = whole


def test_constrain_does_nothing_without_a_mesh_and_splits_with_one():
  x = jnp.ones((8, 16))
  assert mesh.constrain(x, 'batch', 'tokens') is x
  on = make(fsdp=4, context=2)
  with jax.set_mesh(on):
    y = jax.jit(lambda x: mesh.constrain(x, 'batch', 'tokens'))(x)
  assert y.sharding.shard_shape(y.shape) == (2, 8)
