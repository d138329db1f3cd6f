"""Where arrays live: the device mesh, and one table from an array's axes to the mesh's.

Five mesh axes, of type Auto: XLA's partitioner follows the shardings named here (this is
what `pjit` became: `jax.jit` with `NamedSharding`). An axis of size 1 carries no name.
"""

import math
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'expert', 'tensor', 'context')

# The logical axis of a parameter or an activation -> the mesh axes that split it.
RULES: dict[str | None, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'tokens': ('context',),
  'vocab': ('tensor',),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'ffn': ('tensor',),
  'experts': ('expert',),
  'layers': (),
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


def start(coordinator: str, processes: int, process: int, *, peer_timeout: int) -> None:
  """Joins the other processes of a run; call it before anything touches a device.

  `coordinator` is '' for a run of one process, 'auto' to ask the cluster's own
  environment (TPU pods, SLURM, Kubernetes), or 'host:port'. A process that gives no sign
  of life for `peer_timeout` seconds ends the others, which name it.
  """
  if not 0 <= process < processes:
    raise ValueError(f'--process={process} must be in [0, --processes={processes})')
  if not coordinator:
    if processes > 1:
      raise ValueError(f'--processes={processes} without --coordinator=HOST:PORT')
    return
  host, _, port = coordinator.rpartition(':')
  if coordinator != 'auto' and not (host and port.isdecimal()):
    raise ValueError(f"--coordinator={coordinator!r} is neither 'auto' nor HOST:PORT")
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if coordinator == 'auto':
    jax.distributed.initialize(heartbeat_timeout_seconds=peer_timeout)
  else:
    where = coordinator, processes, process
    jax.distributed.initialize(*where, heartbeat_timeout_seconds=peer_timeout)


def gather(text: str) -> list[str]:
  """Each process's text, at most 1000 bytes of it, by process; all must call it."""
  if jax.process_count() == 1:
    return [text]
  mine = np.zeros(1000, np.uint8)
  encoded = text.encode()[: len(mine)]
  mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  every = np.asarray(multihost_utils.process_allgather(mine))
  return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in every]


def agree(what: str, digest: str) -> None:
  """Raises ValueError unless all processes of a run hold the same hexadecimal digest."""
  if set(gather(digest)) != {digest}:
    process = jax.process_index()
    raise ValueError(f'{what} of process {process} differ from those of another')


def same_host(what: str) -> None:
  """Raises ValueError unless all processes of a run are on one machine."""
  if len(set(gather(platform.node()))) > 1:
    raise ValueError(f'{what} need all processes of the run on one machine')


def make(
  *, data: int, fsdp: int, expert: int, tensor: int, context: int, devices=None
) -> Mesh:
  """The sizes of the five axes, of which one may be -1 (the rest) -> the mesh.

  Raises ValueError unless the sizes multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, expert, tensor, context)))
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f'config.mesh.{axis}={size}, but it must be positive, or -1')
  rest = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(rest) > 1:
    raise ValueError(f'config.mesh.{rest[0]} and .{rest[1]} are -1, but only one may be')
  if rest and len(devices) % known == 0:
    sizes[rest[0]] = len(devices) // known
  product = math.prod(sizes.values())
  if product != len(devices):
    knobs = ' * '.join(f'config.mesh.{axis}={size}' for axis, size in sizes.items())
    raise ValueError(f'{knobs} is not the {len(devices)} devices here')
  shape = tuple(sizes.values())
  return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str | None], mesh) -> P:
  """Logical axes of an array -> its PartitionSpec; mesh axes of size 1 are left out."""
  names = [tuple(m for m in RULES[axis] if mesh.shape[m] > 1) for axis in axes]
  return P(*(n[0] if len(n) == 1 else (n or None) for n in names))


def ways(axis: str, mesh: Mesh) -> int:
  """A logical axis -> into how many parts the mesh splits it."""
  return math.prod(mesh.shape[m] for m in RULES[axis])


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
  """A tree with parameters in it -> a prefix of it with a NamedSharding for each.

  Parameters are split as their axes say; every other leaf is held by all devices.
  Raises ValueError if one does not split evenly.
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
  """Asks for `x` to be split by its logical axes; without a mesh, does nothing."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch of shape (B, T) lies on the mesh."""
  return NamedSharding(mesh, spec(('batch', 'tokens'), mesh))


def rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
  """Which rows of a global batch this process's devices hold, in ascending order."""
  shape = batch, ways('tokens', mesh)
  held = batch_sharding(mesh).addressable_devices_indices_map(shape)
  return tuple(sorted({r for ix in held.values() if ix for r in range(batch)[ix[0]]}))


def place(local: Any, mesh: Mesh, batch: int) -> Any:
  """This process's rows of a global batch -> the same tree of global arrays (B, T).

  Each leaf of `local` is a NumPy array whose leading dim runs over `rows(mesh, batch)`.
  """
  held = np.asarray(rows(mesh, batch))

  def globalise(x: np.ndarray) -> jax.Array:
    def shard(index):
      here = np.arange(batch)[index[0]]
      return x[np.searchsorted(held, here)][(slice(None), *index[1:])]

    shape = (batch, *x.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

  return jax.tree.map(globalise, local)
