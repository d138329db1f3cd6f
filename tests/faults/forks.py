"""Runs many commands, each in a fork of one process that has imported the packages.

  python tests/faults/forks.py COMMANDS.json

A command has 'args' (as for `python ARGS`), 'cwd', the files 'out' and 'err', and 'env'.
The exit codes are printed as a JSON list. An import takes seconds, a fork none; the
script itself is read by the fork, as a program of its own.
"""

import importlib
import json
import os
import runpy
import sys

# What the programs import. None of it opens a device, so a fork is safe.
PACKAGES = 'gated.plan', 'gated.sweep.report', 'gated.sweep.launch.desk', 'gated.hf'
PACKAGES += 'gated.data.prepare', 'gated.plan.evaluation', 'gated.pods.preflight'


def run(command: dict) -> int:
  """A command -> its exit code; negative for a signal."""
  sys.stdout.flush()
  if pid := os.fork():
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  code = 1
  try:
    for number, name in ((1, 'out'), (2, 'err')):
      os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= command['env']
    os.chdir(command['cwd'])
    sys.argv = command['args']
    runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name='__main__')
    code = 0
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else bool(end.code)
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
  except BaseException:
    sys.excepthook(*sys.exc_info())
  finally:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os._exit(code)


if __name__ == '__main__':
  ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  for package in PACKAGES:
    importlib.import_module(package)
  with open(sys.argv[1]) as file:
    commands = json.load(file)
  print(json.dumps([run(command) for command in commands]))
