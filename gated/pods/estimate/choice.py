"""Choice of a mesh by estimated step time, and suggestions that fit.

The search varies axes that a recipe leaves at 1 or -1; larger ones are fixed.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gated import model
from gated.devices import mesh
from gated.devices.chips import GIB, Chip
from gated.pods.estimate.one import Estimate, excess, named, of
from gated.pods.estimate.roofline import assumed

# If nothing fits, at most this many doublings of the devices are tried.
MORE = 10


def sizes(
  cfg: Any, count: int, chip: Chip, slices: int = 1
) -> tuple[dict[str, int], str]:
  """A recipe and a number of devices -> the sizes of its mesh's axes, and the reason.

  With choice `hand` the knobs decide and the reason is ''; ValueError if their product is
  not `count`. With `auto`, ValueError if no mesh divides the recipe or fits.
  """
  if cfg.mesh.choice == 'hand':
    return mesh.filled(cfg.mesh.sizes, count), ''
  matches = meshes(cfg, count, chip, slices)
  fitting = [e for e in matches if e.fits]
  if not fitting:
    raise ValueError(_nothing(cfg, count, chip, slices, matches))
  best, *others = fitting
  rest = f'{len(matches)} divide it, {len(fitting)} of them fit'
  if others:
    second = others[0]
    rest = f'next best {named(second.sizes)}, est. {second.time.step:.3g} s; {rest}'
  return dict(best.sizes), f'mesh {best}; {best.time.bound} takes the most; {rest}'


def meshes(cfg: Any, count: int, chip: Chip, slices: int = 1) -> list[Estimate]:
  """All meshes of `count` devices that divide the recipe and the slices, best first.

  Ties within 1% of the step time prefer fewer axes, then a larger `fsdp`.
  """
  matches = []
  for candidate in _factored(count, cfg):
    try:
      matches.append(of(cfg, candidate, chip, slices))
    except ValueError:
      continue
  return sorted(matches, key=_rank)


def suggest(
  cfg: Any, chip: Chip, devices: int, slices: int = 1
) -> list[tuple[dict[str, Any], Estimate]]:
  """A recipe on a number of devices -> (knobs to change, estimate), best first.

  For each mesh and remat policy: the fewest micro-batches that fit.
  """
  matches = []
  accums = [n for n in range(1, cfg.batch + 1) if cfg.batch % n == 0]
  for remat in model.REMAT:
    tried = [changed(cfg, remat, n) for n in accums]
    for candidate in _factored(devices, cfg):
      best = _first_that_fits(tried, candidate, chip, slices)
      if best is not None:
        matches.append(best)
  matches.sort(key=lambda pair: _rank(pair[1]))
  return [(_knobs(cfg, other, e.sizes), e) for other, e in matches]


def tail(changes: Mapping[str, Any]) -> str:
  """Knobs and their values -> the end of a command line."""
  return ' '.join(f'--{knob}={value}' for knob, value in changes.items())


def _first_that_fits(tried: list, one: dict[str, int], chip: Chip, slices: int):
  for other in tried:
    try:
      if excess(other, one, chip, slices) <= 0:
        return other, of(other, one, chip, slices)
    except ValueError:
      continue
  return None


def changed(cfg: Any, remat: str, accum: int) -> Any:
  """A recipe with another remat policy and number of micro-batches."""
  deeper = dataclasses.replace(cfg.model, remat=remat)
  return dataclasses.replace(cfg, accum=accum, model=deeper)


def _knobs(cfg: Any, other: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
  """The changes of a recipe that give another's mesh, micro-batches and remat."""
  hand = {} if cfg.mesh.choice == 'hand' else {'config.mesh.choice': 'hand'}
  requested = cfg.mesh.sizes
  split = {f'config.mesh.{a}': n for a, n in sizes.items() if n != requested[a]}
  rest = {
    'config.accum': (cfg.accum, other.accum),
    'config.model.remat': (cfg.model.remat, other.model.remat),
  }
  return hand | split | {knob: b for knob, (a, b) in rest.items() if a != b}


def _factored(count: int, cfg: Any) -> Iterator[dict[str, int]]:
  """All factorizations of `count` into the axes' sizes.

  Without experts, `expert` would duplicate `data`, so it stays 1.
  """
  requested = cfg.mesh.sizes
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  free = {axis: divisors for axis, size in requested.items() if size <= 1}
  if not cfg.model.moe.experts and 'expert' in free:
    free['expert'] = [1]
  allowed = [free.get(axis, [size]) for axis, size in requested.items()]
  for chosen in itertools.product(*allowed[:-1]):
    left, odd = divmod(count, math.prod(chosen))
    if not odd and left in allowed[-1]:
      yield dict(zip(requested, (*chosen, left)))


def _rank(e: Estimate) -> tuple:
  axes = sum(n > 1 for n in e.sizes.values())
  simple = axes, -e.sizes['fsdp'], *(-n for n in e.sizes.values())
  return round(100 * math.log(e.time.step)), *simple


def _nothing(cfg: Any, count: int, chip: Chip, slices: int, matches: list) -> str:
  """The error if no mesh fits: the reason, and what would help."""
  request = f"config.mesh.choice='auto' on {count} x {chip.name}"
  if not matches:
    plain = dict.fromkeys(mesh.AXES, 1) | {'fsdp': count}
    fixed = {a: n for a, n in cfg.mesh.sizes.items() if n > 1}
    if fixed:
      return f'{request}: no mesh with {named(fixed)} divides the recipe'
    try:
      of(cfg, plain, chip, slices)
    except ValueError as error:
      return f'{request}: no mesh divides the recipe; of fsdp alone, {error}'
  least = min(matches, key=lambda e: e.bytes)
  assert chip.memory is not None
  would = []
  knobs = next(iter(suggest(cfg, chip, count, slices)), None)
  if knobs:
    would.append(f'{tail(knobs[0])} ({knobs[1].bytes / GIB:.3g} GiB)')
  more = _enough(cfg, count, chip, slices)
  if more:
    would.append(f'{more} devices')
  return (
    f'{request}: the mesh that needs least, {named(least.sizes)}, has '
    f'{least.bytes / GIB:.4g} GiB a device, {least.excess / GIB:.3g} GiB more than fit '
    f'({1 - assumed("spare"):.0%} of {chip.memory / GIB:.4g} GiB). What would: '
    f'{" or ".join(would) or "a smaller model, or chips with more memory"}'
  )


def _enough(cfg: Any, count: int, chip: Chip, slices: int) -> int | None:
  """The least multiple by two of so many devices on which a mesh fits."""
  for times in (2**i for i in range(1, MORE + 1)):
    more = max(slices, -(-count * times // chip.slice_size))
    if any(e.fits for e in meshes(cfg, count * times, chip, more)):
      return count * times
  return None
