"""A whole recipe, checked -> its mesh, state, train and evaluation step.

`train.py`, `eval.py` and the scripts all build a run with this module.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gated import data, model, probes
from gated.devices import chips, mesh
from gated.plan.recipe import Config, check_mesh
from gated.probes import indicators
from gated.train import guard, losses, optim, step, transfer

# (recipe, number of devices, chip, slices) -> (sizes of the mesh's axes, the reason).
Chooser = Callable[[Config, int, chips.Chip, int], tuple[dict[str, int], str]]


class Plan:
  """The mesh, the optimizer and the shapes of a run; allocates and compiles nothing.

  `devices` defaults to all devices of this process's run. To compile for another machine,
  pass that machine's devices.
  """

  def __init__(
    self,
    cfg: Config,
    devices: Sequence[Any] | None = None,
    *,
    choose: Chooser | None = None,
  ):
    """`choose` selects the mesh of a recipe with `config.mesh.choice=auto`."""
    self.cfg = cfg
    devices = jax.devices() if devices is None else devices
    self.mesh = mesh.make(**_sizes(cfg, devices, choose), devices=devices)
    self.tokens_per_step = cfg.batch * cfg.data.length
    self.micro = cfg.batch // cfg.accum
    check_mesh(cfg, self.mesh)
    gates = cfg.model.attn.named.items()
    multipliers = {name: gate.lr for name, gate in gates if gate.lr != 1.0}
    decays = {n: gate.weight_decay for n, gate in gates if gate.weight_decay >= 0}
    self.schedule = optim.schedule(cfg.optim, cfg.steps)
    self.growth = transfer.growth(cfg.optim, cfg.model)
    rates: dict[str, Any] = dict(multipliers=multipliers, growth=self.growth)
    rates['own_decays'] = decays
    tx = optim.make(cfg.optim, steps=cfg.steps, **rates)
    safe = optim.finite_updates(cfg.optim)
    self.tx = guard.guard(tx, cfg.stability, finite_updates=safe)
    self.flops_per_token = model.flops_per_token(cfg.model, cfg.data.length)
    shapes = jax.eval_shape(self._init)
    self.parameters = model.count(shapes.model)
    self.shardings = mesh.shardings(shapes, self.mesh)
    self.state = placed(shapes, self.shardings)

  def __str__(self) -> str:
    devices = f'{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}'
    return (
      f'{self.cfg.name}: {amount(self.parameters)} parameters ({self.parameters:,}), '
      f'{self.flops_per_token:.3g} FLOPs a token, '
      f'{self.tokens_per_step:,} tokens a step, {devices}'
    )

  @property
  def reads(self) -> dict[str, int]:
    """The requirements of a run for its data, as arguments of `data.open`."""
    cfg = self.cfg
    most = cfg.model.attn.max_segments if cfg.model.mask_documents else 0
    vocab = cfg.model.vocab
    return dict(vocab=vocab, batch=cfg.batch, seed=cfg.seed, max_segments=most)

  def _init(self) -> step.State:
    build = lambda key: transfer.initial(
      model.Transformer(self.cfg.model, key), self.growth
    )
    return step.init(build, self.tx, self.cfg.seed)

  def init(self) -> step.State:
    """The first state; each device computes only its own shards."""
    with jax.set_mesh(self.mesh):
      state = jax.jit(self._init, out_shardings=self.shardings)()
    # A step that starts on some devices before the others are ready can deadlock:
    # simulated devices share few threads, and a collective holds one until all join.
    return jax.block_until_ready(state)

  def train_step(self) -> Any:
    """(state, batch) -> (state, metrics), lowered, not compiled; donates the state."""
    cfg = self.cfg
    opts: dict[str, Any] = dict(tx=self.tx, schedule=self.schedule, loss=cfg.loss)
    opts['tau'] = cfg.optim.qk_clip

    def run(state, batch):
      state, metrics = step.train(state, batch, accum=cfg.accum, **opts)
      count = model.flops_per_token(cfg.model, cfg.data.length, batch.positions)
      return state, metrics | {'flops_per_token': jnp.float32(count)}

    outputs = self.shardings, NamedSharding(self.mesh, P())
    jitted = jax.jit(
      model.exact(cfg.model.numerics, run), donate_argnums=0, out_shardings=outputs
    )
    with jax.set_mesh(self.mesh):
      return jitted.lower(self.state, self.batch_shapes(cfg.batch))

  def watch(self) -> Callable[..., dict[str, tuple[Any, Callable]]]:
    """-> a function (step, model, batch) -> the measurements due at that step, by kind.

    Each kind ('indicators', 'probes') has values on the devices and a function that turns
    them into scalars on the host. The first measurement of a kind compiles it.
    """
    cfg = self.cfg
    scalars = functools.partial(probes.scalars, cfg.model)
    kinds = {
      'indicators': (cfg.log.indicators, indicators.measure, indicators.scalars),
      'probes': (cfg.log.probes, probes.watch, scalars),
    }
    compiled = {
      kind: replicated(cfg.model, self.mesh, functools.partial(run, micro=self.micro))
      for kind, (_, run, _) in kinds.items()
    }
    return lambda step, *args: {
      kind: (compiled[kind](*args), read)
      for kind, (every, _, read) in kinds.items()
      if due(every, step)
    }

  def batch_shapes(self, rows: int) -> Any:
    """The shapes and shardings of a global batch of `rows` rows."""
    sharding = mesh.batch_sharding(self.mesh)
    shape = (rows, self.cfg.data.length)
    array: Any = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    integer = array(np.int32)
    return data.Batch(integer, integer, array(np.float32), integer, integer)


def _sizes(cfg: Config, devices: Sequence[Any], choose: Chooser | None) -> dict[str, int]:
  """The sizes of the mesh's axes; the reason for an automatic choice is logged."""
  if cfg.mesh.choice == 'hand':
    return mesh.filled(cfg.mesh.sizes, len(devices))
  if choose is None:
    raise ValueError("config.mesh.choice='auto', but the caller cannot choose a mesh")
  chip = chips.of(devices[0].device_kind) or chips.CHIPS['cpu']
  sizes, reason = choose(cfg, len(devices), chip, mesh.slices(devices))
  logging.getLogger('gated').info(reason)
  return sizes


def due(every: int, step: int) -> bool:
  """Whether a measurement is due at a step: at the first, and at multiples of `every`."""
  return every > 0 and (step <= 1 or step % every == 0)


def amount(n: float) -> str:
  """1720574976 -> '1.72B'."""
  for unit, size in (('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if n >= size:
      return f'{n / size:.2f}{unit}'
  return f'{n:.0f}'


def evaluate_step(cfg: model.Config, on: Mesh, chunk: int) -> Any:
  """-> a jitted (model, batch) -> each row's (nats, weight), on all devices."""
  return replicated(cfg, on, functools.partial(losses.per_row, chunk=chunk))


def replicated(cfg: model.Config, on: Mesh, run: Any) -> Any:
  """Jits a function on a mesh; its results are replicated."""
  jitted = jax.jit(model.exact(cfg.numerics, run), out_shardings=NamedSharding(on, P()))

  def call(*args):
    with jax.set_mesh(on):
      return jitted(*args)

  return call


def placed(shapes: Any, shardings: Any) -> Any:
  """Shapes and a prefix tree of shardings -> the same shapes, each with its sharding."""
  place = lambda s, x: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), x
  )
  return jax.tree.map(
    place, shardings, shapes, is_leaf=lambda x: isinstance(x, NamedSharding)
  )


def reading(cfg: model.Config) -> tuple[Mesh, model.Transformer]:
  """-> (a mesh of all devices, the abstract model to restore, sharded over it).

  Weights are split over the largest number of devices that divides the model's width.
  """
  count = jax.device_count()
  fsdp = next(n for n in range(count, 0, -1) if cfg.width % n == 0 == count % n)
  on = mesh.make(data=count // fsdp, fsdp=fsdp, expert=1, tensor=1, context=1)
  shapes = model.abstract(cfg)
  return on, placed(shapes, mesh.shardings(shapes, on))
