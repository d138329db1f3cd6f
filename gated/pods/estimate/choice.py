"""Choice of a mesh by estimated step time, and suggestions that fit.

The search varies axes that a recipe leaves at 1 or -1; larger ones are fixed.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gated import model
from gated.devices import mesh
from gated.devices.chips import GIB, Chip
from gated.pods.estimate.one import Estimate, named
from gated.pods.estimate.roofline import assumed

# If nothing fits, the number of devices doubles at most this many times.
DOUBLINGS = 6


def sizes(
  cfg: Any, count: int, chip: Chip, slices: int = 1
) -> tuple[dict[str, int], str]:
  """A recipe and a number of devices -> the sizes of its mesh's axes, and the reason.

  With choice `hand`, the knobs set the sizes and the reason is ''; ValueError if their
  product is not `count`. With `auto`, ValueError if no mesh divides the recipe or fits.
  """
  if cfg.mesh.choice == 'hand':
    return mesh.filled(cfg.mesh.sizes, count), ''
  matches = meshes(cfg, count, chip, slices)
  fitting = [e for e in matches if e.fits]
  if not fitting:
    raise ValueError(_no_mesh(cfg, count, chip, slices, matches))
  best = fitting[0]
  rest = f'{len(matches)} meshes divide the recipe, {len(fitting)} of them fit'
  if len(fitting) > 1:
    rest = f'next best is {fitting[1]}; {rest}'
  return best.sizes, f'mesh {best}; the slowest term is {best.time.bound}; {rest}'


def meshes(cfg: Any, count: int, chip: Chip, slices: int = 1) -> list[Estimate]:
  """All meshes of `count` devices that divide the recipe and the slices, best first.

  Ties within 1% of the step time prefer fewer axes, then a larger `fsdp`.
  """
  candidates = _factored(count, cfg)
  return sorted(
    (e for s in candidates for e in _valid([cfg], s, chip, slices)), key=_rank
  )


def suggest(cfg: Any, chip: Chip, count: int, slices: int = 1) -> list[Estimate]:
  """A recipe on a number of devices -> the estimates that fit, best first.

  For each mesh and remat policy: the fewest micro-batches that fit.
  """
  accums = [n for n in range(1, cfg.batch + 1) if cfg.batch % n == 0]
  matches = []
  for remat in model.REMAT:
    recipes = [changed(cfg, remat, n) for n in accums]
    for candidate in _factored(count, cfg):
      fitting = (e for e in _valid(recipes, candidate, chip, slices) if e.fits)
      matches.extend(itertools.islice(fitting, 1))
  return sorted(matches, key=_rank)


def advice(cfg: Any, chip: Chip, count: int, slices: int = 1) -> list[Estimate]:
  """`suggest`; if nothing fits, it doubles the number of devices until a mesh fits."""
  for devices in (count * 2**n for n in range(DOUBLINGS + 1)):
    needed = max(slices, -(-devices // chip.slice_size))
    matches = suggest(cfg, chip, devices, needed)
    if matches:
      return matches
  return []


def changed(cfg: Any, remat: str, accum: int) -> Any:
  """A recipe with another remat policy and number of micro-batches."""
  layers = dataclasses.replace(cfg.model, remat=remat)
  return dataclasses.replace(cfg, accum=accum, model=layers)


def flags(cfg: Any, e: Estimate) -> str:
  """The flags that turn a recipe into an estimate's; '' if the two are equal."""
  knobs: dict[str, tuple[Any, Any]] = {'config.mesh.choice': (cfg.mesh.choice, 'hand')}
  knobs |= {
    f'config.mesh.{axis}': (cfg.mesh.sizes[axis], n) for axis, n in e.sizes.items()
  }
  knobs['config.accum'] = cfg.accum, e.cfg.accum
  knobs['config.model.remat'] = cfg.model.remat, e.cfg.model.remat
  return ' '.join(f'--{knob}={new}' for knob, (old, new) in knobs.items() if new != old)


def _valid(
  recipes: Sequence[Any], split: Mapping[str, int], chip: Chip, slices: int
) -> Iterator[Estimate]:
  """Estimates of the recipes that a mesh divides."""
  for cfg in recipes:
    with contextlib.suppress(ValueError):
      yield Estimate(cfg, split, chip, slices)


def _factored(count: int, cfg: Any) -> Iterator[dict[str, int]]:
  """All factorizations of `count` into the axes' sizes.

  Without experts, `expert` would duplicate `data`, so it stays 1.
  """
  requested = cfg.mesh.sizes
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  allowed = {axis: [n] if n > 1 else divisors for axis, n in requested.items()}
  if not cfg.model.moe.experts and requested['expert'] <= 1:
    allowed['expert'] = [1]
  *first, last = allowed.values()
  for chosen in itertools.product(*first):
    rest, remainder = divmod(count, math.prod(chosen))
    if not remainder and rest in last:
      yield dict(zip(requested, (*chosen, rest)))


def _rank(e: Estimate) -> tuple:
  axes = sum(n > 1 for n in e.sizes.values())
  simple = axes, -e.sizes['fsdp'], *(-n for n in e.sizes.values())
  return round(100 * math.log(e.time.step)), *simple


def _no_mesh(
  cfg: Any, count: int, chip: Chip, slices: int, matches: list[Estimate]
) -> str:
  """The error if no mesh fits: the reason, and the changes that would fit."""
  request = f"config.mesh.choice='auto' on {count} x {chip.name}"
  if not matches:
    try:
      Estimate(cfg, mesh.filled(cfg.mesh.sizes, count), chip, slices)
    except ValueError as error:
      return (
        f'{request}: no mesh divides the recipe. For the sizes of the recipe, {error}'
      )
  least = min(matches, key=lambda e: e.bytes)
  assert chip.memory is not None
  fix = 'Use a smaller model, or chips with more memory'
  fitting = advice(cfg, chip, count, slices)
  if fitting:
    best = fitting[0]
    fix = f'{best.layout.devices} devices are enough with {flags(cfg, best)}'
    fix += f' ({best.bytes / GIB:.3g} GiB)'
  return (
    f'{request}: the mesh with the least memory, {named(least.sizes)}, needs '
    f'{least.bytes / GIB:.4g} GiB a device, {least.excess / GIB:.3g} GiB more than fit '
    f'({1 - assumed("spare"):.0%} of {chip.memory / GIB:.4g} GiB). {fix}'
  )
