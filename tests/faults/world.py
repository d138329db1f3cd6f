"""The tools of the rows: real processes to break, and the checks of their results.

A row is one line of the fault table. It gets a World and the number of faults to inject,
and returns how many of them a run survived. A run survives if it ends as an undisturbed
run of the same topology does: with the same bits in parameters and optimizer state, one
record with the same loss at every step, and the same held-out losses. Equal losses at
every step imply the same records in the same order.
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

# A run of a few seconds: compiling, some 1.5 s of training, a tenth of it in saves.
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

FAULT = 'GATED_FAULT'  # The variable with the faults for faulty.py.


class Skip(Exception):
  """A row cannot run on this machine, with the reason."""


class Outcome(NamedTuple):
  injected: int
  survived: int
  lost: str  # 'nothing', or each fault that was not survived, with its error.


class Row(NamedTuple):
  number: str  # In the fault table, such as '1'.
  fault: str  # Such as 'kill -9 at random moments of a run'.
  run: Callable[['World', int], Outcome]  # (world, times) -> the outcome.
  times: int  # The number of injections in `make faults`.
  few: int  # The number of injections in `make test-all`; 0 for none.


class Tally:
  """Counts the faults of a row; a fault that is not survived does not stop the row.

  tally = Tally()
  for ... in ...:
    with tally.one('kill -9 at 1.3 s'):
      ...  # Raises AssertionError if it is not survived.
  return tally.outcome()
  """

  def __init__(self):
    self._injected, self._lost, self._skipped = 0, [], ''

  @contextlib.contextmanager
  def one(self, fault: str, *, times: int = 1) -> Generator[None]:
    """Counts `times` faults with one result; Skip does not count."""
    self._injected += times
    try:
      yield
    except Skip as reason:
      self._injected -= times
      self._skipped = str(reason)
      print(f'skipped: {fault}: {reason}', flush=True)
    except Exception as error:
      self._lost += [f'{fault}: {type(error).__name__}: {error}'] * times

  def outcome(self) -> Outcome:
    """The outcome of all faults; Skip if none could be injected."""
    if self._skipped and not self._injected:
      raise Skip(self._skipped)
    survived = self._injected - len(self._lost)
    lost = '; '.join(dict.fromkeys(self._lost)) or 'nothing'
    return Outcome(self._injected, survived, lost)


class Straight(NamedTuple):
  """An undisturbed run."""

  workdir: Path
  seconds: float  # From start to exit.
  step: int
  digest: str  # Of the final parameters and optimizer state.
  losses: list[tuple[int, float]]
  heldout: list[tuple[int, float]]


class _Shared(NamedTuple):
  """The objects that all rows share."""

  folder: Path
  straights: dict[str, Straight]
  locks: dict[str, threading.Lock]
  guard: threading.Lock
  forks: process.Forks


class World:
  """A folder, processes and random numbers; `row` creates one for each row."""

  def __init__(self, folder: Path, *, seed: int = 0, shared: _Shared | None = None):
    self.folder, self.seed = folder, seed
    self.random = random.Random(f'{seed}-{folder.name}')
    folder.mkdir(parents=True, exist_ok=True)
    owner = shared is None
    if shared is None:
      (folder / 'xla').mkdir(exist_ok=True)
      forks = process.Forks(process.environment(folder / 'xla', 1, exact=True))
      shared = _Shared(folder, {}, {}, threading.Lock(), forks)
    self._shared, self._owner = shared, owner
    self._children: list[Child] = []
    self._names = 0

  def __enter__(self) -> 'World':
    # A shell starts background commands with Ctrl-C ignored, and nohup ignores SIGHUP;
    # runs would inherit that, but not a handler. Rows run in threads, which may not set
    # one; the world of all rows has done it.
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGINT, signal.default_int_handler)
      signal.signal(signal.SIGHUP, lambda *_: None)
    return self

  def __exit__(self, *_) -> None:
    for child in self._children:
      if child.lives():
        child.signal(signal.SIGCONT)
        child.kill()
    if self._owner:
      self._shared.forks.close()

  def row(self, number: str) -> 'World':
    """A world with the same compilation cache and undisturbed runs."""
    world = World(self._shared.folder / number, seed=self.seed, shared=self._shared)
    world.random = random.Random(f'{self.seed}-{number}')
    return world

  def path(self, name: str = 'run') -> Path:
    """An unused path in this world's folder."""
    self._names += 1
    return self.folder / f'{name}-{self._names}'

  # Processes.

  def spawn(
    self,
    args: Sequence[Any],
    *,
    env: Mapping[str, str] | None = None,
    devices: int = 1,
    group: bool = False,
    cwd: Path = process.ROOT,
  ) -> Child:
    """Starts `python ARGS`, from the checkout's root and with a clean environment."""
    clean = process.environment(self._shared.folder / 'xla', devices, exact=True)
    env, stem, forks = clean | dict(env or {}), self.path('process'), self._shared.forks
    child = process.start(args, env, stem, group=group, cwd=cwd, forks=forks)
    self._children.append(child)
    return child

  def many(
    self,
    commands: Sequence[Sequence[Any]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
  ) -> list[Done]:
    """Runs `python ARGS` for each of the commands, one after another.

    Their paths are relative to `cwd`.
    """
    place = cwd or process.ROOT
    return [self.spawn(args, env=env, cwd=place).wait() for args in commands]

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
    """Starts a run; `__` in a knob stands for a dot. For `fault` see faulty.py."""
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
    **options,
  ) -> list[Child]:
    """Starts several processes; `faults` are by process, `options` as in `train`."""
    addresses = [
      f'--coordinator=127.0.0.1:{process.free_port()}',
      f'--processes={processes}',
    ]
    faults = faults or {}
    return [
      self.train(
        workdir,
        flags=[*flags, *addresses, f'--process={i}'],
        fault=faults.get(i, ()),
        **options,
      )
      for i in range(processes)
    ]

  def finish(self, workdir: Any, *, processes: int = 1, **options) -> Done:
    """Runs to the end; AssertionError unless all processes exit with 0."""
    if processes == 1:
      return self.train(workdir, **options).wait().expect(0)
    children = self.group(workdir, processes=processes, **options)
    first, *_ = [child.wait().expect(0) for child in children]
    return first

  # Checks.

  def straight(self, **options) -> Straight:
    """The undisturbed run of `finish(workdir, **options)`, which is run once.

    A fault inside the compiled step may change its last bits: compare such a run with
    one whose fault is at steps that never come.
    """
    key = json.dumps(options, sort_keys=True, default=str)
    with self._shared.guard:
      lock = self._shared.locks.setdefault(key, threading.Lock())
    with lock:
      if key not in self._shared.straights:
        self._shared.straights[key] = self._straight(options)
      return self._shared.straights[key]

  def _straight(self, options: Mapping[str, Any]) -> Straight:
    if not options:  # Its time is used, and must not include compilation.
      self.finish(self.path('warm'))
    workdir = self.path('straight')
    started = time.monotonic()
    self.finish(workdir, **options)
    seconds = time.monotonic() - started
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
    """Raises AssertionError unless the run ended as the undisturbed one.

    `foreign` are names in checkpoints/ that the run did not create.
    """
    last = straight.step
    for kind, expected in (('train', straight.losses), ('heldout', straight.heldout)):
      actual = evidence.losses(workdir, kind)
      differs = [pair for pair in zip(actual, expected) if pair[0] != pair[1]]
      assert actual == expected, (
        f'{len(actual)} {kind} records, not {len(expected)}; differences: {differs[:2]}'
      )
    steps = [step for step, _ in straight.losses]
    assert steps == list(range(1, last + 1)), 'the straight run has gaps'
    assert self.digest(workdir, last) == straight.digest, f'different bits at step {last}'
    leftovers = [
      n
      for n in evidence.names(workdir / 'checkpoints')
      if not _belongs(n) and n not in foreign
    ]
    assert not leftovers, f'left behind in checkpoints/: {leftovers}'
    assert not (workdir / 'lock.json').exists(), 'lock.json was left behind'


def arguments(workdir, *, recipe='configs/tiny.py', flags=(), fault=(), **knobs) -> list:
  """The command line of a small run: of train.py, or of faulty.py for a fault."""
  program = 'tests/faults/faulty.py' if fault else 'train.py'
  knobs = SMALL | {name.replace('__', '.'): value for name, value in knobs.items()}
  knob_flags = [f'--config.{name}={value}' for name, value in knobs.items()]
  return [program, f'--config={recipe}', f'--workdir={workdir}', *knob_flags, *flags]


def _belongs(name: str) -> bool:
  return name.isdecimal() or name == 'head.json'
