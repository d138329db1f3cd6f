"""One recipe on one mesh: the estimate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gated import plan
from gated.devices.chips import GIB, Chip
from gated.pods.estimate import memory, work
from gated.pods.estimate.layout import Layout, flops_per_token
from gated.pods.estimate.roofline import Roofline, Traffic, assumed, crossing, roofline


@dataclass(frozen=True, kw_only=True)
class Estimate:
  """One chip's part of a train step, per step."""

  chip: Chip
  sizes: Mapping[str, int]  # of the mesh's axes
  slices: int
  memory: Mapping[str, float]  # bytes by name: weights, optimizer, gradients, ...
  flops: Mapping[str, float]  # executed, by kind of product
  model_flops: float  # what the model's arithmetic needs
  moved: float  # bytes of memory read and written
  traffic: tuple[Traffic, ...]
  time: Roofline

  @property
  def bytes(self) -> float:
    """Peak memory."""
    return sum(self.memory.values())

  @property
  def excess(self) -> float:
    """Bytes over the usable memory; negative if it fits."""
    return _over(self.memory, self.chip)

  @property
  def fits(self) -> bool:
    return self.excess <= 0

  @property
  def mfu(self) -> float:
    return self.model_flops / (self.time.step * self.chip.flops)

  def __str__(self) -> str:
    """'fsdp=16 expert=4: est. 3.1 s a step, 11.2 of 15.75 GiB'."""
    limit = '' if self.chip.memory is None else f' of {self.chip.memory / GIB:.5g}'
    used = f'{self.bytes / GIB:.3g}{limit} GiB'
    return f'{named(self.sizes)}: est. {self.time.step:.3g} s a step, {used}'


def of(cfg: Any, sizes: Mapping[str, int], chip: Chip, slices: int = 1) -> Estimate:
  """A recipe (`plan.Config`) on a mesh -> the estimate.

  Raises ValueError if the mesh does not divide the recipe, or the slices the mesh.
  """
  layout = _layout(cfg, sizes, slices)
  flops, moved = work.flops(layout), work.moved(layout)
  sent = work.sent(layout, chip, slices)
  tokens = cfg.batch * cfg.data.length
  return Estimate(
    chip=chip,
    sizes=dict(sizes),
    slices=slices,
    memory=memory.held(layout),
    flops=flops,
    model_flops=flops_per_token(cfg.model, cfg.data.length) * tokens / layout.devices,
    moved=moved,
    traffic=sent,
    time=roofline(flops=flops, moved=moved, sent=sent, chip=chip),
  )


def excess(cfg: Any, sizes: Mapping[str, int], chip: Chip, slices: int = 1) -> float:
  """`of(...).excess` in a quarter of the time, for sweeps."""
  return _over(memory.held(_layout(cfg, sizes, slices)), chip)


def _layout(cfg: Any, sizes: Mapping[str, int], slices: int) -> Layout:
  crossing(sizes, slices)
  layout = Layout(cfg, sizes)
  plan.check_mesh(cfg, layout.on)
  return layout


def _over(held: Mapping[str, float], chip: Chip) -> float:
  if chip.memory is None:
    return -float('inf')
  return sum(held.values()) - (1 - assumed('spare')) * chip.memory


def named(sizes: Mapping[str, int]) -> str:
  """The axes larger than 1: 'fsdp=16 expert=4'."""
  return ' '.join(f'{axis}={n}' for axis, n in sizes.items() if n > 1) or 'one device'
