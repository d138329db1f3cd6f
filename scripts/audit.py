"""Known vulnerabilities of the packages that the lock files name, for every Python.

  make audit                              asks a service, through pip-audit
  make audit ARGS=--required              fails where nobody could be asked
  make audit ARGS=--advisories=all.zip    asks nobody, but reads OSV records: JSON, or a
                                          folder or a zip of it

Exit codes: 0 none are known, or nobody could be asked, which one line says; 1 some are;
2 refused.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOUND, REFUSED = 1, 2
MAX_RECORD = 1 << 24  # Bytes of one file of advisories in a zip.
SECONDS = 300  # That the service may take.


class Pin(NamedTuple):
  name: str
  version: str


class Finding(NamedTuple):
  pin: Pin
  advisory: str
  fixed: str  # Versions, or ''.


class Unreachable(Exception):
  """Nobody could be asked; says why."""


def pins(folder: Path) -> set[Pin]:
  """All that the lock files in a folder name, whatever its markers say."""
  texts = [path.read_text() for path in sorted(folder.glob('requirements*.lock'))]
  if not texts:
    raise ValueError(f'{folder} holds no requirements*.lock')
  return {Pin(*pair) for text in texts for pair in re.findall(r'(?m)^(\S+)==(\S+)', text)}


def ask(wanted: set[Pin]) -> tuple[list[Finding], set[Pin]]:
  """-> what the service knows, and the pins that it knew nothing of."""
  findings, asked = [], set()
  for group in _once_each(wanted):
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / 'requirements.txt'
      path.write_text(''.join(f'{pin.name}=={pin.version}\n' for pin in group))
      for entry in _pip_audit(path)['dependencies']:
        if 'skip_reason' in entry:
          continue
        pin = Pin(entry['name'], entry['version'])
        asked.add(pin)
        for each in entry['vulns']:
          findings.append(Finding(pin, each['id'], ', '.join(each['fix_versions'])))
  return findings, wanted - asked


def _once_each(wanted: set[Pin]) -> Iterator[list[Pin]]:
  """The pins in lists that name no package twice."""
  left = sorted(wanted)
  while left:
    first = list({pin.name: pin for pin in reversed(left)}.values())
    yield first
    left = [pin for pin in left if pin not in first]


def _pip_audit(path: Path) -> dict[str, Any]:
  options = ['--no-deps', '--disable-pip', '--progress-spinner=off', '--format=json']
  command = [sys.executable, '-m', 'pip_audit', '-r', path, '-s', 'osv', *options]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return json.loads(done.stdout)
  except subprocess.TimeoutExpired as error:
    raise Unreachable(f'no answer in {SECONDS} s') from error
  except json.JSONDecodeError as error:
    last = done.stderr.strip().splitlines()[-1:] or ['it said nothing']
    raise Unreachable(last[0][:120]) from error


def match(wanted: set[Pin], records: Iterator[dict]) -> list[Finding]:
  """What OSV records say of the pins."""
  by_name: dict[str, list[Pin]] = {}
  for pin in wanted:
    by_name.setdefault(pin.name, []).append(pin)
  findings = []
  for record in records:
    if record.get('withdrawn'):
      continue
    for entry in record.get('affected', ()):
      package = entry.get('package', {})
      name = re.sub(r'[-_.]+', '-', package.get('name', '')).lower()
      if package.get('ecosystem') != 'PyPI':
        continue
      for pin in by_name.get(name, ()):
        if _affects(entry, pin.version):
          findings.append(Finding(pin, record['id'], ', '.join(_fixes(entry))))
  return findings


def _affects(entry: dict, version: str) -> bool:
  """Whether a version is listed, or lies in a range (the algorithm of the OSV schema)."""
  from packaging.version import InvalidVersion, Version

  if version in entry.get('versions', ()):
    return True
  here = Version(version)
  for events in _ranges(entry):
    try:
      bounds = sorted((Version(text), kind) for kind, text in events)
    except InvalidVersion:  # Of long ago; such records list their versions.
      continue
    inside = False
    for bound, kind in bounds:
      if kind == 'introduced' and here >= bound:
        inside = True
      elif (kind == 'fixed' and here >= bound) or (
        kind == 'last_affected' and here > bound
      ):
        inside = False
    if inside:
      return True
  return False


def _ranges(entry: dict) -> Iterator[list[tuple[str, str]]]:
  for each in entry.get('ranges', ()):
    if each.get('type') == 'ECOSYSTEM':
      yield [pair for event in each['events'] for pair in event.items()]


def _fixes(entry: dict) -> list[str]:
  return [text for events in _ranges(entry) for kind, text in events if kind == 'fixed']


def read(path: Path) -> Iterator[dict]:
  """A file of OSV records, a folder of them, or a zip -> the records."""
  if path.is_dir():
    for file in sorted(path.glob('*.json')):
      yield from read(file)
  elif zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      for entry in archive.infolist():
        if entry.filename.endswith('.json') and entry.file_size <= MAX_RECORD:
          yield from _records(archive.read(entry))
  else:
    yield from _records(path.read_bytes())


def _records(content: bytes) -> list[dict]:
  found = json.loads(content)
  return found if isinstance(found, list) else [found]


def run(args: argparse.Namespace) -> int:
  wanted = pins(args.locks)
  if args.advisories:
    findings, unknown = match(wanted, read(args.advisories)), set()
  else:
    try:
      findings, unknown = ask(wanted)
    except Unreachable as error:
      print(f'audit: skipped, for no vulnerability service could be asked: {error}')
      return FOUND if args.required else 0
  for pin, advisory, fixed in sorted(set(findings)):
    print(f'{pin.name} {pin.version}: {advisory}, fixed in {fixed or "no version"}')
  for pin in sorted(unknown):
    print(f'{pin.name} {pin.version}: not known to the service')
  packages, count = len(wanted) - len(unknown), len(set(findings))
  print(f'audit: {packages} packages looked up, {count} vulnerabilities known')
  return FOUND if findings or (unknown and args.required) else 0


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--advisories', type=Path, help='OSV records, read offline')
  parser.add_argument('--required', action='store_true', help='fail if nobody answers')
  parser.add_argument('--locks', type=Path, default=ROOT, help="the lock files' folder")
  try:
    return run(parser.parse_args(argv))
  except (OSError, ValueError, KeyError, ImportError, zipfile.BadZipFile) as error:
    print(f'audit.py: {error!r}', file=sys.stderr)
    return REFUSED


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
