"""The flags of RULER, and their values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config
from gated.evals.ruler.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Options:
  """Lengths and tasks, and how to measure. ValueError for an option out of range."""

  ruler: tuple[int, ...]  # tokens of prompt and answer, at most
  tasks: tuple[str, ...] = tuple(TASKS)
  limit: int = 100  # items of each task and length
  batch: int = 0  # rows per device at a time; 0 for a number of tokens
  beside: tuple[str, ...] = ()  # other models
  loss_only: bool = False  # the loss and rank of the answers; nothing is generated
  figures: bool = False  # draws the table

  def __post_init__(self):
    for length in self.ruler:
      config.at_least('ruler', length, 1)
    config.at_least('limit', self.limit, 1)
    for name in self.tasks:
      if name not in TASKS:
        near = config.nearest(name, TASKS)
        raise ValueError(f'tasks={name}: RULER has no such task{near}')
    for knob in ('ruler', 'tasks'):
      values = getattr(self, knob)
      if not values or len({*values}) < len(values):
        raise ValueError(
          f'{knob}={",".join(map(str, values))} is empty, or repeats itself'
        )


def define(flags: Any, *, excludes: Sequence[str]) -> Callable[[], Options | None]:
  """Defines --ruler and --loss_only -> a function that reads them; None without --ruler.

  --tasks, --limit, --batch, --beside and --figures are options too, if they are given.
  The function raises ValueError, with the flag's name, for a wrong value, or a flag of
  `excludes` with --ruler. `flags` is absl's module.
  """
  flags.DEFINE_list('ruler', [], 'RULER at these lengths in tokens (docs/evaluation.md).')
  flags.DEFINE_boolean(
    'loss_only', False, 'With --ruler: only the loss and rank of the answers.'
  )

  def read() -> Options | None:
    given = {name: flags.FLAGS[name] for name in (*fields, *excludes)}
    if not given['ruler'].present:
      if given['loss_only'].present:
        raise ValueError('--loss_only is not allowed without --ruler')
      return None
    for name in excludes:
      if given[name].present and name not in fields:
        raise ValueError(f'--{name}={given[name].value!r} is not allowed with --ruler')
    values: dict[str, Any] = {
      name: given[name].value for name in fields if given[name].present
    }
    if not all(length.strip().isdigit() for length in values['ruler']):
      raise ValueError(f'--ruler={",".join(values["ruler"])}, but numbers are expected')
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values['ruler'] = tuple(map(int, values['ruler']))
    try:
      return Options(**values)
    except ValueError as error:
      raise ValueError(f'--{error}') from error

  fields = Options.__dataclass_fields__
  return read
