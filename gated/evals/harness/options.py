"""The flags of an evaluation on tasks, and their values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config


@dataclass(frozen=True, kw_only=True)
class Options:
  """Tasks, and how many of their items. ValueError for an option out of range."""

  tasks: tuple[str, ...]  # names of tasks, groups or tags of lm-eval
  limit: int = 0  # items of each task; 0 for all
  fewshot: int = -1  # examples before each item; -1 for each task's own number
  task_path: tuple[str, ...] = ()  # folders of further tasks
  batch: int = 0  # rows per device at a time; 0 for a number of tokens
  length: int = 0  # tokens that the model reads at most; 0 for the model's own number

  def __post_init__(self):
    config.at_least('limit', self.limit, 0)
    config.at_least('fewshot', self.fewshot, -1)
    if len({*self.tasks}) < len(self.tasks):
      raise ValueError(f'tasks={",".join(self.tasks)} has a task twice')


def define(flags: Any, *, excludes: Sequence[str]) -> Callable[[], Options | None]:
  """Defines --tasks and its options -> a function that reads them; None without --tasks.

  --batch and --length are options too, if they are given. The function raises ValueError,
  with the flag's name, for a wrong value, an option without --tasks, or a flag of
  `excludes` with --tasks. `flags` is absl's module.
  """
  own = {
    'tasks': flags.DEFINE_list('tasks', [], 'Tasks of lm-eval (docs/evaluation.md).'),
    'limit': flags.DEFINE_integer('limit', 0, 'With --tasks: items per task; 0: all.'),
    'fewshot': flags.DEFINE_integer(
      'fewshot', -1, "With --tasks: examples before an item; -1: the task's own number."
    ),
    'task_path': flags.DEFINE_list('task_path', [], 'With --tasks: folders of tasks.'),
  }

  def read() -> Options | None:
    chosen = flags.FLAGS['tasks'].present
    for name in excludes if chosen else [*own]:
      if flags.FLAGS[name].present:
        side, value = 'with' if chosen else 'without', flags.FLAGS[name].value
        raise ValueError(f'--{name}={value!r} is not allowed {side} --tasks')
    if not chosen:
      return None
    values: dict[str, Any] = {name: flag.value for name, flag in own.items()}
    shared = (flags.FLAGS[name] for name in ('batch', 'length'))
    values |= {flag.name: flag.value for flag in shared if flag.present}
    values |= {name: tuple(values[name]) for name in ('tasks', 'task_path')}
    if not values['tasks'] or not all(values['tasks']):
      raise ValueError(f'--tasks={",".join(values["tasks"])} has an empty name')
    try:
      return Options(**values)
    except ValueError as error:
      raise ValueError(f'--{error}') from error

  return read
