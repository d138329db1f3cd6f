"""SLURM: a job array with a task for each point.

slurm.schedmd.com/sbatch.html, srun.html, scancel.html and scontrol.html. Two minutes
before the time limit SLURM sends SIGUSR1 to the batch script, which has the processes
told to leave, and puts its task back into the queue when they have. SIGTERM says that the
task was deleted, or taken back, upon which SLURM itself requeues it: the script does not.
"""

import shlex

from gated import storage
from gated.run.exit_codes import PREEMPTED, REFUSED, RESUMABLE
from gated.sweep.launch import work
from gated.sweep.launch.work import FOLLOW, Work

SCRIPT = 'sweep.sbatch'
# Seconds that a point's other processes have after the first has left. A lost peer is
# noticed sooner (config.stability.peer_timeout).
PATIENCE = 300


def files(w: Work) -> dict[str, str]:
  """-> the batch script."""
  accelerator, o = w.accelerator, w.options
  if accelerator.kind == 'tpu':
    raise ValueError(
      f'--accelerator={o.accelerator} with --on=slurm, but allowed are cpu and GPUs'
    )
  here = not storage.is_remote(w.folder)
  given = {
    'job-name': w.label,
    'array': f'0-{len(w.points) - 1}' + (f'%{o.at_once}' if o.at_once else ''),
    'partition': o.partition,
    'time': o.time,
    'nodes': o.nodes,
    'ntasks-per-node': o.processes,
    'gpus-per-node': accelerator.count or '',
    'signal': 'B:USR1@120',
    'open-mode': 'append',
    # A percent sign begins a pattern: %a is the task's number.
    'output': f'{w.files.replace("%", "%%")}/%a.out' if here else '',
  }
  lines = [f'--{k}={shlex.quote(str(v))}' for k, v in given.items() if v != '']
  headers = ''.join(f'#SBATCH {line}\n' for line in [*lines, '--requeue', *o.sbatch])
  return {SCRIPT: f'#!/usr/bin/env bash\n{headers}set -euo pipefail\n{_body(w, here)}'}


def _body(w: Work, here: bool) -> str:
  cases = ''
  for index, point in enumerate(w.points):
    log = f'{w.folder}/logs/{point.name}.log' if here else ''
    cases += f'  {index})\n    log={shlex.quote(log)}\n'
    cases += f'    set -- {work.words(w.arguments(point))}\n    ;;\n'
  tasks = w.options.nodes * w.options.processes
  return f"""\
{FOLLOW}
# What each process runs.
{work.embedded()}
case $SLURM_ARRAY_TASK_ID in
{cases}  *)
    echo "unknown point $SLURM_ARRAY_TASK_ID" >&2
    exit {REFUSED}
    ;;
esac
if [[ -n $log ]]; then
  mkdir -p "$(dirname "$log")"
  exec >>"$log" 2>&1
fi
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
# srun makes SIGKILL of a SIGTERM of its own, so its processes are told by SLURM.
signal=USR1
forward() {{ scancel --signal=TERM "$task" || true; }}
deleted=''
trap 'deleted=yes signaled=yes' TERM
# Who waits for a process that failed as it started is not waited for.
follow srun --ntasks={tasks} --ntasks-per-node={w.options.processes} \\
  --kill-on-bad-exit=0 --wait={PATIENCE} bash -c "$job" job "$@"
if [[ -n $deleted ]]; then exit "$code"; fi
case $code in
  {' | '.join(map(str, RESUMABLE))})
    restarts=${{SLURM_RESTART_COUNT:-0}}
    if [[ $code -eq {PREEMPTED} || $restarts -lt {w.options.restarts} ]]; then
      scontrol requeue "$task" || true
    fi
    ;;
esac
exit "$code"
"""


def submit(w: Work) -> list[list[str]]:
  """-> the command that submits, which prints the array's number."""
  return [['sbatch', '--parsable', f'{w.files}/{SCRIPT}']]


def listing(record: dict) -> list[str]:
  """-> the command that lists what waits or runs."""
  name = f'--name={record["label"]}'
  return ['squeue', '--me', name, '--noheader', '--array', '--format=%i|%T']


def states(record: dict, output: str) -> dict[str, str]:
  """What `listing` printed -> job: its state."""
  jobs = [job['job'] for job in record['jobs']]
  found = {}
  for line in output.split():
    number, _, state = line.partition('|')
    index = number.partition('_')[2]
    if index.isdecimal() and int(index) < len(jobs):
      found[jobs[int(index)]] = state
  return found


def delete(record: dict) -> list[list[str]]:
  """-> the commands that end what was submitted.

  Numbers come again one day, so what is ended has the sweep's name too; a number that was
  never told is of who was killed while sbatch answered.
  """
  numbers = [told.partition(';')[0].strip() for told in record['told']]
  mine = ['scancel', '--me', f'--name={record["label"]}']
  return [[*mine, number] if number else mine for number in numbers]
