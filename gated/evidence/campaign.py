"""A campaign: spends the given minutes on the points that decide open claims soonest.

Priority. Experiments are ordered by the tokens that they still want for each of their
open claims, the fewest first; the points of an experiment, by its own `choose`. Results
are written when a point ends, and the order is computed again.

A campaign's folder, runs/campaign/SCALE-DIGEST, is a sweep of all points of its
experiments. The digest covers sources and points, so that no point continues with other
code. An interrupted point continues from its checkpoint if it exists, else from step 0.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gated import config, data, storage
from gated import plan as plans
from gated.devices import chips, mesh
from gated.evidence import experiment, result
from gated.evidence.experiment import Experiment
from gated.pods import estimate
from gated.run import metrics
from gated.run.metrics import provenance
from gated.sweep import Point, Runner, Sweep, folder, machine
from gated.sweep.runner import Row

# Points get SIGTERM, to save, this many seconds before the end of the campaign, but at
# most this share of its time before. Those still running as long after it are killed.
SAVING, SAVING_SHARE = 20.0, 0.05
OVERHEAD = 90.0  # Seconds of a point besides its steps: start, compilation, probes.
PROBED = {'gpu': 64, 'test': 16}  # Held-out rows that are probed.
SEPARATOR = '+'  # Between the names of an experiment and of its point.


class Source(NamedTuple):
  """The experiment that a point of a campaign belongs to."""

  experiment: Experiment
  point: Point


def joined(experiments: Sequence[Experiment], parent: storage.Path) -> Sweep:
  """Experiments -> one sweep of all their points, named EXPERIMENT+POINT.

  Its folder is PARENT/SCALE-DIGEST.
  """
  points = tuple(
    point._replace(name=f'{e.name}{SEPARATOR}{point.name}')
    for e in experiments
    for point in e.swept.points
  )
  recipes = ' '.join(e.swept.recipe for e in experiments)
  first = experiments[0]
  content = [[p.name, metrics.plain(p.config)] for p in points]
  digest = config.digest([content, folder.current()])[:8]
  return replace(
    first.swept,
    folder=parent / f'{first.scale}-{digest}',
    name='campaign',
    recipe=recipes,
    points=points,
  )


def ordered(
  experiments: Sequence[Experiment], open_claims: Callable[[Experiment], int]
) -> list[Source]:
  """The wanted points, highest priority first; see the top of this file."""

  def cost(e: Experiment) -> float:
    """Tokens for each open claim; infinite if no claim is open."""
    count = open_claims(e)
    wanted = sum(experiment.tokens(p) for p in e.wanted())
    return wanted / count if count else float('inf')

  return [Source(e, p) for e in sorted(experiments, key=cost) for p in e.wanted()]


def check(experiments: Sequence[Experiment]) -> None:
  """Checks that this machine can run the experiments, before the first point.

  ValueError for a scale without its device, a card that is too small, or training data
  that is missing or is not that of earlier results.
  """
  for e in experiments:
    if e.scale == 'gpu' and machine.platform() != 'gpu':
      raise ValueError(
        f'--scale=gpu needs a GPU, but this machine has none for JAX; --scale=test runs '
        f'the mechanics of experiments/{e.name} on a CPU'
      )
    memory = machine.gpu_memory() if e.scale == 'gpu' else None
    checked: dict[str, str] = {}
    for point in e.wanted():
      cfg = config.build(plans.Config, point.config, 'config')
      _check_memory(e, point, cfg, memory)
      key = config.digest([point.config['data'], cfg.model.vocab])
      if key not in checked:
        checked[key] = _fingerprint(cfg)
      _check_data(e, point, checked[key])


def _check_memory(e: Experiment, point: Point, cfg: plans.Config, memory: int | None):
  need = estimate.Estimate(cfg, dict.fromkeys(mesh.AXES, 1), chips.CHIPS['h100']).bytes
  if memory and need > memory:
    raise ValueError(
      f'experiments/{e.name}: {point.name} needs about {need / chips.GIB:.1f} GiB, but '
      f'the smallest GPU here has {memory / chips.GIB:.1f}: use a larger one'
    )


def _fingerprint(cfg: plans.Config) -> str:
  """The digest of a recipe's data; ValueError if it is missing or does not fit."""
  m = cfg.model
  most = m.attn.max_segments if m.mask_documents else 0
  reads = dict(vocab=m.vocab, batch=cfg.batch, seed=cfg.seed, max_segments=most)
  return str(data.open(cfg.data, **reads).fingerprint['sha256'])


def _check_data(e: Experiment, point: Point, fingerprint: str) -> None:
  length = point.config['data']['length']
  for old in e.results:
    if old.config['data']['length'] == length and old.data != fingerprint:
      raise ValueError(
        f'config.data.mixture={point.config["data"]["mixture"]!r} is not the data of '
        f'experiments/{e.name}/results/{e.scale}/{old.point}.json (SHA-256 '
        f'{fingerprint[:12]}, there {old.data[:12]}): make it again as '
        'experiments/text/README.md says'
      )


def check_versions(swept: Sweep) -> None:
  """ValueError for a folder whose points ran with other versions of packages."""
  changed = config.differences(swept.made['versions'], provenance.versions())
  if changed:
    listed = '; '.join(
      f'{k.removeprefix("config.")} {a} there, {b} here' for k, (a, b) in changed.items()
    )
    raise ValueError(
      f'{swept.folder} was begun with other versions ({listed}): install those, or '
      'remove the folder to begin its unfinished points again'
    )


class Campaign:
  """Runs the points of experiments on this machine until the time is over."""

  def __init__(
    self,
    root: storage.Path,
    experiments: Sequence[Experiment],
    swept: Sweep,
    *,
    seconds: float,
    whole: bool,
    open_claims: Callable[[Experiment], int],
    view: Callable[[Sequence[Row]], None],
    others: Sequence[result.Result] = (),
    keep_checkpoints: bool = False,
  ):
    """`swept` is written; `seconds` count from now.

    `whole` starts only points that fit into the time left. An experiment without results
    is taken to be as fast, in tokens, as `others`, those of other experiments.
    """
    self._root, self._experiments, self.swept = root, experiments, swept
    self._whole, self._open_claims, self._view = whole, open_claims, view
    self._others, self._keep = others, keep_checkpoints
    self._start = self._last = time.monotonic()
    self._end = self._start + seconds - min(SAVING, SAVING_SHARE * seconds)
    self._stops = [self._end, self._start + (1 + SAVING_SHARE) * seconds]
    self._rows: dict[str, Row] = {}
    self._busy = 0.0  # Seconds of all slots with a process.
    self._slots = 0
    self._runner: Runner
    self.written: list[result.Result] = []

  def runner(self, slots: Sequence[machine.Slot], code: Path) -> Runner:
    """-> a Runner that ends when the time is over or no point is wanted."""
    self._slots = len(slots)
    self._runner = Runner(
      self.swept,
      self.swept.points,
      slots=slots,
      code=code,
      show=self._update,
      keep_checkpoints=self._keep,
      after=self._probe,
    )
    self._rows = {row.point.name: row for row in self._runner.rows}
    return self._runner

  def _probe(self, point: Point) -> Sequence[str]:
    """A finished point -> the command that probes it; () if it is probed."""
    workdir = self.swept.workdir(point)
    probed = storage.exists(workdir / 'probes' / f'{point.steps}.json')
    if probed or not storage.exists(workdir / 'checkpoints'):
      return ()
    rows = PROBED[self._experiment(point).scale]
    return 'eval.py', f'--workdir={os.fspath(workdir)}', '--probe', f'--rows={rows}'

  def _experiment(self, point: Point) -> Experiment:
    name = point.name.partition(SEPARATOR)[0]
    return next(e for e in self._experiments if e.name == name)

  def _update(self, rows: Sequence[Row]) -> None:
    """Collects results, orders the points again, and stops them in time."""
    now = time.monotonic()
    running = [row for row in rows if row.state == 'running']
    self._busy += len(running) * (now - self._last)
    self._last = now
    for row in self._rows.values():
      if row.ended:
        self._collect(row)
    # A finished model is probed first, even if its point is no longer wanted.
    unprobed = [
      r for r in self._rows.values() if r.state == 'finished' and self._probe(r.point)
    ]
    wanted = [f'{e.name}{SEPARATOR}{p.name}' for e, p in self._wanted()]
    names = dict.fromkeys([*(r.point.name for r in (*running, *unprobed)), *wanted])
    self._runner.rows[:] = [self._rows[name] for name in names]
    self._view(list(self._rows.values()))
    if self._stops and now >= self._stops[0]:
      self._stops.pop(0)
      self._runner.leave()  # SIGTERM at first, then SIGKILL.

  def _collect(self, row: Row) -> None:
    """Writes the result of a point that has ended and was probed."""
    e = self._experiment(row.point)
    point = self._own(row.point)
    if any(r.point == point.name for r in e.results):
      return
    measured = result.of(e.name, e.scale, self.swept, row.point)
    if measured:
      measured = replace(measured, point=point.name)
      e.results.append(measured)
      self.written.append(measured)
      result.write(self._root, measured)

  def _own(self, point: Point) -> Point:
    """A point of the campaign -> the point of its experiment."""
    name = point.name.partition(SEPARATOR)[2]
    return point._replace(name=name)

  def _wanted(self) -> list[Source]:
    sources = ordered(self._experiments, self._open_claims)
    return [s for s in sources if self._fits(s)] if self._whole else sources

  def _fits(self, source: Source) -> bool:
    """Whether a point ends in the time left, by the speed of earlier results."""
    e, point = source
    speeds = lambda results: [s for r in results if (s := r.tokens_per_second) > 0]
    rates = speeds(e.results) or speeds(self._others)
    if not rates:
      return True  # Unknown.
    row = self._rows[f'{e.name}{SEPARATOR}{point.name}']
    tokens = experiment.tokens(point) * (1 - row.step / row.steps)
    seconds = tokens / statistics.median(rates) + OVERHEAD
    return seconds <= self._end - time.monotonic()

  def failed(self) -> list[Row]:
    """The points whose last process on this machine failed."""
    return [row for row in self._rows.values() if row.state == 'failed']

  def summary(self) -> str:
    """One line: minutes, results, and the share of the time that the slots were busy."""
    seconds = self._last - self._start
    share = self._busy / max(1e-9, seconds * self._slots)
    return (
      f'{seconds / 60:.1f} minutes, {len(self.written)} results, '
      f'{self._slots} slots busy {share:.0%} of the time'
    )
