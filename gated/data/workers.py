"""Child processes that exit when their parent dies: data workers, and runs of a sweep."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # Of prctl(2).
# A run saves and leaves at these.
IGNORED = signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU


def die_with_parent(*_) -> None:
  """Initializes a worker: it exits when its parent process dies.

  Otherwise it would wait forever, and keep its shared memory. A terminal and a scheduler
  send Ctrl-C and IGNORED to all processes; the parent decides, and still needs the
  worker. Takes and ignores the worker's index and count, which grain passes.
  """
  parent = multiprocessing.parent_process()
  assert parent
  for number in (signal.SIGINT, *IGNORED):
    signal.signal(number, signal.SIG_IGN)

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def terminate_with_parent() -> Callable[[], None] | None:
  """-> the preexec_fn of a command that gets SIGTERM when this process dies.

  None on other systems than Linux.
  """
  if sys.platform != 'linux':
    return None
  parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

  def request() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
      os._exit(128 + signal.SIGTERM)  # The parent died before the request.

  return request
