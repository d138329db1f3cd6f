"""The device mesh, and one table from logical axes of arrays to mesh axes.

The five mesh axes have type Auto: `jax.jit` with `NamedSharding`, and XLA's partitioner
does the rest. Specs omit mesh axes of size 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gated import config

AXES = ('data', 'fsdp', 'expert', 'tensor', 'context')

# The logical axis of a parameter or an activation -> the mesh axes that shard it.
RULES: dict[str | None, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'tokens': ('context',),
  'vocab': ('tensor',),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'channels': (),
  'ffn': ('tensor',),
  'experts': ('expert',),
  'layers': (),
  # Stacked layers with whole matrices, for the optimizer (gated/train/optim.py).
  'stack': ('fsdp',),
  'stacks': ('fsdp', 'tensor'),
  None: (),
}

# The knob that sets an axis's size, for error messages.
KNOBS = {
  'batch': 'config.batch',
  'tokens': 'config.data.length',
  'vocab': 'config.model.vocab',
  'embed': 'config.model.width',
  'heads': 'config.model.attn.heads',
  'kv_heads': 'config.model.attn.kv_heads',
  'ffn': 'config.model.ffn',
  'experts': 'config.model.moe.experts',
}


@dataclass(frozen=True, kw_only=True)
class Config:
  """The sizes of the mesh's axes; -1 for the remaining devices."""

  choice: str  # hand, or auto
  data: int
  fsdp: int
  expert: int
  tensor: int
  context: int

  def __post_init__(self):
    config.one_of('config.mesh.choice', self.choice, ('hand', 'auto'))

  @property
  def sizes(self) -> dict[str, int]:
    return {axis: getattr(self, axis) for axis in AXES}


def make(
  *, data: int, fsdp: int, expert: int, tensor: int, context: int, devices=None
) -> Mesh:
  """The sizes of the five axes -> the mesh; one may be -1 for the remaining devices.

  Raises ValueError unless the sizes multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, expert, tensor, context)))
  placed = _arranged(filled(sizes, len(devices)), list(devices))
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def filled(requested: Mapping[str, int], count: int) -> dict[str, int]:
  """Sizes, one of which may be -1, and the number of devices -> the complete sizes.

  Raises ValueError unless they multiply to the number of devices.
  """
  sizes = dict(requested)
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f'config.mesh.{axis}={size}, but it must be positive, or -1')
  rest = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(rest) > 1:
    raise ValueError(f'config.mesh.{rest[0]} and .{rest[1]} are -1, but only one may be')
  if rest and count % known == 0:
    sizes[rest[0]] = count // known
  if math.prod(sizes.values()) != count:
    have = '1 device is' if count == 1 else f'{count} devices are'
    fixed = {axis: size for axis, size in requested.items() if size not in (1, -1)}
    knobs = ' * '.join(f'config.mesh.{axis}={size}' for axis, size in fixed.items())
    need = 'a multiple of ' if rest else 'exactly '
    raise ValueError(
      f'{have} available, but {knobs or "config.mesh with only axes of 1"} needs '
      f'{need}{known}'
    )
  return sizes


def slices(devices: Sequence[Any]) -> int:
  """The number of slices of the devices; for GPUs, the number of machines."""
  return len({getattr(device, 'slice_index', None) for device in devices})


def crossing(sizes: Mapping[str, int], count: int) -> str | None:
  """The axis that crosses the slow network between `count` slices; None for one slice.

  Raises ValueError if the slices divide neither `data` nor `fsdp`.
  """
  if count == 1:
    return None
  for axis in ('data', 'fsdp'):
    if sizes[axis] % count == 0:
      return axis
  raise ValueError(
    f'config.mesh.data={sizes["data"]} or config.mesh.fsdp={sizes["fsdp"]} must be a '
    f'multiple of the {count} slices, whose slow network no other axis may cross'
  )


def _arranged(sizes: dict[str, int], devices: list) -> np.ndarray:
  """Devices -> an array with the five axes, which keeps the busiest axes on fast links.

  The network between slices is slow: only `data` crosses it, or `fsdp` if the slices do
  not divide `data`. JAX calls each machine with GPUs a slice; GPUs keep their order,
  which puts the last axes within a machine as far as they fit.
  """
  shape = tuple(sizes.values())
  count = 1 if devices[0].platform == 'gpu' else slices(devices)
  if count == 1:
    return _along_links(shape, devices)
  outer = crossing(sizes, count)
  across = tuple(count if axis == outer else 1 for axis in AXES)
  within = tuple(n // m for n, m in zip(shape, across))
  split = dict(allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)


def _along_links(shape: tuple[int, ...], devices: list) -> np.ndarray:
  """Devices of one slice -> an array, along whole rings of the torus if they fit."""
  try:
    return mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def platform() -> str:
  """The platform that code is traced for: the mesh's, or else this machine's.

  They differ if a program is compiled for another machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def current() -> Any:
  """The abstract mesh in use; None without one, or with a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def spec(axes: Sequence[str | None], mesh) -> P:
  """Logical axes of an array -> its PartitionSpec; mesh axes of size 1 are left out."""
  names = [tuple(m for m in RULES[axis] if mesh.shape[m] > 1) for axis in axes]
  return P(*(n[0] if len(n) == 1 else (n or None) for n in names))


def ways(axis: str, mesh: Any = None) -> int:
  """A logical axis -> the number of parts that the mesh splits it into.

  The default is the mesh in use; without one, the axis is whole.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return 1 if mesh.empty else math.prod(mesh.shape[m] for m in RULES[axis])


def check(axis: str, size: int, mesh: Mesh) -> None:
  """Raises ValueError, naming the knobs, unless the mesh splits `size` evenly."""
  if size % ways(axis, mesh):
    split = ' * '.join(f'config.mesh.{m}={mesh.shape[m]}' for m in RULES[axis])
    raise ValueError(f'{KNOBS.get(axis, axis)}={size} must be a multiple of {split}')


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
  """A parameter -> its logical axes; a leading dim without a name stacks the layers."""
  axes = variable.get_metadata()['axes']
  return ('layers',) * (len(variable.shape) - len(axes)) + tuple(axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A tree with parameters -> a prefix of it with a NamedSharding for each.

  Parameters are sharded by their axes; all other leaves are replicated. Raises ValueError
  if an axis does not split evenly.
  """

  def sharding(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    for axis, size in zip(axes_of(leaf), leaf.shape):
      if axis is not None:
        check(axis, size, mesh)
    return NamedSharding(mesh, spec(axes_of(leaf), mesh))

  return jax.tree.map(sharding, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Shards `x` by its logical axes; without a mesh, returns it unchanged."""
  mesh = current()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch of shape (B, T)."""
  return NamedSharding(mesh, spec(('batch', 'tokens'), mesh))


def rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
  """The rows of a global batch on this process's devices, in ascending order."""
  shape = batch, ways('tokens', mesh)
  held = batch_sharding(mesh).addressable_devices_indices_map(shape)
  return tuple(sorted({r for ix in held.values() if ix for r in range(batch)[ix[0]]}))


def place(local: Any, mesh: Mesh, batch: int) -> Any:
  """This process's rows of a global batch -> the same tree of global arrays (B, T).

  Each leaf of `local` is a NumPy array whose leading dim runs over `rows(mesh, batch)`.
  """
  held = np.asarray(rows(mesh, batch))

  def to_global(x: np.ndarray) -> jax.Array:
    def shard(index):
      wanted = np.arange(batch)[index[0]]
      return x[np.searchsorted(held, wanted)][(slice(None), *index[1:])]

    shape = (batch, *x.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

  # JAX takes it for an implicit transfer, which JAX_TRANSFER_GUARD may forbid.
  with jax.transfer_guard_host_to_device('allow'):
    return jax.tree.map(to_global, local)
