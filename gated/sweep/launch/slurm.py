"""SLURM: a job array with a task for each point.

slurm.schedmd.com/sbatch.html, srun.html, scancel.html and scontrol.html. Two minutes
before the time limit, SLURM sends SIGUSR1 to the batch script. The script then sends
SIGTERM to the processes, waits until they have saved, and requeues its task. SIGTERM to
the script means that the task was cancelled or preempted; it requeues nothing, because
SLURM itself requeues a preempted task.
"""

import shlex
from collections.abc import Iterator

from gated import storage
from gated.run.exit_codes import PREEMPTED, REFUSED, RESUMABLE
from gated.sweep.launch import work
from gated.sweep.launch.work import FOLLOW, Work

SCRIPT = 'sweep.sbatch'
# Seconds from the exit of a point's first process until the others are killed. Processes
# notice a lost peer sooner (config.stability.peer_timeout).
PATIENCE = 300


def tasks(w: Work) -> Iterator[work.Task]:
  """Work -> the batch script of all points; its command prints the array's number."""
  accelerator, o = w.accelerator, w.options
  if accelerator.kind == 'tpu':
    raise ValueError(
      f'--accelerator={o.accelerator} with --on=slurm, but allowed are cpu and GPUs'
    )
  local = not storage.is_remote(w.folder)
  headers = {
    'job-name': w.label,
    'array': f'0-{len(w.points) - 1}' + (f'%{o.at_once}' if o.at_once else ''),
    'partition': o.partition,
    'time': o.time,
    'nodes': o.nodes,
    'ntasks-per-node': o.processes,
    'gpus-per-node': accelerator.count or '',
    'signal': 'B:USR1@120',
    'open-mode': 'append',
    # A percent sign starts a pattern: %a is the index of the task.
    'output': f'{w.files.replace("%", "%%")}/%a.out' if local else '',
  }
  lines = [f'--{k}={shlex.quote(str(v))}' for k, v in headers.items() if v != '']
  text = ''.join(f'#SBATCH {line}\n' for line in [*lines, '--requeue', *o.sbatch])
  text = f'#!/usr/bin/env bash\n{text}set -euo pipefail\n{_body(w, local)}'
  yield SCRIPT, text, ['sbatch', '--parsable', f'{w.files}/{SCRIPT}']


def _body(w: Work, local: bool) -> str:
  cases = ''
  for index, point in enumerate(w.points):
    log = f'{w.folder}/logs/{point.name}.log' if local else ''
    cases += f'  {index})\n    log={shlex.quote(log)}\n'
    cases += f'    set -- {work.quoted(w.arguments(point))}\n    ;;\n'
  tasks = w.options.nodes * w.options.processes
  return f"""\
{FOLLOW}
# The script of each process.
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
# srun answers SIGTERM by killing its processes, so scancel signals them directly.
signal=USR1
forward() {{ scancel --signal=TERM "$task" || true; }}
deleted=''
trap 'deleted=yes signaled=yes' TERM
# --wait ends processes that still wait for one that failed at its start.
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


def listing(record: dict) -> list[str]:
  """A record -> the command that lists pending and running tasks."""
  name = f'--name={record["label"]}'
  return ['squeue', '--me', name, '--noheader', '--array', '--format=%i|%T']


def states(record: dict, output: str) -> dict[str, str]:
  """The output of `listing` -> job: its state."""
  jobs = [job['job'] for job in record['jobs']]
  states = {}
  for line in output.split():
    number, _, state = line.partition('|')
    index = number.partition('_')[2]
    if index.isdecimal() and int(index) < len(jobs):
      states[jobs[int(index)]] = state
  return states


def delete(record: dict) -> list[list[str]]:
  """A record -> the commands that cancel its jobs.

  SLURM reuses job numbers, so the name must match too. The number is empty if the
  submission was interrupted before sbatch answered.
  """
  numbers = [output.partition(';')[0].strip() for output in record['told']]
  command = ['scancel', '--me', f'--name={record["label"]}']
  return [[*command, number] if number else command for number in numbers]
