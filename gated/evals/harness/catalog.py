"""Names of tasks -> lm-eval's tasks with their data, or a refusal by name."""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from gated.evals.harness.adapter import OPTIONS

OURS = Path(__file__).parent / 'tasks'
# Of the `datasets` package: builders that read the files they are given.
READERS = ('arrow', 'csv', 'json', 'pandas', 'parquet', 'text', 'xml')
ALIASES = {'max_new_tokens', 'max_tokens', 'max_completion_tokens'}


class Catalog(TaskManager):
  """lm-eval's tasks, ours and those of further folders; loads tasks once.

  ValueError names --task_path if a folder does not exist.
  """

  def __init__(self, folders: Sequence[str] = ()):
    for folder in folders:
      if not Path(folder).expanduser().is_dir():
        raise ValueError(f'--task_path={folder}: no such folder')
    places: list[str | Path] = [OURS, *(Path(x).expanduser() for x in folders)]
    # It advises other options than those of eval.py.
    advice = lambda record: 'Custom kwargs can be' not in record.getMessage()
    logging.getLogger('lm_eval.api.task').addFilter(advice)
    super().__init__(include_path=places)
    self._loaded: Any = None

  def load(self, task_list: Any) -> Any:
    if self._loaded is None:
      self._loaded = super().load(task_list)
    return self._loaded

  def check(self, names: Sequence[str]) -> None:
    """ValueError lists near names for one that is unknown."""
    for name in names:
      if name not in self.task_index:
        near = difflib.get_close_matches(name, self.all_tasks, n=5, cutoff=0.5)
        hint = f'; near: {", ".join(near)}' if near else ''
        raise ValueError(f'--tasks={name}: no such task, group or tag{hint}')

  def downloads(self, names: Sequence[str]) -> dict[str, list[str]]:
    """Names -> {data set of a hub: the tasks that need it}; others are local."""
    sets: dict[str, list[str]] = {}
    for task, cfg in self.leaves(names):
      if (path := remote(cfg)) is not None:
        sets.setdefault(path, []).append(task)
    return sets

  def read(self, names: Sequence[str]) -> None:
    """Loads the tasks with their data; ValueError names the task and its data set."""
    try:
      tasks = self.load([*names])['tasks']
    except Exception as error:
      raise self._fault(names, error) from error
    for name, task in tasks.items():
      kwargs = getattr(task.config, 'generation_kwargs', None) or {}
      if unknown := sorted({*kwargs} - OPTIONS - ALIASES):
        raise ValueError(f'--tasks={name}: its generation_kwargs.{unknown[0]} is unknown')

  def _fault(self, names: Sequence[str], error: Exception) -> ValueError:
    """An error while tasks were loaded -> the same with the task and its data set."""
    for task, cfg in self.leaves(names):
      try:
        super().load([task])
      except Exception as own:
        path = cfg.get('dataset_path')
        first = (str(own) or repr(own)).strip().splitlines()[0]
        of = f'its data set {path} cannot be had' if path else 'it cannot be loaded'
        return ValueError(f'--tasks={task}: {of}: {first}')
    return ValueError(f'--tasks={",".join(names)}: {error}')

  def leaves(self, specs: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, or entries of a group -> the tasks in them and their YAML's content."""
    for spec in specs:
      own = {} if isinstance(spec, str) else dict(spec)
      name = spec if isinstance(spec, str) else own.get('group', own.get('task'))
      entry = self.task_index.get(name) if isinstance(name, str) else None
      if entry is not None and entry.yaml_path is None and entry.tags:
        yield from self.leaves(sorted(entry.tags))
        continue
      cfg = {**((entry.cfg or {}) if entry else {}), **own}
      members = cfg.get('task') if isinstance(cfg.get('task'), list) else None
      if members is None and entry and isinstance((entry.cfg or {}).get('task'), list):
        members = (entry.cfg or {})['task']
      if members is not None:
        yield from self.leaves(members)
      else:
        yield str(name), cfg


def remote(cfg: Mapping[str, Any]) -> str | None:
  """The YAML of a task -> its data set on a hub, or None for local files or code."""
  path = cfg.get('dataset_path')
  if path is None or cfg.get('custom_dataset') is not None:
    return None
  files = (cfg.get('dataset_kwargs') or {}).get('data_files')
  if path in READERS and not any('://' in str(file) for file in _values(files)):
    return None
  return None if os.path.isdir(path) else path


def _values(tree: Any) -> Iterator[Any]:
  """The leaves of nested lists and mappings."""
  if isinstance(tree, Mapping):
    tree = tree.values()
  elif not isinstance(tree, (list, tuple)):
    yield tree
    return
  for each in tree:
    yield from _values(each)
