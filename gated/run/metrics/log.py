"""metrics.jsonl and its views: TensorBoard, wandb, the live line.

`metrics.jsonl` is the truth: one record a line, flushed as it is written; on an object
store it waits a while (gated/metrics/records.py). A record of step s tells of the update
that made state s, so a run restored at step s keeps the records up to and with s.
"""

import logging
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Self

import tqdm

from gated import storage
from gated.run.metrics import records

_log = logging.getLogger('gated')


class Log:
  """`write` puts a record in metrics.jsonl and, where asked, TensorBoard and wandb.

  Opened at `step`, the restored one (-1 for a run that starts), it drops what an earlier
  session wrote past it. `wandb` is a project's name, '' for none. A process that is not
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
    self.path = storage.Path(workdir) / 'metrics.jsonl'
    self._sink = self._board = self._wandb = None
    if not enabled:
      return
    storage.make(self.path.parent)
    records.truncate(self.path, step)
    self._sink = records.sink(self.path)
    if tensorboard and storage.is_remote(workdir):
      _log.warning('TensorBoard needs a local workdir: there are no event files')
    elif tensorboard:
      from tensorboardX import SummaryWriter

      folder = str(self.path.parent / 'tensorboard')
      self._board = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)
    if wandb:
      self._wandb = _start_wandb(self.path.parent, project=wandb)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Step, kind, name -> scalar: one record, also stamped with 'time'.

    Kinds are 'train', 'heldout' and 'indicators'; 'time' is in seconds since 1970.
    TensorBoard and wandb get the numbers as kind/name.
    """
    if self._sink is None:
      return
    stamp = {'step': int(step), 'kind': kind, 'time': time.time()}
    clash = stamp.keys() & values.keys()
    assert not clash, f'a record has its own {sorted(clash)}'
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
      self._wandb.log(numbers, step=step)

  def sync(self) -> None:
    """Makes what was written safe: call it before a checkpoint is committed."""
    if self._sink is not None:
      self._sink.sync()

  def close(self) -> None:
    """Closes the file and the views; a second call does nothing."""
    if self._sink is not None:
      self._sink.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._sink = self._board = self._wandb = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


class Progress:
  """A live line on standard error: step/total, loss, rate, tokens/s, MFU, time left.

  On a terminal it is a tqdm bar; elsewhere a plain line every `seconds`, and at the end.
  """

  def __init__(self, total: int, *, start: int, seconds: float, enabled: bool):
    self._total, self._start, self._seconds = total, start, seconds
    self._enabled = enabled
    self._begun = time.monotonic()
    # The first record is told at once, so that a log shows that the run lives.
    self._told = -math.inf
    self._bar = None
    if enabled and sys.stderr.isatty():
      form = '{n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining} {postfix}'
      self._bar = tqdm.tqdm(total=total, initial=start, bar_format=form)

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows a record of metrics; of it the names in SHOWN, where they are there."""
    if not self._enabled:
      return
    text = '  '.join(show(values[k]) for k, show in SHOWN.items() if k in values)
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if now - self._told >= self._seconds or step >= self._total:
      self._told = now
      done, left = max(1, step - self._start), max(0, self._total - step)
      eta = tqdm.tqdm.format_interval((now - self._begun) / done * left)
      print(f'step {step}/{self._total}  {text}  eta {eta}', file=sys.stderr, flush=True)

  def say(self, text: str) -> None:
    """Prints a line on standard error without tearing the bar."""
    if self._enabled:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leaves the bar where it stands."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


SHOWN = {
  'loss': lambda x: f'loss {float(x):.4f}',
  'lr': lambda x: f'lr {float(x):.2e}',
  'tokens_per_second': lambda x: f'{tqdm.tqdm.format_sizeof(float(x))} tok/s',
  'mfu': lambda x: f'mfu {float(x):.1%}',
}


def check_wandb(project: str) -> None:
  """Raises ValueError if metrics are to go to wandb and it is not installed."""
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

  # The run's id stays in the workdir, so that a resumed run goes on with its curve.
  note = workdir / 'wandb_id'
  if not storage.exists(note):
    storage.write(note, secrets.token_hex(4).encode())
  local = not storage.is_remote(workdir)
  return wandb.init(
    project=project,
    name=workdir.name,
    id=storage.read(note, 1 << 10).decode(),
    resume='allow',
    dir=str(workdir) if local else tempfile.mkdtemp(prefix='wandb-'),
  )
