"""Starts programs as forks of one process that has imported the packages.

  python tests/faults/forks.py SOCKET

An import takes seconds, a fork milliseconds. A program reads its own script, has its own
environment and files, and ends as the interpreter ends it. `Forks` is the other side.

A request is JSON with 'args' (as for `python ARGS`), 'cwd', 'env' and 'group', and three
open files: for standard output, for standard error, and a pipe that gets a line with the
program's number when it starts and one with its exit code when it ends.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys

# What the programs import. None of it opens a device or starts a thread.
PACKAGES = 'gated.plan', 'gated.sweep.report', 'gated.sweep.launch.desk', 'gated.hf'
PACKAGES += 'gated.data.prepare', 'gated.plan.evaluation', 'gated.pods.preflight'
PACKAGES += 'grain', 'tensorboardX'


def serve(requests: socket.socket) -> dict:
  """Forks for every request; returns the request in the fork, never in the server."""
  while True:
    message, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
    if not message:  # The other side is gone.
      os._exit(0)
    if not os.fork():
      break
    for file in files:
      os.close(file)
    while _ended():
      pass
  out, err, pipe = files
  if program := os.fork():  # This process waits, so that the server need not.
    os.write(pipe, f'{program}\n'.encode())
    _, status = os.waitpid(program, 0)
    os.write(pipe, f'{os.waitstatus_to_exitcode(status)}\n'.encode())
    os._exit(0)
  requests.close()
  os.dup2(out, 1)
  os.dup2(err, 2)
  for file in files:
    os.close(file)
  return json.loads(message)


def _ended() -> bool:
  """Whether a fork had ended, which is removed."""
  try:
    return os.waitpid(-1, os.WNOHANG)[0] > 0
  except ChildProcessError:
    return False


if __name__ == '__main__':
  asked = socket.socket(fileno=int(sys.argv[1]))
  for package in PACKAGES:
    importlib.import_module(package)
  gc.freeze()  # A collection would copy the pages that forks share.
  command = serve(asked)
  if command['group']:
    os.setsid()
  for name in set(os.environ) - set(command['env']):
    del os.environ[name]
  os.environ |= command['env']
  os.chdir(command['cwd'])
  sys.argv = command['args']
  sys.path[0] = os.path.dirname(sys.argv[0])
  runpy.run_path(sys.argv[0], run_name='__main__')
