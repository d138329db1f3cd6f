"""Plain mappings -> the frozen dataclasses that each module defines, with checks.

A knob has one full name everywhere: `config.` and its path through the mapping, such as
`config.model.attn.gate.position`.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

C = TypeVar('C')


def build(cls: type[C], mapping: Mapping, name: str) -> C:
  """A mapping -> the frozen dataclass `cls`, nested ones included.

  `name` is the mapping's full name, such as 'config.model'. ValueError names a knob that
  is unknown, missing or of the wrong type.
  """
  hints = _hints(cls)
  for key in mapping:
    if key not in hints:
      raise ValueError(
        f'{name}.{key} is not a knob{nearest(f"{name}.{key}", hints, name)}'
      )
  missing = [key for key in hints if key not in mapping]
  if missing:
    raise ValueError(f'{name}.{missing[0]} is missing')
  fields = {key: coerce(hints[key], mapping[key], f'{name}.{key}') for key in hints}
  return cls(**fields)


_hints = functools.cache(typing.get_type_hints)


def nearest(knob: str, known: Iterable[str], prefix: str = '') -> str:
  """A mistyped knob, the known ones -> '; did you mean ...?', or all known ones."""
  names = [f'{prefix}.{key}' if prefix else key for key in known]
  group, _, last = knob.rpartition('.')
  # Prefer a close match in the same group to one with a similar long path.
  siblings = {n.rpartition('.')[2]: n for n in names if n.rpartition('.')[0] == group}
  close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
  if close:
    return f'; did you mean {siblings[close[0]]}?'
  close = [] if prefix else difflib.get_close_matches(knob, names, n=1, cutoff=0.6)
  if close:
    return f'; did you mean {close[0]}?'
  return f'; known are {", ".join(siblings.values() or names)}'


def check_command(argv: Iterable[str], known: Iterable[str]) -> None:
  """Raises ValueError for an unknown knob or a missing recipe on a command line.

  `known` holds the full names of all knobs. A recipe is a file with a `get_config`.
  """
  lines, known = '\n'.join(argv), list(known)
  for typed in re.findall(r'(?m)^--?(config\.[^=\s]*)', lines):
    if not any(f'{knob}.'.startswith(f'{typed}.') for knob in known):
      raise ValueError(f'{typed} is not a knob{nearest(typed, known)}')
  recipe = re.search(r'(?m)^--?config=([^:\n]+)', lines)
  if not recipe:
    return
  is_recipe = lambda path: path.is_file() and 'def get_config' in path.read_text()
  if not is_recipe(pathlib.Path(recipe[1])):
    files = sorted(pathlib.Path('configs').glob('*.py'))
    recipes = ', '.join(str(path) for path in files if is_recipe(path))
    raise ValueError(f'--config={recipe[1]!r} is not a recipe; recipes here: {recipes}')


def plain(error: Exception) -> str:
  """An error's message in one line, without the traceback that ml_collections adds."""
  message = str(error)
  if 'Traceback' in message:
    message = message.split('Error: ')[-1]
  return ' '.join(message.split())


def coerce(hint: Any, value: Any, name: str) -> Any:
  """A value -> the same, of the type `hint`; ValueError with the knob's name.

  An integer becomes a float; a float must be finite; a mapping becomes a dataclass.
  """
  if type(value) is hint and hint is not float:
    return value  # A fast path, for files with many entries.
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ValueError(f'{name}={value!r}, but a group of knobs is expected')
    return build(typing.cast(type, hint), value, name)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if typing.get_origin(hint) is dict:
    if not isinstance(value, Mapping):
      raise ValueError(f'{name}={value!r}, but a group of knobs is expected')
    element = typing.get_args(hint)[1]
    return {k: coerce(element, v, f'{name}.{k}') for k, v in value.items()}
  if isinstance(hint, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ValueError(f'{name}={value!r}, but a tuple is expected')
    element = typing.get_args(hint)[0]
    return tuple(coerce(element, v, f'{name}[{i}]') for i, v in enumerate(value))
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ValueError(f'{name}={value!r}, but a {hint.__name__} is expected')
  if hint is float and not math.isfinite(value):
    raise ValueError(f'{name}={value!r}, but a finite number is expected')
  return value


def one_of(name: str, value: Any, allowed: Iterable) -> None:
  """Raises ValueError, naming the knob, unless `value` is one of `allowed`."""
  if value not in allowed:
    raise ValueError(f'{name}={value!r}, but allowed are {", ".join(map(repr, allowed))}')


def at_least(name: str, value: float, low: float) -> None:
  """Raises ValueError, naming the knob, unless `value >= low`."""
  if not value >= low:
    raise ValueError(f'{name}={value!r}, but it must be at least {low}')


def positive(name: str, value: float) -> None:
  """Raises ValueError, naming the knob, unless `value > 0`."""
  if not value > 0:
    raise ValueError(f'{name}={value!r}, but it must be positive')


def within(name: str, value: float, low: float, high: float) -> None:
  """Raises ValueError, naming the knob, unless `low <= value <= high`."""
  at_least(name, value, low)
  if value > high:
    raise ValueError(f'{name}={value!r}, but {high} is the most')


def nests(value: Any, levels: int) -> bool:
  """Whether lists and mappings are nested deeper than `levels`."""
  if not isinstance(value, (list, dict)):
    return False
  inner = value.values() if isinstance(value, dict) else value
  return levels == 0 or any(nests(item, levels - 1) for item in inner)


def divides(name: str, value: int, by: str, divisor: int) -> None:
  """Raises ValueError, naming both knobs, unless `divisor` divides `value`."""
  if divisor < 1 or value % divisor:
    raise ValueError(f'{name}={value} must be a multiple of {by}={divisor}')


def flatten(mapping: Mapping, name: str = 'config') -> dict[str, Any]:
  """A nested mapping -> {full knob name: value}."""
  flat = {}
  for key, value in mapping.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{name}.{key}')
    else:
      flat[f'{name}.{key}'] = list(value) if isinstance(value, tuple) else value
  return flat


def dig(mapping: Mapping, knob: str) -> Any:
  """A nested mapping and a dotted name -> the value; ValueError if it is missing."""
  value: Any = mapping
  for key in knob.split('.'):
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'{knob} is missing')
    value = value[key]
  return value


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
  """Two nested mappings -> {full knob name: (old value, new value)} where they differ."""
  a, b = flatten(old), flatten(new)
  return {
    knob: (a.get(knob), b.get(knob))
    for knob in sorted(a.keys() | b.keys())
    if knob not in a or knob not in b or a[knob] != b[knob]
  }


def digest(obj: Any) -> str:
  """A JSON-serializable value -> the SHA-256 of its canonical form, in hexadecimal."""
  text = json.dumps(obj, sort_keys=True, separators=(',', ':'), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()
