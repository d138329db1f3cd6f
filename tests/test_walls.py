"""The house's walls: who may import whom, what may not be called, how long a file is.

A file of gated/ imports lower floors only. When a wall is in the way, look for the room
that the code belongs in before moving a wall.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The wings, lowest first: each imports itself and those before it.
WINGS = (
  'config',
  'storage',
  'devices',
  'kernels',
  'model',
  'data',
  'train',
  'hf',
  'probes',
  'evals',
  'run',
  'plan',
  'pods',
  'sweep',
  'evidence',
)

STORIES = {'train', 'eval'}
# Restoring or reading never executes what lay in a file.
LOADERS = {'pickle', '_pickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib'}
LOADERS |= {'yaml', 'builtins', 'runpy', 'imp', 'code', 'codeop', 'pty'}
WRITERS = {'yaml.SafeDumper', 'yaml.dump'}  # Of a loader, what only writes.
RUNNERS = {'eval', 'exec', '__import__', '__builtins__', 'os.system', 'os.popen'}
RUNNERS |= {'torch.load', 'jax.export'}
RUNNERS_OF_ANYTHING = {'read_pickle', 'deserialize', 'deserialize_and_load'}


def files(*patterns):
  return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


ROOMS = files('gated/**/*.py')
RECIPES = files('configs/**/*.py')
SHIPPED = [
  *ROOMS,
  *RECIPES,
  *files('train.py', 'eval.py', 'scripts/**/*.py', 'bench/**/*.py'),
]


def name(path):
  return str(path.relative_to(ROOT))


def imports(path):
  """File -> the dotted names it imports, wherever in the file, relative ones resolved."""
  package = path.relative_to(ROOT).parent.parts
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      module = '.'.join([*base, *([node.module] if node.module else [])])
      names |= {f'{module}.{alias.name}' for alias in node.names}
  return names


def tops(path):
  return {module.split('.')[0] for module in imports(path)}


def room(path):
  """File of gated/ -> its room: the name under gated/, None for gated/__init__.py."""
  first = path.relative_to(ROOT / 'gated').parts[0].removesuffix('.py')
  return None if first == '__init__' else first


@pytest.mark.parametrize('path', ROOMS, ids=name)
def test_a_wing_imports_itself_and_lower_wings_only(path):
  wing = room(path)
  # gated/__init__.py opens whatever wing `gated.load` needs.
  lower = {*WINGS[: WINGS.index(wing) + 1]} if wing else {*WINGS}
  used = {m.split('.')[1] for m in imports(path) if m.startswith('gated.')}
  assert used <= lower, f'{name(path)} may not import {sorted(used - lower)}'


@pytest.mark.parametrize('path', ROOMS, ids=name)
def test_a_room_sees_no_configdict_no_flag_and_no_story(path):
  assert not tops(path) & {'absl', 'ml_collections', 'configs', 'scripts', *STORIES}


@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_imports_recipes_only(path):
  assert tops(path) <= {'ml_collections', 'configs', 'collections', 'typing'}


@pytest.mark.parametrize('path', SHIPPED, ids=name)
def test_nothing_imports_a_story(path):
  assert not tops(path) & STORIES


@pytest.mark.parametrize('path', SHIPPED, ids=name)
def test_nothing_executes_what_it_reads(path):
  used = imports(path) - WRITERS
  assert not {m.split('.')[0] for m in used} & LOADERS and not used & RUNNERS
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
      used = ast.unparse(node)
      assert used not in RUNNERS and not used.startswith(('os.exec', 'os.spawn')), used
      assert used.rpartition('.')[2] not in RUNNERS_OF_ANYTHING, used
    if isinstance(node, ast.Call):
      call = ast.unparse(node.func)
      assert call != 'compile', 'compile(...) of a text'
      allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
      assert allowed.get('allow_pickle') in (None, 'False'), f'{call}(allow_pickle=True)'
      assert allowed.get('shell') in (None, 'False'), f'{call}(shell=True)'
      assert 'trust_remote_code' not in allowed, f'{call}(trust_remote_code=...)'


@pytest.mark.parametrize('path', SHIPPED, ids=name)
def test_a_file_fits_one_head(path):
  lines = len(path.read_text().splitlines())
  assert lines <= 350, f'{lines} lines: a file that wants to be two, or a folder'


def test_every_wing_stands_in_the_list_and_has_tests():
  assert {room(path) for path in ROOMS} - {None} == {*WINGS}
  assert [
    w for w in WINGS if not files(f'tests/test_{w}.py', f'tests/{w}/test_*.py')
  ] == []


def test_a_house_of_few_wings():
  entries = {path.relative_to(ROOT / 'gated').parts[0] for path in ROOMS}
  assert len(entries) <= 16
