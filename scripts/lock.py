"""requirements*.txt -> requirements*.lock: every package, its version, and its hashes.

  make lock                     keeps the versions that still suit
  make lock ARGS=--upgrade      takes the newest that suit

A lock file suits Python 3.11 and 3.12, Linux and macOS, x86_64 and arm64: what differs
has a marker. Where one requirements file includes another, so do their lock files, and a
package that both need stands in the included one alone. It needs uv and the network.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = '3.11'  # The oldest that is supported.
# What was asked for, and no word of where it came from.
OPTIONS = ('--quiet', '--universal', '--generate-hashes', f'--python-version={PYTHON}')
OPTIONS += ('--no-header', '--no-annotate', '--no-emit-index-url')
ENTRY = re.compile(r'^[\w.-]+==.*\n(?: +--hash.*\n)+', re.MULTILINE)


def included(source: Path) -> list[Path]:
  """The requirements files that one includes."""
  return [ROOT / name for name in re.findall(r'(?m)^-r (\S+)', source.read_text())]


def entries(source: Path) -> list[str]:
  """What is locked for a requirements file and those that it includes, so far."""
  target = source.with_suffix('.lock')
  text = target.read_text() if target.exists() else ''
  below = [entry for file in included(source) for entry in entries(file)]
  return below + ENTRY.findall(text)


def lock(source: Path, options: list[str]) -> None:
  """Writes the lock file of a requirements file; those it includes are done already."""
  bases = included(source)
  bounds = [f'--constraint={base.with_suffix(".lock")}' for base in bases]
  with tempfile.TemporaryDirectory() as folder:
    whole = Path(folder) / 'lock'
    whole.write_text(''.join(entries(source)))  # uv keeps the versions that it finds.
    command = ['uv', 'pip', 'compile', *OPTIONS, *bounds, *options]
    subprocess.run([*command, f'--output-file={whole}', source], check=True)
    text = whole.read_text()
  assert '://' not in text, f'{source}: its lock names an address'
  there = {entry for base in bases for entry in entries(base)}
  lines = [f'# `make lock` makes this of {source.name}.\n']
  lines += [f'-r {base.with_suffix(".lock").name}\n' for base in bases]
  lines += [entry for entry in ENTRY.findall(text) if entry not in there]
  source.with_suffix('.lock').write_text(''.join(lines))


def main(options: list[str]) -> int:
  waiting = sorted(ROOT.glob('requirements*.txt'))
  while waiting:
    source = next(s for s in waiting if not set(included(s)) & set(waiting))
    waiting.remove(source)
    print(source.with_suffix('.lock').name)
    try:
      lock(source, options)
    except (OSError, subprocess.CalledProcessError) as error:
      print(f'lock.py: {source.name}: {error}', file=sys.stderr)
      return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
