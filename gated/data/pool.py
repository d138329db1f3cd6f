"""Jobs in several processes; a process that is killed is reported with its job."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import tqdm

from gated.data import workers
from gated.data.progress import Progress

# run(function, jobs, label) -> the results, in order; may use several processes.
Run = Callable[[Callable[[Any], Any], Sequence[Any], str], list]


@contextlib.contextmanager
def start(processes: int, place: Callable[[Any], str]) -> Generator[Run, None, None]:
  """Yields a Run over so many processes; with 1, it runs in this process.

  place(job) -> the files of a job, for the message about a process that was killed.
  """
  if processes == 1:
    yield lambda function, jobs, label: _shown(map(function, jobs), jobs, label)
    return
  # Spawn, because forking a process that has threads can hang.
  spawn = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(
    processes, spawn, workers.die_with_parent
  )

  def run(function: Callable, jobs: Sequence[Any], label: str) -> list:
    with tempfile.TemporaryDirectory() as folder:
      marked = functools.partial(_marked, function, folder)
      results = executor.map(marked, range(len(jobs)), jobs)
      children = multiprocessing.active_children()
      try:
        return _shown(results, jobs, label)
      except concurrent.futures.process.BrokenProcessPool as error:
        files = [place(jobs[i]) for i in _killed(children, folder)]
        at = f', at {"; ".join(files)}' if files else ''
        raise ValueError(
          f'{label}: a process was killed, most likely for memory{at}. Fewer --processes '
          'need less memory'
        ) from error

  try:
    yield run
  except KeyboardInterrupt:
    for child in multiprocessing.active_children():
      child.terminate()  # It ignores Ctrl-C, and its job may be long.
    raise
  finally:
    executor.shutdown(cancel_futures=True)


def _marked(function: Callable, folder: str, index: int, job: Any) -> Any:
  """Calls the function, after it noted which job this process has."""
  pathlib.Path(folder, str(os.getpid())).write_text(str(index))
  return function(job)


def _killed(children: list, folder: str) -> Iterator[int]:
  """-> the jobs of processes that died; the executor ends the others by SIGTERM."""
  for child in children:
    child.join(1)
    note = pathlib.Path(folder, str(child.pid))
    if child.exitcode not in (None, 0, -signal.SIGTERM) and note.is_file():
      yield int(note.read_text())


def _shown(results: Iterable[Any], jobs: Sequence[Any], label: str) -> list:
  bar = tqdm.tqdm(results, label, len(jobs), unit='unit', disable=None)
  with Progress(label, total=len(jobs), unit='units', enabled=bar.disable) as progress:
    return list(progress.over(bar))
