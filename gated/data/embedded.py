"""The embedded corpus: the running interpreter's own standard library, without its tests.

About 12 MB of real Python on every machine. A hash of a file's path puts it into train
or held-out (1 in 20), and each file is taken apart into two domains: 'prose', its
comments and docstrings, and 'code', the rest, as it stands.
"""

import ast
import hashlib
import inspect
import io
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterator

from gated.data import packing, shards, tokenizer

DOMAINS = ('code', 'prose')
HELDOUT = 0.05
SEED = 0  # Of the order in which documents are packed; the run's seed shuffles the rows.
SHARD_ROWS = 1 << 14
# Tests, what others installed, and pydoc_data, which is 6% of all and generated.
SKIPPED = {
  'test',
  'tests',
  'idle_test',
  'site-packages',
  'dist-packages',
  'pydoc_data',
  '__pycache__',
}

log = logging.getLogger(__name__)


def directory(length: int, spec: str, cache: str) -> str:
  """T and 'bytes' or 'bpe:N' -> the corpus's directory, built if the cache lacks it."""
  paths = files()
  python = platform.python_version()
  survey = [[name, os.path.getsize(path)] for name, path in paths.items()]
  key = hashlib.sha256(shards.canonical([sys.version, survey]).encode()).hexdigest()[:8]
  kind = spec.replace(':', '')
  name = f'stdlib-{python}-{kind}-{length}-v{shards.FORMAT}-{key}'
  folder = cache or default_cache()
  target = os.path.join(folder, name)
  exists = os.path.isdir(target)
  if not os.path.isfile(os.path.join(target, shards.MANIFEST)):
    if exists:  # It came into being with a manifest, so it was damaged since.
      shutil.rmtree(target, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    _build(target, paths, length=length, spec=spec, python=python)
  return target


def default_cache() -> str:
  """XDG_CACHE_HOME, or where the platform keeps caches."""
  home = '~/Library/Caches' if sys.platform == 'darwin' else '~/.cache'
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser(home)
  return os.path.join(base, 'gated')


def files() -> dict[str, str]:
  """The library's source files: path relative to the library -> path."""
  root = sysconfig.get_path('stdlib')
  found = {}
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(set(folders) - SKIPPED)
    for name in sorted(names):
      path = os.path.join(folder, name)
      if name.endswith('.py') and os.path.isfile(path):
        found[os.path.relpath(path, root).replace(os.sep, '/')] = path
  return found


def take_apart(source: str) -> tuple[str, str]:
  """Python source -> (code, prose), each in the order of the file.

  A body that was only a docstring becomes `pass`; a line that was only a comment goes.
  SyntaxError and its kin where it is not Python.
  """
  lines = io.StringIO(source).readlines()  # Of '\n' alone, as Python counts them.
  # (row, from column, to column, what stands there instead, prose), rows from 0; columns
  # are characters.
  cuts = [*_docstrings(source, lines), *_comments(source)]
  prose = []
  for row, start, stop, instead, text in sorted(cuts, reverse=True):
    if text:
      prose.append(text)
    left, right = lines[row][:start], lines[row][stop:]
    kept = left + instead + right if instead else left.rstrip() + right
    lines[row] = kept if kept.strip() else ''
  return ''.join(lines), '\n'.join(reversed(prose))


def _comments(source: str) -> Iterator[tuple[int, int, int, str, str]]:
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield (
        token.start[0] - 1,
        token.start[1],
        token.end[1],
        '',
        token.string.lstrip('#! '),
      )


def _docstrings(
  source: str, lines: list[str]
) -> Iterator[tuple[int, int, int, str, str]]:
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, documented) or not node.body:
      continue
    first = node.body[0]
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
      continue
    text = first.value.value
    if not isinstance(text, str):
      continue
    only = len(node.body) == 1 and not isinstance(node, ast.Module)
    last = (first.end_lineno or first.lineno) - 1
    for row in range(first.lineno - 1, last + 1):
      line = lines[row]
      is_first, is_last = row == first.lineno - 1, row == last
      start = _characters(line, first.col_offset) if is_first else 0
      end = len(line) if not is_last else _characters(line, first.end_col_offset or 0)
      words = inspect.cleandoc(text) + '\n' if is_first else ''
      yield row, start, end, 'pass' if only and is_first else '', words


def _characters(line: str, column: int) -> int:
  """ast counts columns in bytes of UTF-8."""
  return len(line.encode()[:column].decode())


def _build(
  target: str, paths: dict[str, str], *, length: int, spec: str, python: str
) -> None:
  """Builds beside the target and moves it there; whoever comes second is content."""
  began = time.monotonic()
  log.info('building the embedded corpus (standard library %s, %s)', python, spec)
  draft = tempfile.mkdtemp(prefix='.building-', dir=os.path.dirname(target))
  try:
    out, work = os.path.join(draft, 'out'), os.path.join(draft, 'work')
    os.mkdir(out)
    os.mkdir(work)
    documents = _documents(paths)
    if spec == 'bytes':
      token = tokenizer.load(spec)
    else:
      trained = (
        text
        for domain in DOMAINS
        for name, text in documents[domain]
        if not packing.is_heldout(name, HELDOUT)
      )
      path = os.path.join(work, 'tokenizer.json')
      token = tokenizer.train_bpe(trained, int(spec.removeprefix('bpe:')), path)
    units = {}
    for domain in DOMAINS:
      units[domain] = [os.path.join(work, f'{domain}.unit')]
      packing.write_unit(
        units[domain][0],
        documents[domain],
        token,
        seed=SEED,
        heldout=HELDOUT,
        bos=False,
      )
    manifest = packing.pack(
      out,
      units,
      token,
      length=length,
      seed=SEED,
      shard_rows=SHARD_ROWS,
      made={'corpus': 'standard library', 'python': python, 'tokenizer': spec},
      work=work,
      run=packing.run_here,
    )
    shards.write_manifest(out, manifest)
    try:
      os.rename(out, target)
    except OSError:
      if not os.path.isfile(os.path.join(target, shards.MANIFEST)):
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  log.info('built %s in %.0f s', target, time.monotonic() - began)


def _documents(paths: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
  """Each file taken apart -> (name, text) pairs by domain."""
  documents: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
  for name, path in paths.items():
    try:
      with tokenize.open(path) as file:
        parts = take_apart(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
      continue  # lib2to3 and the like ship files that are not this Python.
    for domain, text in zip(DOMAINS, parts):
      documents[domain].append((name, text))
  return documents
