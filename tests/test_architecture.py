"""docs/architecture.md shows the packages as they are; a plain run imports few of them.

`python tests/test_architecture.py` writes the page's map: the line of a package or module
is the first line of its docstring.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/architecture.md'
MARK = '<!-- Generated below this line: python tests/test_architecture.py -->'


def first_line(path):
  doc = ast.get_docstring(ast.parse(path.read_text())) or ''
  assert doc, f'{path} has no docstring'
  return ' '.join(doc.split('\n\n')[0].split()).rstrip('.')


def packages():
  """The order of the packages, lowest first, as tests/test_walls.py has it."""
  for node in ast.parse((ROOT / 'tests/test_walls.py').read_text()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'PACKAGES':
      return ast.literal_eval(node.value)
  raise AssertionError('tests/test_walls.py has no PACKAGES')


def modules(folder):
  """A package -> a line for each of its files and folders."""
  for path in sorted(folder.glob('[a-z]*')):
    package = path / '__init__.py'
    if package.exists():
      yield f'- `{path.name}/`: {first_line(package)}'
    elif path.suffix == '.py':
      yield f'- `{path.name}`: {first_line(path)}'


def generated():
  lines = []
  for name in reversed(packages()):
    folder = ROOT / 'gated' / name
    if folder.is_dir():
      title, module, inside = (
        f'gated/{name}/',
        folder / '__init__.py',
        [*modules(folder), ''],
      )
    else:
      title, module, inside = f'gated/{name}.py', folder.with_suffix('.py'), []
    lines += [f'### `{title}`', '', f'{first_line(module)}.', '', *inside]
  return '\n'.join(lines)


def page():
  return f'{PAGE.read_text().partition(MARK)[0]}{MARK}\n\n{generated()}'


def test_the_map_of_the_packages_is_up_to_date():
  assert PAGE.read_text() == page(), 'stale: run `python tests/test_architecture.py`'


DRY_RUN = """
import sys
from absl import app
import train
try:
  app.run(train.main, sys.argv, train.parse)
except SystemExit as end:
  assert not end.code, end.code
print('imported', [m for m in sys.modules if m.startswith(('gated.pods', 'gated.sweep'))])
"""


@pytest.mark.slow
def test_a_plain_run_imports_neither_pods_nor_sweep(run_python, tmp_path):
  flags = '--config=configs/tiny.py', f'--workdir={tmp_path / "run"}', '--dry_run'
  done = run_python(['-c', DRY_RUN, *flags])
  assert done.returncode == 0 and 'imported []' in done.stdout, done.stderr


if __name__ == '__main__':
  PAGE.write_text(page())
