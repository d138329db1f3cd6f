"""metrics.jsonl and its views: TensorBoard, wandb, the live line.

`metrics.jsonl` is the truth: one JSON object a line, flushed as it is written, floats by
`repr` so that they come back to the last bit. JSON has no NaN, so the three values that
it lacks are the strings 'NaN', 'Infinity' and '-Infinity', which `read` turns back into
floats. A record of step s tells of the update that made state s, so a run restored at
step s keeps the records up to and with s.
"""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tqdm

ABSENT = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def plain(value: Any) -> Any:
  """Tree of Python, numpy and JAX values -> the same tree in what JSON can hold."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, jax.Array):
    value = jax.device_get(value)
  if isinstance(value, (np.ndarray, np.generic)):
    # A bf16 scalar has no Python twin; float64 holds every bit of it.
    exact = value.dtype.kind in 'biuf' or value.dtype.kind == 'U'
    return plain((value if exact else value.astype(np.float64)).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  if isinstance(value, Path):
    return str(value)
  return value


def dumps(value: Any, *, indent: int | None) -> str:
  """Tree -> JSON that every parser takes and that loses no bit of a float."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Tree -> a JSON file that is there whole or not at all, whenever the power fails."""
  _replace(Path(path), (dumps(value, indent=2) + '\n').encode())


def read(path: str | os.PathLike) -> list[dict]:
  """metrics.jsonl -> its records; a last line torn by a kill is left out."""
  return [_decode(line) for line in _whole_lines(Path(path))]


def truncate(path: str | os.PathLike, step: int) -> int:
  """Drops every record past `step`, and a torn last line -> how many bytes went.

  `step` -1 empties the file; a file that is not there is as good as empty.
  """
  path = Path(path)
  if not path.exists():
    return 0
  lines = _whole_lines(path)
  kept = b''.join(line for line in lines if _decode(line)['step'] <= step)
  dropped = path.stat().st_size - len(kept)
  if dropped:
    _replace(path, kept)
  return dropped


class Log:
  """`write` puts a record in metrics.jsonl and, where asked, TensorBoard and wandb.

  Opened at `step`, the restored one (-1 for a run that starts), it drops what an earlier
  session wrote past it. `wandb` is a project's name, '' for none. A process that is not
  `enabled` writes nothing.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    step: int,
    enabled: bool,
    tensorboard: bool,
    wandb: str,
  ):
    self.path = Path(workdir) / 'metrics.jsonl'
    self._file = self._board = self._wandb = None
    if not enabled:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    truncate(self.path, step)
    self._file = self.path.open('ab')
    if tensorboard:
      from tensorboardX import SummaryWriter

      folder = str(self.path.parent / 'tensorboard')
      self._board = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)
    if wandb:
      self._wandb = _start_wandb(self.path.parent, project=wandb)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Step, 'train' or 'heldout', name -> scalar: one record, also stamped with 'time'.

    'time' is in seconds since 1970. TensorBoard and wandb get the numbers as kind/name.
    """
    if self._file is None:
      return
    stamp = {'step': int(step), 'kind': kind, 'time': time.time()}
    clash = stamp.keys() & values.keys()
    assert not clash, f'a record has its own {sorted(clash)}'
    record = stamp | plain(values)
    self._file.write((dumps(record, indent=None) + '\n').encode())
    self._file.flush()
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
    """Forces what was written to the disk: call it before a checkpoint is committed."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file and the views; a second call does nothing."""
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._board = self._wandb = None

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


def _whole_lines(path: Path) -> list[bytes]:
  """Lines that end in a newline: what follows the last one was torn by a kill."""
  return [line for line in path.read_bytes().splitlines(True) if line.endswith(b'\n')]


def _decode(line: bytes) -> dict:
  def number(value: Any) -> Any:
    return ABSENT[value] if isinstance(value, str) and value in ABSENT else value

  return {name: number(value) for name, value in json.loads(line).items()}


def _replace(path: Path, content: bytes) -> None:
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  with partial.open('wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


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


def _start_wandb(workdir: Path, *, project: str) -> Any:
  check_wandb(project)
  import wandb

  # The run's id stays in the workdir, so that a resumed run goes on with its curve.
  note = workdir / 'wandb_id'
  if not note.exists():
    note.write_text(secrets.token_hex(4))
  return wandb.init(
    project=project,
    name=workdir.name,
    id=note.read_text(),
    resume='allow',
    dir=str(workdir),
  )
