"""One recipe on one mesh: the estimate."""

import functools
from collections.abc import Mapping
from typing import Any

from gated import plan
from gated.devices import mesh
from gated.devices.chips import GIB, Chip
from gated.pods.estimate import memory, work
from gated.pods.estimate.layout import Layout, flops_per_token
from gated.pods.estimate.roofline import Roofline, Traffic, assumed, roofline


class Estimate:
  """One chip's part of a train step of a recipe (`plan.Config`) on a mesh.

  Each quantity is computed when it is first read. Raises ValueError if the mesh does not
  divide the recipe, or the number of slices does not divide the mesh.
  """

  def __init__(self, cfg: Any, sizes: Mapping[str, int], chip: Chip, slices: int = 1):
    mesh.crossing(sizes, slices)
    self.cfg, self.sizes, self.chip, self.slices = cfg, dict(sizes), chip, slices
    self.layout = Layout(cfg, sizes)
    plan.check_mesh(cfg, self.layout.on)

  @functools.cached_property
  def memory(self) -> dict[str, float]:
    """Bytes by name: weights, optimizer, gradients, activations, working set."""
    return memory.held(self.layout, gpu=self.chip.is_gpu)

  @property
  def bytes(self) -> float:
    """Peak memory of the chip."""
    return sum(self.memory.values())

  @property
  def excess(self) -> float:
    """Bytes over the usable memory; negative if it fits."""
    if self.chip.memory is None:
      return -float('inf')
    return self.bytes - (1 - assumed('spare')) * self.chip.memory

  @property
  def fits(self) -> bool:
    return self.excess <= 0

  @functools.cached_property
  def flops(self) -> dict[str, float]:
    """Executed FLOPs by kind of product."""
    return work.flops(self.layout)

  @property
  def model_flops(self) -> float:
    """FLOPs of the model per chip, without recomputation."""
    tokens = self.cfg.batch * self.cfg.data.length / self.layout.devices
    return flops_per_token(self.cfg.model, self.cfg.data.length) * tokens

  @functools.cached_property
  def moved(self) -> float:
    """Bytes of memory read and written."""
    return work.moved(self.layout)

  @functools.cached_property
  def traffic(self) -> tuple[Traffic, ...]:
    """Bytes that the chip sends, by purpose and mesh axis."""
    return work.sent(self.layout, self.chip, self.slices)

  @functools.cached_property
  def time(self) -> Roofline:
    """The least time of a step, in seconds."""
    return roofline(flops=self.flops, moved=self.moved, sent=self.traffic, chip=self.chip)

  @property
  def mfu(self) -> float:
    """Model FLOPs over the peak FLOPs of the chip in this time."""
    return self.model_flops / (self.time.step * self.chip.flops)

  def __str__(self) -> str:
    """'fsdp=16 expert=4: est. 3.1 s a step, 11.2 of 15.75 GiB'."""
    limit = '' if self.chip.memory is None else f' of {self.chip.memory / GIB:.5g}'
    used = f'{self.bytes / GIB:.3g}{limit} GiB'
    return f'{named(self.sizes)}: est. {self.time.step:.3g} s a step, {used}'


def named(sizes: Mapping[str, int]) -> str:
  """The axes larger than 1: 'fsdp=16 expert=4'."""
  return ' '.join(f'{axis}={n}' for axis, n in sizes.items() if n > 1) or 'one device'
