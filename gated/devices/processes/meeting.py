"""The processes of a run meet before JAX's own service starts, on the port it will have.

JAX's runtime aborts a process that finds no other, and names none. So each process first
tells process 0 who it is, and process 0 tells each who is missing, until all have come.
A message is a line of JSON.
"""

import contextlib
import json
import logging
import math
import platform
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from gated.devices.processes.clusters import Place

TICK = 0.2  # Seconds between two looks.
ANSWER = 5.0  # Seconds within which a machine that is there answers.
NAMED = 8  # Missing processes named in one line.
LINE = 4096  # Bytes of one message, at most.

_log = logging.getLogger('gated')


class Guest(NamedTuple):
  """A process that has come to process 0."""

  line: socket.socket
  host: str


def meet(place: Place, end: float) -> None:
  """Returns once all processes of the run have come to process 0.

  ValueError, naming whom and where, if that is not so by `end` (time.monotonic()), or if
  they do not fit together.
  """
  if place.process:
    return _join(place, end)
  listening = _listen(place, end)
  args = listening, place.processes, end
  thread = threading.Thread(target=_receive, args=args, daemon=True)
  thread.start()
  try:
    _join(place, end)
  except ValueError:
    thread.join()  # It tells the others first.
    raise
  thread.join()  # The port has to be free for JAX.


def _listen(place: Place, end: float) -> socket.socket:
  """Process 0 takes its port, once whoever has it leaves it."""
  port = int(place.address.rpartition(':')[2])
  both = socket.has_dualstack_ipv6()
  how: dict[str, Any] = dict(family=socket.AF_INET6 if both else socket.AF_INET)
  while True:
    try:
      found = socket.create_server(('', port), dualstack_ipv6=both, backlog=1024, **how)
      found.settimeout(TICK)
      return found
    except OSError as error:
      if time.monotonic() > end:
        told = f'process 0 cannot have port {port} of its machine: {error.strerror}'
        raise ValueError(f'{place}: {told}') from error
    time.sleep(TICK)


def _receive(listening: socket.socket, processes: int, end: float) -> None:
  """Process 0 takes in the others, and tells all of them when to go, or what is wrong.

  What is wrong is told for a while to those who come later, too.
  """
  came: dict[int, Guest] = {}
  looked, wrong, go, over = time.monotonic(), '', False, math.inf
  with listening:
    while not go and looked < over:
      unfit = _admit(listening, came, processes)
      now, complete = time.monotonic(), len(came) == processes
      if not (unfit or complete) and now < looked + TICK:
        continue
      looked = now
      for process in [p for p, guest in came.items() if _gone(guest.line)]:
        came.pop(process).line.close()
      missing = [p for p in range(processes) if p not in came]
      why = f'missing of {processes}: process {_list(missing)}'
      if not wrong and (unfit or (missing and now > end)):
        wrong, over = unfit or why, now + (ANSWER if unfit else 0)
      go = not (wrong or missing)
      for guest in came.values():
        _tell(guest.line, {'wrong': wrong, 'why': why, 'go': go})
  for guest in came.values():
    guest.line.close()


def _admit(listening: socket.socket, came: dict[int, Guest], processes: int) -> str:
  """Takes in who knocks, if anybody does -> what is wrong with it, '' for nothing."""
  try:
    line, _ = listening.accept()
  except OSError:  # Nobody, or one who is gone again.
    return ''
  try:
    line.settimeout(ANSWER)
    hello = json.loads(line.makefile('rb').readline(LINE))
    process, facts, host = int(hello['process']), dict(hello['facts']), hello['host']
  except (OSError, ValueError, KeyError, TypeError):
    line.close()  # Not one of us.
    return ''
  of, wrong = f'process {process} on {host}', ''
  if process not in range(processes):
    wrong = f'there is no {of} among {processes}'
  for name, value in _facts(processes).items():
    if facts.get(name) != value:
      wrong = f'{name}={facts.get(name)} of {of}, but {value} of process 0'
  if not wrong and process in came and not _gone(came[process].line):
    hosts = f'on {host} and on {came[process].host}'
    wrong = f'there are two of process {process} (--process): {hosts}'
  if wrong:
    _tell(line, {'wrong': wrong, 'why': '', 'go': False})
    line.close()
  else:
    came[process] = Guest(line, host)
  return wrong


def _facts(processes: int) -> dict[str, Any]:
  """What must be the same in all processes."""
  return {'--processes': processes, 'the version of jax': jax.__version__}


def _join(place: Place, end: float) -> None:
  """Comes to process 0, however often it takes, and waits there for the others."""
  which, said = f'{place}: process {place.process}', time.monotonic()
  while True:
    for told in _visit(place, end):
      if told['go']:
        return
      if told['wrong']:
        raise ValueError(f'{place}: {told["wrong"]}')
      if time.monotonic() > end:
        raise ValueError(f'{which}: {told["why"]}; it waited for --start_timeout')
      if time.monotonic() > said + 2 * ANSWER:
        said = time.monotonic()
        _log.warning('%s waits: %s', which, told['why'])
    time.sleep(TICK)


def _visit(place: Place, end: float) -> Iterator[dict]:
  """Comes to process 0 once -> what it tells, until it has no more to tell."""
  host, _, port = place.address.rpartition(':')
  hello = {'process': place.process, 'facts': _facts(place.processes)}
  why = f'what answers at {place.address} is not process 0 of a run that starts'
  try:
    patience = min(ANSWER, max(TICK, end - time.monotonic()))
    where = host.strip('[]'), int(port)
    with socket.create_connection(where, patience) as line, line.makefile('rb') as lines:
      _tell(line, hello | {'host': platform.node()})
      for text in iter(lambda: lines.readline(LINE), b''):
        told = json.loads(text)
        yield {name: told[name] for name in ('go', 'wrong', 'why')}
        why = f'process 0 was at {place.address}, and left'
  except socket.gaierror:
    why = f'there is no host {host!r} that the name service knows'
  except ConnectionRefusedError:
    here = ' (is this its machine?)' if place.process == 0 else ''
    why = f'nothing listens at {place.address}, where process 0 should{here}'
  except TimeoutError:
    why = f'no answer from {place.address}'
  except OSError as error:
    why = f'{place.address}: {error.strerror}'
  except (ValueError, KeyError, TypeError):
    pass
  yield {'go': False, 'wrong': '', 'why': why}


def _tell(line: socket.socket, message: dict) -> None:
  """Sends a message to who may have gone."""
  with contextlib.suppress(OSError):
    line.sendall(json.dumps(message).encode() + b'\n')


def _gone(line: socket.socket) -> bool:
  """Whether the other end has been closed."""
  line.settimeout(0)
  try:
    return line.recv(1) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    line.settimeout(ANSWER)


def _list(missing: list[int]) -> str:
  """1, 3, 4 and 9 more."""
  more = f' and {len(missing) - NAMED} more' if len(missing) > NAMED else ''
  return ', '.join(map(str, missing[:NAMED])) + more
