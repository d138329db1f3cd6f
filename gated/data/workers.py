"""The worker processes of data preparation and of training's data loading."""

import multiprocessing
import os
import threading


def die_with_parent(*_) -> None:
  """Initializes a worker: it exits when its parent process dies.

  Otherwise it would wait forever, and keep its shared memory. Takes and ignores the
  worker's index and count, which grain passes.
  """
  parent = multiprocessing.parent_process()
  assert parent

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
