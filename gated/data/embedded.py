"""The embedded corpus: the running interpreter's own standard library, without its tests.

About 12 MB of real Python on every machine. A hash of the path assigns each file to the
train or held-out split (1 in 20). Each file is divided into two domains: 'prose' contains
its comments and docstrings, 'code' the rest, unchanged.
"""

import ast
import io
import logging
import os
import platform
import shutil
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gated import config
from gated.data import cache, packing, shards, tokenizer, units
from gated.data.documents import Text

DOMAINS = ('code', 'prose')
HELDOUT = 0.05
SEED = 0  # Sets the packing order of documents; the run's seed shuffles the rows.
SHARD_ROWS = 1 << 14
# Tests, installed packages, and pydoc_data, which is generated and 6% of the library.
SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'pydoc_data'}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

log = logging.getLogger(__name__)


def directory(length: int, spec: str, folder: str) -> str:
  """T, a tokenizer ('bytes' or 'bpe:N') and the cache -> the corpus, built if missing."""
  paths = files()
  survey = [[name, os.path.getsize(path)] for name, path in paths.items()]
  key = config.digest([sys.version, survey])[:8]
  kind = spec.replace(':', '')
  name = f'stdlib-{platform.python_version()}-{kind}-{length}-v{shards.FORMAT}-{key}'
  target = os.path.join(folder, name)
  is_complete = lambda: os.path.isfile(os.path.join(target, shards.MANIFEST))
  cache.make(
    target, is_complete, lambda draft: _build(draft, paths, length, spec), resumes=False
  )
  return target


def files() -> dict[str, str]:
  """The library's source files: path relative to the library -> path."""
  root = Path(sysconfig.get_path('stdlib'))
  paths = {}
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(set(folders) - SKIPPED)
    for name in sorted(names):
      path = Path(folder, name)
      if path.suffix == '.py' and path.is_file():
        paths[path.relative_to(root).as_posix()] = str(path)
  return paths


def take_apart(source: str) -> tuple[str, str]:
  """Python source -> (code, prose), each in the order of the file.

  `pass` replaces a docstring that is the whole body of its function or class. A line with
  only a comment is removed. Raises SyntaxError or another parser error if the text is not
  Python.
  """
  lines = io.StringIO(source).readlines()  # Splits at '\n' only, as Python counts lines.
  cuts = [*_docstrings(source, lines), *_comments(source)]
  prose = []
  for row, start, stop, substitute, text in sorted(cuts, reverse=True):
    if text:
      prose.append(text)
    left, right = lines[row][:start], lines[row][stop:]
    line = left + substitute + right if substitute else left.rstrip() + right
    lines[row] = line if line.strip() else ''
  return ''.join(lines), '\n'.join(reversed(prose))


# Row, first and last column (from 0, in characters), substitute, prose.
Cut = tuple[int, int, int, str, str]


def _comments(source: str) -> Iterator[Cut]:
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      (row, start), (_, stop) = token.start, token.end
      yield row - 1, start, stop, '', token.string.lstrip('#! ')


def _docstrings(source: str, lines: list[str]) -> Iterator[Cut]:
  # ast counts columns in bytes of UTF-8.
  characters = lambda row, column: len(lines[row].encode()[:column].decode())
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, DOCUMENTED) or (text := ast.get_docstring(node)) is None:
      continue
    string = node.body[0]
    first, last = string.lineno - 1, (string.end_lineno or 0) - 1
    is_body = len(node.body) == 1 and not isinstance(node, ast.Module)
    for row in range(first, last + 1):
      start = characters(row, string.col_offset) if row == first else 0
      stop = characters(row, string.end_col_offset) if row == last else len(lines[row])
      substitute = 'pass' if is_body and row == first else ''
      yield row, start, stop, substitute, text + '\n' if row == first else ''


def _build(out: str, paths: dict[str, str], length: int, spec: str) -> None:
  """Source files -> a dataset in the folder `out`."""
  began, python = time.monotonic(), platform.python_version()
  log.info('building the embedded corpus (standard library %s, %s)', python, spec)
  shutil.rmtree(out)  # It may hold files of an interrupted build.
  work = os.path.join(out, 'work')
  os.makedirs(work)
  documents: dict[str, list[tuple[str, str]]] = {domain: [] for domain in DOMAINS}
  for name, path in paths.items():
    try:
      with tokenize.open(path) as file:
        parts = take_apart(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
      continue  # Packages such as lib2to3 contain files of other Python versions.
    for domain, text in zip(DOMAINS, parts):
      documents[domain].append((name, text))
  if spec == 'bytes':
    token = tokenizer.load(spec)
  else:
    trained = (
      text
      for domain in DOMAINS
      for name, text in documents[domain]
      if not units.is_heldout(name, HELDOUT)
    )
    path = os.path.join(work, 'tokenizer.json')
    token = tokenizer.train_bpe(trained, int(spec.removeprefix('bpe:')), path)
  streams = {domain: [os.path.join(work, f'{domain}.unit')] for domain in DOMAINS}
  for domain, (path,) in streams.items():
    texts = [(name, Text([text])) for name, text in documents[domain]]
    units.write_unit(path, texts, token, seed=SEED, heldout=HELDOUT, bos=False)
  packing.pack(
    out,
    streams,
    token,
    length=length,
    seed=SEED,
    shard_rows=SHARD_ROWS,
    made={'corpus': 'standard library', 'python': python, 'tokenizer': spec},
    work=work,
    run=lambda function, jobs, label: list(map(function, jobs)),
  )
  shutil.rmtree(work)
  log.info('built the embedded corpus in %.0f s', time.monotonic() - began)
