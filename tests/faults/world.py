"""What the rows of the bench share: real processes to break, and what to hold them to.

A row is a fault of the table of faults. It is given a World and how many faults to
inject, and tells how many of them a run survived. To survive is to end as the run that
nothing happened to does, at the same topology: with the same bits in parameters and
optimizer state, the same loss at every step, none missing and none twice, and the same
held-out losses. A loss that has the same bits at every step has seen the same records in
the same order, so that needs no log of its own.
"""

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults import evidence, process
from faults.process import Child, Done

from gated.devices import trees

STEPS, SAVES, EVALS = 24, 4, 6

# A run of some three seconds, half of them at work: its saves take a tenth of its life.
SMALL = {
  'model.width': 64,
  'model.ffn': 128,
  'model.depth': 2,
  'model.attn.heads': 4,
  'model.attn.kv_heads': 2,
  'model.attn.head_dim': 16,
  'data.length': 128,
  'batch': 8,
  'steps': STEPS,
  'optim.warmup': 4,
  'optim.lr': 1e-3,
  'checkpoint.every': SAVES,
  'eval.every': EVALS,
  'eval.rows': 8,
  'log.tensorboard': False,
}

FAULT = 'GATED_FAULT'  # The variable that tells faulty.py what is to go wrong.


class Skip(Exception):
  """A row cannot run on this machine; says why."""


class Outcome(NamedTuple):
  injected: int
  survived: int
  lost: str  # 'nothing', or what each fault that was not survived cost.


class Row(NamedTuple):
  number: str  # Of the table of faults, such as '1'.
  fault: str  # 'kill -9 at a random moment'
  run: Callable[['World', int], Outcome]  # The world, times -> what came of it.
  times: int  # As the bench injects it,
  few: int  # and as `make test` does; 0 where it does not.


class Tally:
  """Counts the faults of a row. One that is not survived is told, and the next comes.

  tally = Tally()
  for ... in ...:
    with tally.one('kill -9 at 1.3 s'):
      ... what raises AssertionError if it is not survived
  return tally.outcome()
  """

  def __init__(self):
    self._injected, self._lost, self._skipped = 0, [], ''

  @contextlib.contextmanager
  def one(self, what: str, *, times: int = 1) -> Generator[None]:
    """`times` faults that are judged together; one that raises Skip was none."""
    self._injected += times
    try:
      yield
    except Skip as reason:
      self._injected -= times
      self._skipped = str(reason)
      print(f'left out: {what}: {reason}', flush=True)
    except Exception as error:
      self._lost += [f'{what}: {type(error).__name__}: {error}'] * times

  def outcome(self) -> Outcome:
    """What came of them all; Skip if none could be injected."""
    if self._skipped and not self._injected:
      raise Skip(self._skipped)
    survived = self._injected - len(self._lost)
    told = '; '.join(dict.fromkeys(self._lost)) or 'nothing'
    return Outcome(self._injected, survived, told)


class Straight(NamedTuple):
  """A run that nothing happened to."""

  workdir: Path
  seconds: float  # From its start to its end.
  step: int
  digest: str  # Of the parameters and the optimizer state at its end.
  losses: list[tuple[int, float]]
  heldout: list[tuple[int, float]]


class _Shared(NamedTuple):
  """What the rows of a bench have in common."""

  folder: Path
  straights: dict[str, Straight]
  locks: dict[str, threading.Lock]
  guard: threading.Lock


class World:
  """A folder, processes, and random numbers of its own; `row` gives each row another."""

  def __init__(self, folder: Path, *, seed: int = 0, shared: _Shared | None = None):
    self.folder, self.seed = folder, seed
    self.random = random.Random(f'{seed}-{folder.name}')
    folder.mkdir(parents=True, exist_ok=True)
    if shared is None:
      shared = _Shared(folder, {}, {}, threading.Lock())
      (folder / 'xla').mkdir(exist_ok=True)
    self._shared = shared
    self._children: list[Child] = []
    self._names = 0

  def __enter__(self) -> 'World':
    return self

  def __exit__(self, *_) -> None:
    for child in self._children:
      if child.lives():
        child.signal(signal.SIGCONT)
        child.kill()

  def row(self, number: str) -> 'World':
    """A world with the same compilation cache and undisturbed runs."""
    world = World(self._shared.folder / number, seed=self.seed, shared=self._shared)
    world.random = random.Random(f'{self.seed}-{number}')
    return world

  def path(self, name: str = 'run') -> Path:
    """A path in this world's folder that nothing has yet."""
    self._names += 1
    return self.folder / f'{name}-{self._names}'

  # Processes.

  def spawn(
    self, args: Sequence[Any], *, env: Mapping[str, str] | None = None, devices: int = 1
  ) -> Child:
    """Starts `python ARGS` from the checkout's root, with a clean environment."""
    clean = process.environment(self._shared.folder / 'xla', devices)
    child = process.start(args, clean | dict(env or {}), self.path('process'))
    self._children.append(child)
    return child

  def train(
    self,
    workdir: Any,
    *,
    fault: Mapping | Sequence[Mapping] = (),
    flags: Sequence[str] = (),
    recipe: str = 'configs/tiny.py',
    env: Mapping[str, str] | None = None,
    devices: int = 1,
    **knobs,
  ) -> Child:
    """Starts a run; a knob's dots are two underscores. For `fault` see faulty.py."""
    command = arguments(workdir, recipe=recipe, flags=flags, fault=fault, **knobs)
    env = dict(env or {}) | ({FAULT: json.dumps(fault)} if fault else {})
    return self.spawn(command, env=env, devices=devices)

  def group(
    self,
    workdir: Any,
    *,
    processes: int = 2,
    faults: Mapping[int, Mapping | Sequence[Mapping]] | None = None,
    flags: Sequence[str] = (),
    **how,
  ) -> list[Child]:
    """Starts a run of several processes; `faults` are by process, `how` as of `train`."""
    where = [f'--coordinator=127.0.0.1:{process.free_port()}', f'--processes={processes}']
    faults = faults or {}
    return [
      self.train(
        workdir,
        flags=[*flags, *where, f'--process={i}'],
        fault=faults.get(i, ()),
        **how,
      )
      for i in range(processes)
    ]

  def finish(self, workdir: Any, *, processes: int = 1, **how) -> Done:
    """Runs until the end; AssertionError unless that is exit code 0, in all processes."""
    if processes == 1:
      return self.train(workdir, **how).wait().expect(0)
    children = self.group(workdir, processes=processes, **how)
    ended = [child.wait().expect(0) for child in children]
    return ended[0]

  # What must hold.

  def straight(self, **how) -> Straight:
    """The undisturbed run of `finish(workdir, **how)`, made once.

    A fault within the compiled step changes how that is compiled, and so its last bits:
    whoever injects one compares with a run whose fault is at steps that never come.
    """
    key = json.dumps(how, sort_keys=True, default=str)
    with self._shared.guard:
      lock = self._shared.locks.setdefault(key, threading.Lock())
    with lock:
      if key not in self._shared.straights:
        self._shared.straights[key] = self._straight(how)
      return self._shared.straights[key]

  def _straight(self, how: Mapping[str, Any]) -> Straight:
    if not how:  # The one whose time is asked for: compiling is not in it.
      self.finish(self.path('warm'))
    workdir = self.path('straight')
    begun = time.monotonic()
    self.finish(workdir, **how)
    seconds = time.monotonic() - begun
    step = max(evidence.saved(workdir))
    return Straight(
      workdir,
      seconds,
      step,
      self.digest(workdir, step),
      evidence.losses(workdir),
      evidence.losses(workdir, 'heldout'),
    )

  def digest(self, workdir: Path, step: int) -> str:
    """SHA-256 of all parameters and optimizer state of a saved step."""
    return trees.digest(self.read(workdir, step))

  def read(self, workdir: Path, step: int) -> dict[str, dict[str, Any]]:
    """All arrays of a saved step, verified, by item and name."""
    with self._shared.guard:
      return evidence.read(workdir, step)

  def check(self, workdir: Path, straight: Straight, *, foreign: Container = ()) -> None:
    """AssertionError unless the run ended as the undisturbed one did.

    `foreign` are names in checkpoints/ that were never the run's own.
    """
    last = straight.step
    for kind, want in (('train', straight.losses), ('heldout', straight.heldout)):
      have = evidence.losses(workdir, kind)
      differs = [pair for pair in zip(have, want) if pair[0] != pair[1]]
      assert have == want, (
        f'{len(have)} {kind} records and not {len(want)}, or other ones: {differs[:2]}'
      )
    every = list(range(1, last + 1))
    assert [step for step, _ in straight.losses] == every, 'the straight run has gaps'
    assert self.digest(workdir, last) == straight.digest, f'other bits at step {last}'
    left = [
      n
      for n in evidence.names(workdir / 'checkpoints')
      if not _belongs(n) and n not in foreign
    ]
    assert not left, f'left behind in checkpoints/: {left}'
    assert not (workdir / 'lock.json').exists(), 'lock.json was left behind'


def arguments(workdir, *, recipe='configs/tiny.py', flags=(), fault=(), **knobs) -> list:
  """The command line of a small run, of train.py or of what has a fault in it."""
  program = 'tests/faults/faulty.py' if fault else 'train.py'
  knobs = SMALL | {name.replace('__', '.'): value for name, value in knobs.items()}
  every = [f'--config.{name}={value}' for name, value in knobs.items()]
  return [program, f'--config={recipe}', f'--workdir={workdir}', *every, *flags]


def _belongs(name: str) -> bool:
  return name.isdecimal() or name == 'head.json'
