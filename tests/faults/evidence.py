"""The results of a run on disk: records, saved steps, files; and logged warnings."""

import contextlib
import json
import logging
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

from gated.devices import trees
from gated.run import checkpoint, metrics


def losses(workdir: Path, kind: str = 'train') -> list[tuple[int, float]]:
  """(step, loss) of every record, in the order of the file."""
  records = metrics.read(workdir / 'metrics.jsonl')
  return [(r['step'], r['loss']) for r in records if r['kind'] == kind]


def read(workdir: Path, step: int) -> dict[str, dict[str, Any]]:
  """All arrays of a saved step, verified, by item and name."""
  with checkpoint.Reader(workdir / 'checkpoints') as reader:
    reader.verify(step)
    return reader.read(step, reader.shapes(step))


def digest(workdir: Path, step: int) -> str:
  """SHA-256 of all parameters and optimizer state of a saved step."""
  return trees.digest(read(workdir, step))


def last_step(workdir: Path) -> int:
  """The last step in metrics.jsonl, also of a running run; 0 for none."""
  path = workdir / 'metrics.jsonl'
  return max((s for s, _ in losses(workdir)), default=0) if path.exists() else 0


def names(folder: Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def saved(workdir: Path) -> list[int]:
  """The committed steps, in order; they are not verified."""
  folder = workdir / 'checkpoints'
  numbers = [int(n) for n in names(folder) if n.isdecimal() and n == str(int(n))]
  return sorted(s for s in numbers if (folder / str(s) / 'manifest.json').exists())


def sessions(workdir: Path) -> list[dict]:
  """The sessions in run.json."""
  return json.loads((workdir / 'run.json').read_text())['sessions']


def committed(workdir: Path, step: int) -> Path:
  """The folder of a saved step."""
  return workdir / 'checkpoints' / str(step)


def contents(folder: Path) -> dict[str, bytes]:
  """Every file below a folder -> its bytes, by its relative name."""
  files = (p for p in sorted(folder.rglob('*')) if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@contextlib.contextmanager
def warnings() -> Generator[list[str]]:
  """Collects the messages that this thread logs for `gated`."""
  messages: list[str] = []
  handler = logging.Handler()
  handler.emit = lambda record: messages.append(record.getMessage())
  handler.addFilter(lambda record: record.thread == threading.get_ident())
  log = logging.getLogger('gated')
  log.addHandler(handler)
  try:
    yield messages
  finally:
    log.removeHandler(handler)
