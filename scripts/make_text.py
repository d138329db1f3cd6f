"""Archives of Python packages -> a corpus of two domains, `code` and `prose`.

python scripts/make_text.py --archives=data/archives --out=data/text

The lists in --folder name the archives by version and SHA-256. They are read in place:
nothing is installed, executed or unpacked to disk. Each domain becomes JSON lines, one
file per archive, for scripts/prepare_data.py. The corpus is the same, byte for byte, on
every machine; its manifest is compared with the one in --folder.
"""

import argparse
import concurrent.futures
import functools
import gzip
import hashlib
import html
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import tqdm

from gated import config, storage
from gated.run import exit_codes, terminal

# pip downloads both; a wheel for one fixed platform is the same file everywhere.
WHEELS = (
  ' --only-binary=:all: --platform=manylinux2014_x86_64 --platform=manylinux_2_28_x86_64 '
  '--implementation=cp --python-version=3.11'
)
LISTS = {'wheels.txt': WHEELS, 'sources.txt': ''}
MANIFEST = 'manifest.json'
DOMAINS = ('code', 'prose')
KINDS = {
  **dict.fromkeys(('.py', '.pyx', '.c', '.h', '.cc', '.cpp', '.hpp', '.rs'), 'code'),
  **dict.fromkeys(('.rst', '.md', '.txt'), 'prose'),
  # Descriptions of web services; their documentation strings are prose.
  **dict.fromkeys(('.json', '.json.gz'), 'strings'),
}
LIMITS = {'code': 1 << 18, 'prose': 1 << 21, 'strings': 1 << 25}  # Bytes of a file.
SHARES = {'code': 16 << 20, 'prose': 24 << 20}  # Bytes after which an archive stops.
MIN_DOCUMENT = 256  # Bytes.
MAX_LINE = 1000  # Bytes; longer lines of code are data, or generated.
MIN_LETTERS = {'code': 0.5, 'prose': 0.7}  # Fraction of the bytes that are no space.
MIN_COMMON = 0.1  # Fraction of the words; fewer are a list, or another language.
MIN_PARAGRAPH = 60  # Bytes; shorter paragraphs, such as headings, may repeat.

LETTERS = bytes([*range(65, 91), *range(97, 123)])
SPACE = b' \t\r\n\f\v'
PIN = re.compile(r'([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})')
GENERATED = re.compile(
  rb'(?i)generated (by|from|with)|auto-?generated|do not (edit|modify)'
)
LEGAL_NAME = re.compile(
  r'(?i)licen[cs]e|copying|copyright|notice|authors|contributors|credits|requires\.txt'
  r'|(sources|entry_points|top_level)\.txt|requirements'
)
LEGAL = re.compile(
  rb'(?i)licensed under|licenses/licen|license, version|permission is hereby granted'
  rb'|all rights reserved|copyright (\(c\)|[0-9]|\xc2\xa9)|without warrant|"as is"'
  rb'|redistributions? (and|of|in)\b|general public license|creative commons'
)
TAG = re.compile(rb'<[^<>]{1,500}>')
GAP = re.compile(rb'\n(?:[ \t\r]*\n)+')
WORD = re.compile(rb'[A-Za-z]+')
COMMON = re.compile(rb'(?i)\b(?:the|of|to|and|is|for|that|this|with|be|an?|in|or|are)\b')


class Package(NamedTuple):
  """An archive of the lists."""

  name: str
  version: str
  sha256: str
  path: str  # On this machine.


class Document(NamedTuple):
  """A file of an archive that may enter the corpus."""

  digest: bytes  # Of the content, without differences in white space.
  domain: str
  name: str  # Path in the archive.
  content: bytes


def locate(folder: str, archives: str) -> list[Package]:
  """The lists in a folder, a folder of archives -> packages, in the order of the lists.

  ValueError for a missing or changed archive, with the commands that download it.
  """
  present = {}
  for path in sorted(Path(archives).glob('*')):
    if path.is_file():
      with path.open('rb') as file:
        present[hashlib.file_digest(file, 'sha256').hexdigest()] = str(path)
  packages, missing, commands = [], [], []
  for name, options in LISTS.items():
    pins = Path(folder, name)
    lines = pins.read_text().splitlines() if pins.is_file() else []
    for number, line in enumerate(lines, 1):
      if not line or line.startswith(('#', '--')):
        continue
      if not (pin := PIN.fullmatch(line)):
        raise ValueError(
          f'{pins}:{number}: {line!r} is no NAME==VERSION --hash=sha256:...'
        )
      packages.append(Package(*pin.groups(), path=present.get(pin[3], '')))
      if pin[3] not in present:
        missing.append(f'{pin[1]}=={pin[2]}')
    commands.append(
      f'  python -m pip download --no-deps --require-hashes --dest={archives}{options} '
      f'-r {pins}'
    )
  if not packages:
    raise ValueError(f'--folder={folder}: no package in {" or ".join(LISTS)}')
  if missing:
    listed = ', '.join(missing[:5]) + (', ...' if missing[5:] else '')
    raise ValueError(
      f'--archives={archives}: {len(missing)} of {len(packages)} archives are missing or '
      f'changed: {listed}. Download them:\n' + '\n'.join(commands)
    )
  return packages


def members(path: str) -> Iterator[tuple[str, int, Callable[[], Any]]]:
  """An archive -> (name, bytes, function that opens it) of its regular files, no links.

  ValueError for a name that leaves the archive.
  """
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as wheel:
      for info in wheel.infolist():
        if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
          name = _inside(info.filename, path)
          yield name, info.file_size, functools.partial(wheel.open, info)
  else:
    with tarfile.open(path) as source:
      for entry in source:
        if entry.isfile():
          name = _inside(entry.name, path)
          yield name, entry.size, functools.partial(source.extractfile, entry)


def _inside(name: str, path: str) -> str:
  parts = PurePosixPath(name).parts
  if not parts or name.startswith('/') or '..' in parts or '\\' in name:
    raise ValueError(f'{path}: the name {name!r} leaves the archive')
  return name


def documents(path: str) -> list[Document]:
  """An archive -> its candidates, ordered by content."""
  result = []
  for name, size, opener in members(path):
    base = PurePosixPath(name).name
    suffix = '.json.gz' if base.endswith('.json.gz') else PurePosixPath(name).suffix
    kind = KINDS.get('.md' if base in ('METADATA', 'PKG-INFO') else suffix)
    if kind is None or size > LIMITS[kind] or LEGAL_NAME.search(base):
      continue
    with opener() as file:
      content = file.read(LIMITS[kind] + 1)
    if kind == 'strings':
      content = strings(content, suffix)
    elif base in ('METADATA', 'PKG-INFO'):
      content = content.partition(b'\n\n')[2]  # The header names fields of the package.
    content = content.replace(b'\r\n', b'\n')
    domain = 'code' if kind == 'code' else 'prose'
    if plain(content, domain):
      digest = hashlib.sha256(b' '.join(content.split())).digest()
      result.append(Document(digest, domain, name, content))
  return sorted(result)


def strings(content: bytes, suffix: str) -> bytes:
  """A JSON file -> its documentation strings, without tags, as paragraphs."""
  try:
    if suffix == '.json.gz':
      content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LIMITS['strings'] + 1)
    parsed = json.loads(content)
  except (ValueError, OSError, RecursionError):
    return b''
  found: list[str] = []
  pending = [parsed]
  while pending:
    node = pending.pop()
    if isinstance(node, dict):
      keys = [key for key in ('documentation', 'description') if key in node]
      found += [node[key] for key in keys if isinstance(node[key], str)]
    if isinstance(node, dict | list):
      children = list(node.values()) if isinstance(node, dict) else node
      pending += [child for child in reversed(children) if isinstance(child, dict | list)]
  text = '\n\n'.join(found).encode(errors='ignore')
  return html.unescape(TAG.sub(b'', text).decode()).encode()


def plain(content: bytes, domain: str) -> bool:
  """Whether a file is text that a person wrote."""
  visible = content.translate(None, SPACE)
  if len(content) < MIN_DOCUMENT or b'\0' in content or not visible:
    return False
  letters = 1 - len(visible.translate(None, LETTERS)) / len(visible)
  if letters < MIN_LETTERS[domain]:
    return False
  if domain == 'code':
    longest = max(map(len, content.split(b'\n')))
    if longest > MAX_LINE or GENERATED.search(content[:2000]):
      return False
  try:
    content.decode()
  except UnicodeError:
    return False
  return True


def english(content: bytes) -> bool:
  """Whether enough of the words are common English words."""
  words = len(WORD.findall(content))
  return len(COMMON.findall(content)) >= MIN_COMMON * max(words, 1)


class Corpus:
  """Writes documents once each, and counts them."""

  def __init__(self, out: str):
    self.out = out
    self.seen: set[bytes] = set()  # Digests of documents, and of paragraphs of prose.
    self.packages: list[dict[str, Any]] = []

  def add(self, package: Package, group: list[Document]) -> None:
    """Writes the documents of an archive, up to its share."""
    counts: dict[str, Any] = {'name': package.name, 'version': package.version}
    for domain in DOMAINS:
      size, lines = 0, []
      for document in group:
        if size >= SHARES[domain]:
          break
        if document.domain != domain or document.digest in self.seen:
          continue
        self.seen.add(document.digest)
        content = self.fresh(document.content) if domain == 'prose' else document.content
        if len(content) < MIN_DOCUMENT:
          continue
        size += len(content)
        entry = {'name': f'{package.name}/{document.name}', 'text': content.decode()}
        lines.append(json.dumps(entry, ensure_ascii=False).encode() + b'\n')
      data = b''.join(lines)
      file = os.path.join(self.out, domain, f'{package.name}-{package.sha256[:8]}.jsonl')
      if lines:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        storage.write(file, data)
      digest = hashlib.sha256(data).hexdigest()
      counts[domain] = {'documents': len(lines), 'bytes': size, 'sha256': digest}
    self.packages.append(counts | {'archive': package.sha256})

  def fresh(self, content: bytes) -> bytes:
    """Prose -> its paragraphs that are new and no licence; b'' if it is not English."""
    kept = []
    for paragraph in GAP.split(content):
      if LEGAL.search(paragraph):
        continue
      if len(paragraph) >= MIN_PARAGRAPH:
        digest = hashlib.sha256(b' '.join(paragraph.split())).digest()[:16]
        if digest in self.seen:
          continue
        self.seen.add(digest)
      kept.append(paragraph)
    content = b'\n\n'.join(kept).strip(b'\n') + b'\n'
    return content if english(content) else b''

  def manifest(self) -> dict[str, Any]:
    """-> counts and digests of the corpus and of each archive's part."""
    domains = {}
    for domain in DOMAINS:
      parts = [counts[domain] for counts in self.packages]
      digest = hashlib.sha256(''.join(part['sha256'] for part in parts).encode())
      domains[domain] = {
        'documents': sum(part['documents'] for part in parts),
        'bytes': sum(part['bytes'] for part in parts),
        'sha256': digest.hexdigest(),
      }
    return {'domains': domains, 'packages': self.packages}


def make(folder: str, archives: str, out: str, processes: int) -> dict[str, Any]:
  """Lists, archives -> the corpus in `out`, and its manifest.

  ValueError if an archive or the result differs from the lists and the manifest in
  `folder`; then the result stays in a draft beside `out`.
  """
  if os.path.exists(out):
    raise ValueError(f'--out={out} exists; remove it, or name another folder')
  packages = locate(folder, archives)
  draft = f'{out}.partial'
  shutil.rmtree(draft, ignore_errors=True)
  corpus = Corpus(draft)
  with concurrent.futures.ProcessPoolExecutor(processes) as pool:
    mapper = pool.map if processes > 1 else map
    groups = mapper(documents, [package.path for package in packages])
    pairs = zip(packages, groups)
    for package, group in tqdm.tqdm(pairs, 'reading', len(packages), disable=None):
      corpus.add(package, group)
  manifest = corpus.manifest()
  storage.write_json(os.path.join(draft, MANIFEST), manifest, indent=1)
  expected = os.path.join(folder, MANIFEST)
  if not os.path.isfile(expected):
    print(f'{expected} does not exist, so nothing is compared', file=sys.stderr)
  elif json.loads(Path(expected).read_bytes()) != manifest:
    raise ValueError(f'{draft}/{MANIFEST} differs from {expected}: not the same corpus')
  os.rename(draft, out)
  return manifest


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--archives', required=True, help='folder of the downloaded archives')
  add('--out', required=True, help='folder of the corpus; it must not exist')
  add('--folder', default='experiments/text', help='folder of the lists and the manifest')
  add('--processes', default=os.cpu_count(), type=int)
  flags = vars(parser.parse_args(argv))
  config.at_least('--processes', flags['processes'], 1)
  for domain, counts in make(**flags)['domains'].items():
    print(
      f'{domain}: {counts["documents"]:,} documents, {counts["bytes"]:,} bytes, '
      f'sha256 {counts["sha256"]}'
    )


if __name__ == '__main__':
  terminal.steady()
  try:
    main(sys.argv[1:])
  except (ValueError, OSError) as error:
    print(f'make_text: {error}', file=sys.stderr)
    sys.exit(exit_codes.FAULT if storage.is_passing(error) else exit_codes.REFUSED)
