"""The sources of a sweep: packed at its start, unpacked where its points run.

So all points run the same code, whatever is edited meanwhile. The same sources give the
same bytes.
"""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

CARRIED = 'configs', 'gated', 'scripts'
FILES = 'train.py', 'eval.py', 'pyproject.toml', 'LICENSE', 'requirements*'
LEFT_OUT = '__pycache__', '.pyc', '.partial'
MOST = 1 << 26  # Bytes; a sweep carries no data.


def pack(root: Path) -> bytes:
  """A checkout -> its sources as a .tar.gz; ValueError if they are too large."""
  paths = [p for pattern in FILES for p in root.glob(pattern)]
  paths += [p for folder in CARRIED for p in (root / folder).rglob('*')]
  paths = [p for p in paths if p.is_file() and not str(p).endswith(LEFT_OUT)]
  paths = sorted(p for p in paths if not set(p.parts) & set(LEFT_OUT))
  size = sum(p.stat().st_size for p in paths)
  if size > MOST:
    largest = max(paths, key=lambda p: p.stat().st_size)
    raise ValueError(
      f'the sources in {root} have {size} bytes, more than a sweep carries '
      f'({MOST}): move {largest} elsewhere'
    )
  out = io.BytesIO()
  with (
    gzip.GzipFile(fileobj=out, mode='wb', mtime=0) as zipped,
    tarfile.open(fileobj=zipped, mode='w', format=tarfile.PAX_FORMAT) as archive,
  ):
    for path in paths:
      content = path.read_bytes()
      entry = tarfile.TarInfo(path.relative_to(root).as_posix())
      entry.size = len(content)
      entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
      archive.addfile(entry, io.BytesIO(content))
  return out.getvalue()


def unpack(packed: bytes, folder: Path, *, sha256: str) -> Path:
  """A packed checkout -> FOLDER/code-DIGEST, complete; ValueError for a wrong digest."""
  digest = hashlib.sha256(packed).hexdigest()
  if digest != sha256:
    raise ValueError(
      f'{folder}/code.tar.gz is not what its sweep.json says: its SHA-256 is {digest}, '
      f'but {sha256} is recorded'
    )
  target = folder / f'code-{digest[:12]}'
  if target.is_dir():
    return target
  draft = Path(tempfile.mkdtemp(prefix='.code-', dir=folder))
  try:
    with tarfile.open(fileobj=io.BytesIO(packed), mode='r:gz') as archive:
      archive.extractall(draft, filter='data')
    draft.chmod(0o755)
    draft.rename(target)
  except OSError:
    if not target.is_dir():  # Another process may have been faster.
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return target
