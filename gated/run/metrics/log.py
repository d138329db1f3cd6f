"""metrics.jsonl and its views: TensorBoard, wandb and the progress line.

Each line of `metrics.jsonl` is one record, flushed at once; in an object store it is
delayed (gated/run/metrics/records.py). A record of step s describes the update that made
state s, so a run restored at step s keeps the records up to and including s.
"""

import contextlib
import logging
import math
import secrets
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tqdm

from gated import config, storage
from gated.run.metrics import records

# Metrics on the progress line.
SHOWN = {
  'loss': lambda x: f'loss {float(x):.4f}',
  'lr': lambda x: f'lr {float(x):.2e}',
  'tokens_per_second': lambda x: f'{tqdm.tqdm.format_sizeof(float(x))} tok/s',
  'mfu': lambda x: f'mfu {float(x):.1%}',
}

_log = logging.getLogger('gated')


@dataclass(frozen=True, kw_only=True)
class Config:
  """The logs of a run, their intervals in steps, and the window of the profiler."""

  every: int
  tensorboard: bool
  wandb: str
  profile_first: int
  profile_last: int
  indicators: int
  probes: int
  samples: int
  sample_prompts: tuple[str, ...]
  sample_tokens: int
  sample_temperature: float

  def __post_init__(self):
    config.at_least('config.log.every', self.every, 1)
    for kind in ('indicators', 'probes', 'samples'):
      config.at_least(f'config.log.{kind}', getattr(self, kind), 0)
    config.within('config.log.sample_tokens', self.sample_tokens, 1, 1 << 24)
    config.at_least('config.log.sample_temperature', self.sample_temperature, 0.0)
    if self.profile_first >= 0 and self.profile_last < self.profile_first:
      first, last = self.profile_first, self.profile_last
      raise ValueError(
        f'config.log.profile_last={last} is before config.log.profile_first={first}'
      )


class Log(contextlib.ExitStack):
  """Writes records to metrics.jsonl and, if enabled, to TensorBoard and wandb.

  It starts at `step`, the restored one (-1 for a fresh run), and drops later records of
  an earlier session. `wandb` is the name of a project, '' for none. A process that is not
  `enabled` writes nothing.
  """

  def __init__(
    self,
    workdir: storage.PathLike,
    *,
    step: int,
    enabled: bool,
    tensorboard: bool,
    wandb: str,
  ):
    super().__init__()
    self.path = storage.Path(workdir) / 'metrics.jsonl'
    self._samples = storage.Path(workdir) / 'samples'
    self._sink = self._board = self._wandb = None
    if not enabled:
      return
    storage.make(self.path.parent)
    records.truncate(self.path, step)
    for name in storage.names(self._samples):
      number = name.removesuffix('.json')
      if number.isdecimal() and int(number) > step:
        storage.remove(self._samples / name)
    self._sink = records.sink(self.path)
    self.callback(self._sink.close)
    if tensorboard and storage.is_remote(workdir):
      _log.warning('TensorBoard needs a local workdir: no event files are written')
    elif tensorboard:
      from tensorboardX import SummaryWriter

      folder = str(self.path.parent / 'tensorboard')
      self._board = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)
      self.callback(self._board.close)
    if wandb:
      self._wandb = _start_wandb(self.path.parent, project=wandb)
      self.callback(self._wandb.finish)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Writes one record of a step: its kind, the time, and the scalars by name.

    Kinds are 'train', 'heldout', 'indicators', 'probes' and 'resumed'; 'time' is in
    seconds since 1970. TensorBoard and wandb get the numbers as kind/name.
    """
    if self._sink is None:
      return
    stamp = {'step': int(step), 'kind': kind, 'time': time.time()}
    assert not stamp.keys() & values.keys(), f'reserved names in {sorted(values)}'
    record = stamp | records.plain(values)
    self._sink.write(records.line(record))
    numbers = {
      f'{kind}/{name}': float(value)
      for name, value in record.items()
      if name not in stamp and isinstance(value, (int, float))
    }
    if self._board is not None:
      for name, value in numbers.items():
        self._board.add_scalar(name, value, step, walltime=record['time'])
    if self._wandb is not None:
      self._wandb.log({'step': step, **numbers})

  def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
    """Writes samples, {'prompt': ..., 'text': ...} each, to WORKDIR/samples/STEP.json.

    TensorBoard shows them as texts, with a bar between prompt and continuation.
    """
    if self._sink is None:
      return
    content = {'step': step, 'samples': samples}
    storage.write_json(self._samples / f'{step}.json', content)
    if self._board is None:
      return
    for i, sample in enumerate(samples):
      text = f'{sample["prompt"]}\N{LEFT HALF BLOCK}{sample["text"]}'
      # Markdown shows an indented text as it is.
      self._board.add_text(f'samples/{i}', textwrap.indent(text, '    '), step)

  def sync(self) -> None:
    """Flushes the records to the disk or store: call it before a checkpoint is saved."""
    if self._sink is not None:
      self._sink.sync()


class Progress(contextlib.ExitStack):
  """A progress line on standard error: step, loss, rate, tokens/s, MFU, time left.

  On a terminal it is a tqdm bar; elsewhere a plain line every `seconds`, and at the end.
  """

  def __init__(self, total: int, *, start: int, seconds: float, enabled: bool):
    super().__init__()
    self._total, self._start, self._seconds = total, start, seconds
    self._enabled = enabled
    self._begun = time.monotonic()
    self._printed = -math.inf  # The first record is printed at once.
    self._bar = None
    if enabled and sys.stderr.isatty():
      form = '{n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining} {postfix}'
      self._bar = tqdm.tqdm(total=total, initial=start, bar_format=form)
      self.callback(self._bar.close)

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows the metrics of a step that are in SHOWN."""
    if not self._enabled:
      return
    text = '  '.join(show(values[k]) for k, show in SHOWN.items() if k in values)
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if now - self._printed >= self._seconds or step >= self._total:
      self._printed = now
      done, left = max(1, step - self._start), max(0, self._total - step)
      eta = tqdm.tqdm.format_interval((now - self._begun) / done * left)
      print(f'step {step}/{self._total}  {text}  eta {eta}', file=sys.stderr, flush=True)

  def say(self, text: str) -> None:
    """Prints a line on standard error without breaking the bar."""
    if self._enabled:
      tqdm.tqdm.write(text, file=sys.stderr)


def check_wandb(project: str) -> None:
  """Raises ValueError if a project is named and wandb is not installed."""
  if not project:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f'config.log.wandb={project!r}, but the package is not installed: pip install '
      "wandb, or leave the project's name empty"
    ) from error


def _start_wandb(workdir: storage.Path, *, project: str) -> Any:
  check_wandb(project)
  import wandb

  # The id is kept in the workdir, so that a resumed run continues its curve.
  note = workdir / 'wandb_id'
  if not storage.exists(note):
    storage.write(note, secrets.token_hex(4).encode())
  local = not storage.is_remote(workdir)
  run = wandb.init(
    project=project,
    name=workdir.name,
    id=storage.read(note, 1 << 10).decode(),
    resume='allow',
    dir=str(workdir) if local else tempfile.mkdtemp(prefix='wandb-'),
  )
  # wandb drops values whose step is before its own, as after a resume or a rollback.
  # With our own axis it keeps them: a curve has the repeated steps twice.
  run.define_metric('step', hidden=True)
  run.define_metric('*', step_metric='step')
  return run
