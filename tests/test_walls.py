"""The rules of the code: which imports and calls are allowed, and how long a file is.

A file of gated/ imports its own package and lower ones only. If a rule is in the way,
look for the package that the code belongs in before changing the rule.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What is in gated/, lowest first: each imports itself and those before it.
PACKAGES = (
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

PROGRAMS = {'train', 'eval'}
# Restoring or reading never executes what lay in a file.
LOADERS = {'pickle', '_pickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib'}
LOADERS |= {'yaml', 'builtins', 'runpy', 'imp', 'code', 'codeop', 'pty'}
WRITERS = {'yaml.SafeDumper', 'yaml.dump'}  # Of a loader, what only writes.
RUNNERS = {'eval', 'exec', '__import__', '__builtins__', 'os.system', 'os.popen'}
RUNNERS |= {'torch.load', 'jax.export'}
RUNNERS_OF_ANYTHING = {'read_pickle', 'deserialize', 'deserialize_and_load'}


def files(*patterns):
  return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


MODULES = files('gated/**/*.py')
RECIPES = files('configs/**/*.py')
SHIPPED = [
  *MODULES,
  *RECIPES,
  *files('train.py', 'eval.py', 'scripts/**/*.py', 'bench/**/*.py'),
]


def name(path):
  return str(path.relative_to(ROOT))


def imports(path):
  """File -> the dotted names it imports, wherever in the file, relative ones resolved."""
  parents = path.relative_to(ROOT).parent.parts
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = parents[: len(parents) - node.level + 1] if node.level else ()
      module = '.'.join([*base, *([node.module] if node.module else [])])
      names |= {f'{module}.{alias.name}' for alias in node.names}
  return names


def tops(path):
  return {module.split('.')[0] for module in imports(path)}


def package(path):
  """File of gated/ -> its package: the name under gated/, None for gated/__init__.py."""
  first = path.relative_to(ROOT / 'gated').parts[0].removesuffix('.py')
  return None if first == '__init__' else first


@pytest.mark.parametrize('path', MODULES, ids=name)
def test_a_package_imports_itself_and_lower_packages_only(path):
  own = package(path)
  # gated/__init__.py imports any package that `gated.load` needs.
  lower = {*PACKAGES[: PACKAGES.index(own) + 1]} if own else {*PACKAGES}
  used = {m.split('.')[1] for m in imports(path) if m.startswith('gated.')}
  assert used <= lower, f'{name(path)} may not import {sorted(used - lower)}'


@pytest.mark.parametrize('path', MODULES, ids=name)
def test_a_module_imports_no_configdict_no_flag_and_no_program(path):
  assert not tops(path) & {'absl', 'ml_collections', 'configs', 'scripts', *PROGRAMS}


@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_imports_recipes_only(path):
  assert tops(path) <= {'ml_collections', 'configs', 'collections', 'typing'}


@pytest.mark.parametrize('path', SHIPPED, ids=name)
def test_nothing_imports_a_program(path):
  assert not tops(path) & PROGRAMS


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
def test_a_file_has_at_most_350_lines(path):
  lines = len(path.read_text().splitlines())
  assert lines <= 350, f'{lines} lines: split the file into two, or a folder'


def test_every_package_is_in_the_list_and_has_tests():
  assert {package(path) for path in MODULES} - {None} == {*PACKAGES}
  assert [
    p for p in PACKAGES if not files(f'tests/test_{p}.py', f'tests/{p}/test_*.py')
  ] == []


def test_gated_has_at_most_16_packages_and_modules():
  entries = {path.relative_to(ROOT / 'gated').parts[0] for path in MODULES}
  assert len(entries) <= 16
