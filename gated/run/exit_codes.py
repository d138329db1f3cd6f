"""The exit codes of train.py, and the response of a scheduler to each.

Imports nothing, so that a launching host needs no packages to read it.
"""

FINISHED, FAILED, REFUSED, UNSTABLE, PREEMPTED = range(5)
LOST_PEER, STUCK, NOT_SAVED, TAKEN_OVER, FAULT = range(5, 10)

MEANING = {
  FINISHED: 'finished: every step is done and the last is saved',
  FAILED: 'failed: damaged data, or an error without a code; its traceback is on stderr',
  REFUSED: 'refused: bad input, or a workdir of another run; nothing was changed',
  UNSTABLE: 'unstable: loss, gradient or parameters not finite, or too many bad steps',
  PREEMPTED: 'preempted by a signal: saved; the same command resumes',
  LOST_PEER: 'lost peer: another process of the run died (134: JAX noticed it first)',
  STUCK: 'stuck: no progress for config.stability.stuck_after seconds; stacks on stderr',
  NOT_SAVED: 'not saved: a checkpoint could not be written; earlier ones are intact',
  TAKEN_OVER: 'taken over: another run took the workdir',
  FAULT: 'fault of the machine: a data worker killed, memory or a disk full; may pass',
}

# The last step of the session is saved.
SAVED = FINISHED, PREEMPTED
# A run that finished or diverged is never run again.
ENDED = FINISHED, UNSTABLE
# The same command resumes after these, which include SIGABRT, SIGKILL and SIGTERM ...
RESUMABLE = PREEMPTED, LOST_PEER, STUCK, FAULT, 134, 137, 143
# ... and would only fail again after these.
FINAL = FAILED, REFUSED, NOT_SAVED, TAKEN_OVER
