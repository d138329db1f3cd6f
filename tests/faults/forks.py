"""Starts programs as forks of one process that has imported the packages.

  python tests/faults/forks.py SOCKET

An import takes seconds, a fork milliseconds. A program reads its own script, has its own
environment and files, and exits with the code that the interpreter gives it.
`process.Forks` sends the requests.

A request is JSON with 'args' (as for `python ARGS`), 'cwd', 'env' and 'group', and three
open files: for standard output, for standard error, and a pipe that gets a line with the
program's pid when it starts and one with its exit code when it ends.
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
    while _reaped():
      pass
  requests.close()
  out, err, pipe = files
  if program := os.fork():  # This process waits, so that the server need not.
    end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    os.write(pipe, f'{code}\n'.encode())
    os.waitpid(program, 0)  # Others may get its pid only after its end is known.
    os._exit(0)
  request = json.loads(message)
  if request['group']:
    os.setsid()
  os.write(pipe, f'{os.getpid()}\n'.encode())
  os.dup2(out, 1)
  os.dup2(err, 2)
  for file in files:
    os.close(file)
  return request


def _reaped() -> bool:
  """Reaps one fork that has ended -> whether there was one."""
  try:
    return os.waitpid(-1, os.WNOHANG)[0] > 0
  except ChildProcessError:
    return False


if __name__ == '__main__':
  requests = socket.socket(fileno=int(sys.argv[1]))
  for package in PACKAGES:
    importlib.import_module(package)
  gc.freeze()  # A collection would copy the pages that forks share.
  request = serve(requests)
  for name in set(os.environ) - set(request['env']):
    del os.environ[name]
  os.environ |= request['env']
  os.chdir(request['cwd'])
  sys.argv = request['args']
  sys.path[0] = os.path.dirname(sys.argv[0])
  runpy.run_path(sys.argv[0], run_name='__main__')
