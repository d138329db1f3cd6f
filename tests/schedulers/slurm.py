"""A stand-in for SLURM on one machine, without a queue.

The scripts `sbatch`, `srun`, `squeue`, `scancel` and `scontrol` in this folder call it.
It supports a subset of the options at slurm.schedmd.com and refuses all others. Its state
is in the folder $SLURM_STANDIN: JOB/ has the batch script, and the state and process ID
of each task.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

SBATCH = (
  *('job-name', 'array', 'partition', 'time', 'nodes', 'ntasks-per-node', 'account'),
  *('gpus-per-node', 'cpus-per-task', 'mem', 'signal', 'open-mode', 'output', 'requeue'),
  *('qos', 'constraint', 'exclusive'),
)
WAITING = ('PENDING', 'RUNNING', 'REQUEUED')
KILL_WAIT = 20  # Seconds from SIGTERM to SIGKILL.


def sbatch(argv):
  parser = argparse.ArgumentParser('sbatch', allow_abbrev=False)
  parser.add_argument('--parsable', action='store_true')
  for name in SBATCH:
    bare = {'action': 'store_true'} if name in ('requeue', 'exclusive') else {}
    parser.add_argument(f'--{name}', **bare)
  parser.add_argument('script', type=Path)
  args = parser.parse_args(argv)
  text = args.script.read_text()
  assert text.startswith('#!'), 'This does not look like a batch script.'
  headers = []
  for line in text.splitlines()[1:]:
    if line and not line.startswith('#'):
      break  # SLURM reads no headers after the first command.
    if line.startswith('#SBATCH'):
      headers += shlex.split(line.removeprefix('#SBATCH'))
  options = vars(parser.parse_args([*headers, *argv]))
  first, last, limit = re.fullmatch(r'(\d+)-(\d+)(?:%(\d+))?', options['array']).groups()
  number = _number()
  folder = _root() / str(number)
  folder.mkdir(parents=True)
  (folder / 'script').write_text(text)
  tasks = list(range(int(first), int(last) + 1))
  job = {k: v for k, v in options.items() if k != 'script'}
  job |= {'number': number, 'tasks': tasks, 'limit': int(limit or len(tasks))}
  (folder / 'job.json').write_text(json.dumps(job))
  for task in tasks:
    _write(folder, task, state='PENDING', restarts=0)
  subprocess.Popen(
    [sys.executable, __file__, 'run', str(folder)],
    stdin=subprocess.DEVNULL,
    stdout=(folder / 'daemon').open('wb'),
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )
  print(number if args.parsable else f'Submitted batch job {number}')


def run(argv):
  """Runs all tasks of a job, at most `limit` at the same time."""
  folder = Path(argv[0])
  job = json.loads((folder / 'job.json').read_text())
  places = threading.Semaphore(job['limit'])
  threads = []
  for task in job['tasks']:
    places.acquire()
    threads.append(threading.Thread(target=_task, args=(folder, job, task, places)))
    threads[-1].start()
  for thread in threads:
    thread.join()


def _task(folder, job, task, places):
  restarts = 0
  while _run_once(folder, job, task, restarts):
    restarts += 1
  places.release()


def _run_once(folder, job, task, restarts):
  """Runs the batch script of a task -> whether the task was requeued."""
  if _read(folder, task)['state'] == 'CANCELLED':
    return False
  nodes, per_node = int(job['nodes'] or 1), int(job['ntasks_per_node'] or 1)
  env = os.environ | {
    'SLURM_ARRAY_JOB_ID': str(job['number']),
    'SLURM_ARRAY_TASK_ID': str(task),
    'SLURM_JOB_ID': str(_number()),
    'SLURM_JOB_NAME': job['job_name'],
    'SLURM_NNODES': str(nodes),
    'SLURM_NTASKS_PER_NODE': str(per_node),
  }
  if restarts:
    env['SLURM_RESTART_COUNT'] = str(restarts)
  output = (job['output'] or 'slurm-%A_%a.out').replace('%a', str(task))
  output = output.replace('%A', str(job['number'])).replace('%%', '%')
  with open(output, 'ab' if job['open_mode'] == 'append' else 'wb') as out:
    batch = subprocess.Popen(
      ['bash', str(folder / 'script')],
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    _write(folder, task, state='RUNNING', restarts=restarts, pid=batch.pid)
    code = batch.wait()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(batch.pid, signal.SIGKILL)  # SLURM kills all processes of an ended job.
  now = _read(folder, task)
  requeued = now['state'] == 'REQUEUED' and bool(job['requeue'])
  _steps(folder, task).unlink(missing_ok=True)
  state = 'COMPLETED' if code == 0 else 'FAILED'
  if requeued:
    state = 'PENDING'
  elif now['state'] == 'CANCELLED':
    state = 'CANCELLED'
  _write(folder, task, state=state, restarts=restarts, code=code)
  return requeued


def srun(argv):
  parser = argparse.ArgumentParser('srun', allow_abbrev=False)
  parser.add_argument('--ntasks', type=int, required=True)
  parser.add_argument('--ntasks-per-node', type=int, required=True)
  parser.add_argument('--kill-on-bad-exit', type=int, default=0)
  parser.add_argument('--wait', type=float, default=0)
  parser.add_argument('command', nargs=argparse.REMAINDER)
  args = parser.parse_args(argv)
  count, per_node = args.ntasks, args.ntasks_per_node
  nodes = count // per_node
  if nodes > int(os.environ['SLURM_NNODES']):
    sys.exit('srun: error: More processors requested than permitted')
  children = []
  for i in range(count):
    env = os.environ | {
      'SLURM_STEP_ID': '0',
      'SLURM_STEP_NODELIST': ','.join(['127.0.0.1'] * nodes),
      'SLURM_STEP_NUM_NODES': str(nodes),
      'SLURM_NTASKS': str(count),
      'SLURM_PROCID': str(i),
      'SLURM_LOCALID': str(i % per_node),
      'SLURM_NODEID': str(i // per_node),
    }
    children.append(subprocess.Popen(args.command, env=env, stdin=subprocess.DEVNULL))
  # At SIGTERM, srun kills all tasks: "srun: forcing job termination".
  signal.signal(signal.SIGTERM, lambda *_: _signal(children, signal.SIGKILL))
  folder = _root() / os.environ['SLURM_ARRAY_JOB_ID']
  steps = _steps(folder, os.environ['SLURM_ARRAY_TASK_ID'])
  steps.write_text(' '.join(str(child.pid) for child in children))
  sys.exit(_wait(children, args))


def _wait(children, args):
  """Waits for the tasks of a step, within the limits of srun's options -> exit code."""
  first = None
  while any(child.poll() is None for child in children):
    codes = [child.returncode for child in children if child.returncode is not None]
    if codes and first is None:
      first = time.monotonic()
    late = args.wait and first and time.monotonic() > first + args.wait
    if late or (args.kill_on_bad_exit and any(codes)):
      _signal(children, signal.SIGKILL)
    time.sleep(0.01)
  return max(128 - c.returncode if c.returncode < 0 else c.returncode for c in children)


def _signal(children, number):
  for child in children:
    child.send_signal(number)


def squeue(argv):
  parser = argparse.ArgumentParser('squeue', allow_abbrev=False)
  for flag in ('--me', '--noheader', '--array'):
    parser.add_argument(flag, action='store_true')
  parser.add_argument('--name', required=True)
  parser.add_argument('--format', required=True)
  args = parser.parse_args(argv)
  for folder in sorted(_root().glob('[0-9]*')):
    job = json.loads((folder / 'job.json').read_text())
    for task in job['tasks'] if job['job_name'] == args.name else ():
      state = _read(folder, task)['state']
      if state in WAITING:
        number = f'{job["number"]}_{task}'
        print(args.format.replace('%i', number).replace('%T', state))


def scancel(argv):
  parser = argparse.ArgumentParser('scancel', allow_abbrev=False)
  parser.add_argument('--signal')
  parser.add_argument('--batch', action='store_true')
  parser.add_argument('--me', action='store_true')
  parser.add_argument('--name')
  parser.add_argument('job', nargs='?')
  args = parser.parse_args(argv)
  if not args.job:
    assert args.name and args.me, 'scancel: error: No job identification provided'
    named = lambda f: json.loads((f / 'job.json').read_text())['job_name'] == args.name
    for folder in filter(named, _root().glob('[0-9]*')):
      scancel([folder.name])
    return
  number, _, task = args.job.partition('_')
  folder = _root() / number
  if not folder.is_dir():
    sys.exit(f'scancel: error: Kill job error on job id {args.job}: Invalid job id')
  job = json.loads((folder / 'job.json').read_text())
  if args.name and args.name != job['job_name']:
    return
  for index in [int(task)] if task else job['tasks']:
    now = _read(folder, index)
    if args.signal:
      number = signal.Signals[f'SIG{args.signal}']
      if args.batch:
        os.kill(now['pid'], number)
      else:
        _signal_steps(folder, index, number)
    elif now['state'] in WAITING:
      _write(folder, index, **now | {'state': 'CANCELLED'})
      if now['state'] == 'RUNNING':
        _signal_steps(folder, index, signal.SIGTERM)
        _kill(now['pid'])


def _signal_steps(folder, task, number):
  steps = _steps(folder, task)
  for pid in steps.read_text().split() if steps.exists() else ():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid), number)


def _kill(pid):
  """Sends SIGTERM to the batch script; after KILL_WAIT, SIGKILL to its process group.

  SLURM also signals srun, which has no effect here: its tasks already got the signal.
  """
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGTERM)
  end = time.monotonic() + KILL_WAIT
  with contextlib.suppress(ProcessLookupError):
    while time.monotonic() < end:
      os.killpg(pid, 0)
      time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)


def scontrol(argv):
  verb, job = argv
  assert verb == 'requeue'
  number, _, task = job.partition('_')
  folder = _root() / number
  _write(folder, int(task), **_read(folder, int(task)) | {'state': 'REQUEUED'})


def _root():
  return Path(os.environ['SLURM_STANDIN'])


def _steps(folder, task):
  """The file with the process IDs that srun has started."""
  return folder / f'{task}.steps'


def _number():
  """A job number for which the port that JAX derives, 61440 + number % 4096, is free."""
  for number in range(time.time_ns() // 1000 % 10**8, 10**9):
    with socket.socket() as probe:
      try:
        probe.bind(('127.0.0.1', 61440 + number % 4096))
      except OSError:
        continue
      return number
  raise AssertionError('no free port')


def _write(folder, task, **values):
  draft = folder / f'{task}.draft'
  draft.write_text(json.dumps(values))
  draft.rename(folder / f'{task}.json')


def _read(folder, task):
  return json.loads((folder / f'{task}.json').read_text())


VERBS = {f.__name__: f for f in (sbatch, run, srun, squeue, scancel, scontrol)}

if __name__ == '__main__':
  VERBS[sys.argv[1]](sys.argv[2:])
