"""The command line of a recipe: its errors, its help, and the resolved recipe.

The programs pass absl's flags and `configs/base.py` as arguments: `defaults.get_config()`
has all knobs, and `defaults.PRESETS` the named presets of groups of knobs.
"""

import ast
import difflib
import functools
import math
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from yaml import dump

from gated import config, hf
from gated.run import exit_codes

WIDTH = 90
TYPED = r'(?m)^--?(config\.[^=\s]*)[=\n]?(.*)'  # A knob of a command line, its value.
RECIPES = """
--config=configs/RECIPE.py[:ARGUMENT] selects a recipe. A wrong argument lists the allowed
ones. The recipes in configs/:

{recipes}

--config.KNOB=VALUE changes a knob, such as --config.optim.lr=1e-3 or
--config.model.attn.gate.position=value. configs/base.py explains every knob.
"""


def define_recipe(flags: Any, config_flags: Any, **options: Any) -> Any:
  """Defines the flag --config -> its holder; exits with 2 if --flagfile cannot be read.

  `flags` and `config_flags` are the modules of absl and ml_collections; `options` are
  those of DEFINE_config_file.
  """
  define = config_flags.DEFINE_config_file
  try:
    return define('config', None, 'Recipe.', lock_config=True, **options)
  except flags.Error as error:  # It looks for its value before flags are parsed.
    print(f'{os.path.basename(sys.argv[0])}: {config.plain(error)}', file=sys.stderr)
    sys.exit(exit_codes.REFUSED)


def parse(
  argv: Sequence[str], flags: Any, defaults: Any, doc: str | None, *, folder: str = ''
) -> None:
  """Parses a command line into `flags`; ValueError says in one line what is wrong.

  `folder` is the flag that takes a folder. --help prints `doc`, the recipes and the
  flags, and exits.
  """
  if {'--help', '-h'} & set(argv[1:]):
    print(usage(doc or '', flags))
    sys.exit(0)
  knobs = config.flatten(defaults.get_config().to_dict()) if defaults else {}
  _check(argv, knobs, defaults.PRESETS if defaults else {})
  try:
    left = flags(argv)
  except Exception as error:
    raise ValueError(_reason(error, argv, knobs, flags)) from error
  if left[1:]:
    raise ValueError(_unknown(left[1], knobs, folder))
  if knobs and flags['config'].present:
    c = flags['config'].value
    if not (isinstance(c, type(defaults.get_config())) and 'name' in c):
      raise ValueError(
        f'--config: get_config() of the recipe returned a {type(c).__name__} without the '
        'knobs of configs/base.py: begin with base.get_config(), and return it'
      )
    _take_model(c, argv)


def _take_model(c: Any, argv: Sequence[str]) -> None:
  """Sets the knobs of `model` from config.model_from, except those set in `argv`."""
  if 'model_from' not in c or not (folder := c.model_from):
    return
  try:
    found = hf.model_knobs(folder, c.model.to_dict())
  except ValueError as error:
    raise ValueError(f'config.model_from={folder!r}: {error}') from error
  typed = {knob for knob, _ in re.findall(TYPED, '\n'.join(argv))}
  for knob, value in found.items():
    if knob not in typed:
      *path, last = knob.split('.')[1:]
      functools.reduce(lambda group, key: group[key], path, c)[last] = value


def _unknown(word: str, knobs: Mapping, folder: str) -> str:
  """An argument that is not a flag -> the message of its error."""
  name, equals, value = word.partition('=')
  meant = ''
  if equals and (knob := config.namesake(f'config.{name}', knobs)):
    meant = f'{knob}={value}'
  elif knobs and _is_recipe(pathlib.Path(word)):
    meant = f'config={word}'
  elif folder and pathlib.Path(word).is_dir():
    meant = f'{folder}={word}'
  return f'unknown argument {word!r}' + (f'; did you mean --{meant}?' if meant else '')


def usage(doc: str, flags: Any) -> str:
  """The text of --help: a program's docstring, the recipes, the flags."""
  recipes = RECIPES.format(recipes='\n'.join(_recipes())) if 'config' in flags else ''
  return f'{doc.strip()}\n{recipes}\nFlags:\n' + '\n'.join(_described(flags))


def _recipes() -> list[str]:
  """The recipes below the current folder, each with the first line of its docstring."""
  lines = []
  for path in _found():
    try:
      text = ast.get_docstring(ast.parse(path.read_bytes())) or ''
    except (SyntaxError, ValueError) as error:
      text = f'(cannot be read: {error})'
    lines.append(f'  {path.name:14}{text.partition(chr(10))[0]}')
  return lines


def _found() -> list[pathlib.Path]:
  paths = sorted(pathlib.Path('configs').glob('*.py'))
  return [path for path in paths if _is_recipe(path)]


def _is_recipe(path: pathlib.Path) -> bool:
  return (
    path.suffix == '.py' and path.is_file() and b'def get_config' in path.read_bytes()
  )


def _described(flags: Any) -> list[str]:
  """The flags of a program and of gated -> lines with their defaults."""
  lines = []
  for module, entries in flags.flags_by_module_dict().items():
    if module != sys.argv[0] and not module.startswith('gated.'):
      continue
    for flag in entries:
      default = '' if flag.default in (None, '', False, []) else f' ({flag.default})'
      text = flag.help.partition(';\n')[0]  # Without absl's remarks.
      text = f'  --{flag.name:16} {text}{default}'
      lines += textwrap.wrap(text, WIDTH, subsequent_indent=' ' * 21)
  return lines


def _check(argv: Sequence[str], knobs: Mapping[str, Any], presets: Mapping) -> None:
  """Raises ValueError for an unknown knob, a group, or a missing recipe."""
  lines = '\n'.join(argv)
  recipe = re.search(r'(?m)^--?config[=\n]([^:\n]*)', lines)
  typed = re.findall(TYPED, lines)
  for knob, value in typed:
    if knob in knobs:
      continue
    inside = config.members(knob, knobs)
    if not inside:
      raise ValueError(f'{knob} is not a knob{config.nearest(knob, knobs)}')
    raise ValueError(_group(knob, value, inside, presets))
  if (recipe or typed) and not (recipe and recipe[1]):
    raise ValueError('--config=configs/RECIPE.py is missing')
  if recipe and not _is_recipe(pathlib.Path(recipe[1])):
    paths = {path.stem: str(path) for path in _found()}
    stem = pathlib.Path(recipe[1]).stem
    close = difflib.get_close_matches(stem, paths, n=1)
    hint = f'did you mean --config={paths[close[0]]}? ' if close else ''
    known = f'recipes here: {", ".join(paths.values())}'
    raise ValueError(f'--config={recipe[1]!r} is not a recipe; {hint}{known}')


def _group(group: str, value: str, inside: Mapping[str, str], presets: Mapping) -> str:
  """The message for a value that was given to a group of knobs."""
  named = presets.get(group.removeprefix('config.'), {})
  chosen = {value: named[value]} if value in named else named
  texts = [
    f'{name} is ' + ' '.join(f'--{group}.{k}={v}' for k, v in knobs.items())
    for name, knobs in chosen.items()
  ]
  text = f'{group} is a group of knobs: {", ".join(inside)}'
  return f'{text}; presets: {"; ".join(texts)}' if texts else text


def _reason(error: Exception, argv: Sequence[str], knobs: Mapping, flags: Any) -> str:
  """An error of absl or ml_collections -> its message in one line."""
  name = getattr(error, 'flagname', '')  # Of absl's UnrecognizedFlagError.
  if name and (knob := config.namesake(f'config.{name}', knobs)):
    values = re.findall(rf'(?m)^--?{re.escape(name)}[=\n]([^-].*)', '\n'.join(argv))
    value = (*values, 'VALUE')[0]
    return f'--{name} is not a flag; knobs are set by their path: --{knob}={value}'
  if name:
    close = difflib.get_close_matches(name, list(flags), n=1)
    hint = f'did you mean --{close[0]}?' if close else '--help lists the flags'
    return f'--{name} is not a flag; {hint}'
  text = config.plain(error)
  match = re.match(r'flag --(config\.[\w.]+)=(.*?): ', text)
  if match and match[1] in knobs:
    kind = type(knobs[match[1]]).__name__
    return f'{match[1]}={match[2]!r}, but a value of type {kind} is expected'
  return text


def as_yaml(c: Mapping, defaults: Mapping) -> str:
  """A resolved recipe -> YAML; a comment marks each knob that differs from `defaults`."""
  return '\n'.join(_yaml(c, 'config', config.flatten(defaults)))


def _yaml(c: Mapping, name: str, defaults: Mapping) -> Iterable[str]:
  indent = '  ' * name.count('.')
  for key, value in c.items():
    knob = f'{name}.{key}'
    if isinstance(value, Mapping) and value:
      yield f'{indent}{key}:'
      yield from _yaml(value, knob, defaults)
      continue
    value = list(value) if isinstance(value, tuple) else value
    same = knob in defaults and value == defaults[knob]
    default = _flow(defaults[knob]) if knob in defaults else 'missing'
    mark = '' if same or value == {} else f'  # base: {default}'
    yield f'{f"{indent}{key}: {_flow(value)}":38}{mark}'.rstrip()


def _flow(value: Any) -> str:
  """A value -> YAML in one line."""
  text = dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
  return text.removesuffix('...\n').strip()
