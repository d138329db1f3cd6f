"""A whole recipe, checked, and what follows from it: mesh, state, train and eval step.

`train.py`, `eval.py` and the scripts start here, so that none of them can build a run in
its own way.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gated import data, model
from gated.devices import chips, mesh
from gated.plan.recipe import Config, check_mesh
from gated.probes import indicators
from gated.train import guard, losses, optim, step

# (recipe, number of devices, chip, slices) -> (sizes of the mesh's axes, the reason).
Chooser = Callable[[Config, int, chips.Chip, int], tuple[dict[str, int], str]]


class Plan:
  """What a run does, before it does it; making one allocates and compiles nothing.

  On `devices`, which need not be here for it to be compiled, or on all that are.
  """

  def __init__(
    self,
    cfg: Config,
    devices: Sequence[Any] | None = None,
    *,
    choose: Chooser | None = None,
  ):
    """`choose` finds the mesh of a recipe with `config.mesh.choice=auto`."""
    self.cfg = cfg
    devices = jax.devices() if devices is None else devices
    self.mesh = mesh.make(**_sizes(cfg, devices, choose), devices=devices)
    self.tokens_per_step = cfg.batch * cfg.data.length
    self.micro = cfg.batch // cfg.accum
    check_mesh(cfg, self.mesh)
    gate = cfg.model.attn.gate
    multipliers = {} if gate.lr == 1.0 else {'gate': gate.lr}
    self.schedule = optim.schedule(cfg.optim, cfg.steps)
    tx = optim.make(cfg.optim, steps=cfg.steps, multipliers=multipliers)
    self.tx = guard.guard(tx, cfg.stability)
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
    """What the data must suit; `data.open` takes it."""
    cfg = self.cfg
    most = cfg.model.attn.max_segments if cfg.model.mask_documents else 0
    vocab = cfg.model.vocab
    return dict(vocab=vocab, batch=cfg.batch, seed=cfg.seed, max_segments=most)

  def _init(self) -> step.State:
    build = functools.partial(model.Transformer, self.cfg.model)
    return step.init(build, self.tx, self.cfg.seed)

  def init(self) -> step.State:
    """The first state, made where it lives: no device ever holds more than its part."""
    with jax.set_mesh(self.mesh):
      return jax.jit(self._init, out_shardings=self.shardings)()

  def train_step(self) -> Any:
    """(state, batch) -> (state, metrics), lowered, not compiled; donates the state."""
    opts: dict[str, Any] = dict(tx=self.tx, schedule=self.schedule, loss=self.cfg.loss)
    replicated = NamedSharding(self.mesh, P())
    run = jax.jit(
      exact(self.cfg.model, functools.partial(step.train, accum=self.cfg.accum, **opts)),
      donate_argnums=0,
      out_shardings=(self.shardings, replicated),
    )
    with jax.set_mesh(self.mesh):
      return run.lower(self.state, self.batch_shapes(self.cfg.batch))

  def indicators(self) -> Any:
    """-> a function (step, model, batch) -> indicators on the devices, or None.

    None at a step where none are due. It is compiled when they first are.
    """
    every = self.cfg.log.indicators
    run = functools.partial(indicators.measure, micro=self.micro)
    replicated = NamedSharding(self.mesh, P())
    jitted = jax.jit(exact(self.cfg.model, run), out_shardings=replicated)

    def measure(step, params, batch):
      if not every or (step > 1 and step % every):
        return None
      with jax.set_mesh(self.mesh):
        return jitted(params, batch)

    return measure

  def batch_shapes(self, rows: int) -> Any:
    """The shapes of a global batch of so many rows, placed."""
    where = mesh.batch_sharding(self.mesh)
    shape = (rows, self.cfg.data.length)
    array: Any = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    whole = array(np.int32)
    return data.Batch(whole, whole, array(np.float32), whole, whole)


def _sizes(cfg: Config, devices: Sequence[Any], choose: Chooser | None) -> dict[str, int]:
  """The sizes of the mesh's axes; the reason for an automatic choice is logged."""
  if cfg.mesh.choice == 'hand':
    return mesh.filled(cfg.mesh.sizes, len(devices))
  if choose is None:
    raise ValueError("config.mesh.choice='auto', but no chooser of meshes was given")
  chip = chips.of(devices[0].device_kind) or chips.CHIPS['cpu']
  sizes, reason = choose(cfg, len(devices), chip, mesh.slices(devices))
  logging.getLogger('gated').info(reason)
  return sizes


def amount(n: float) -> str:
  """1720574976 -> '1.72B'."""
  for unit, size in (('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if n >= size:
      return f'{n / size:.2f}{unit}'
  return f'{n:.0f}'


def exact(cfg: model.Config, run: Any) -> Any:
  """A function of JAX -> the same, its float32 products exact if the model computes so.

  Accelerators round the inputs of float32 products to fewer bits unless told otherwise.
  """
  if cfg.numerics.compute != 'float32':
    return run

  @functools.wraps(run)
  def precise(*args):
    with jax.default_matmul_precision('highest'):
      return run(*args)

  return precise


def evaluate_step(cfg: model.Config, on: Mesh, chunk: int) -> Any:
  """-> a jitted (model, batch) -> each row's (nats, weight), on all devices."""
  run = exact(cfg, functools.partial(losses.per_row, chunk=chunk))
  jitted = jax.jit(run, out_shardings=NamedSharding(on, P()))

  def evaluate(params, batch):
    with jax.set_mesh(on):
      return jitted(params, batch)

  return evaluate


def placed(shapes: Any, shardings: Any) -> Any:
  """Shapes and a prefix tree of shardings -> the same shapes, each with its sharding."""
  place = lambda s, x: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), x
  )
  return jax.tree.map(
    place, shardings, shapes, is_leaf=lambda x: isinstance(x, NamedSharding)
  )


def reading(cfg: model.Config) -> tuple[Mesh, model.Transformer]:
  """-> all devices and the abstract model, its weights split over them, to be read.

  They are split over as many devices as divide the model's width.
  """
  count = jax.device_count()
  fsdp = next(n for n in range(count, 0, -1) if cfg.width % n == 0 == count % n)
  on = mesh.make(data=count // fsdp, fsdp=fsdp, expert=1, tensor=1, context=1)
  shapes = model.abstract(cfg)
  return on, placed(shapes, mesh.shardings(shapes, on))
