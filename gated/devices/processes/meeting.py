"""The rendezvous of a run's processes, on the port that JAX's service takes afterwards.

JAX's runtime aborts a process that cannot connect, and does not name missing processes.
So each process first registers with process 0, which sends all of them the list of
missing processes until it is empty. A message is a line of JSON: `go`, `wrong` (a fatal
error) and `why` (the current status).
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

TICK = 0.2  # Seconds between two polls.
ANSWER = 5.0  # Timeout in seconds for an answer from a machine.
NAMED = 8  # Missing processes listed in one line.
LINE = 4096  # Maximum bytes of one message.

_log = logging.getLogger('gated')


class Member(NamedTuple):
  """A process that is connected to process 0."""

  line: socket.socket
  host: str


def meet(place: Place, end: float) -> None:
  """Returns once all processes of the run are connected to process 0.

  ValueError, naming the missing processes, if some are missing at `end`
  (time.monotonic()), or if two processes disagree about the run.
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
    thread.join()  # It sends the error to the others first.
    raise
  thread.join()  # JAX needs the port.


def _listen(place: Place, end: float) -> socket.socket:
  """Process 0 binds its port, and retries until `end` while another program holds it."""
  port = int(place.address.rpartition(':')[2])
  both = socket.has_dualstack_ipv6()
  opts: dict[str, Any] = dict(family=socket.AF_INET6 if both else socket.AF_INET)
  while True:
    try:
      server = socket.create_server(('', port), dualstack_ipv6=both, backlog=1024, **opts)
      server.settimeout(TICK)
      return server
    except OSError as error:
      if time.monotonic() > end:
        reason = f'process 0 cannot bind port {port} of its machine: {error.strerror}'
        raise ValueError(f'{place}: {reason}') from error
    time.sleep(TICK)


def _receive(listening: socket.socket, processes: int, end: float) -> None:
  """Process 0 accepts all processes, and sends them the status until all are connected.

  After a refusal it keeps accepting for ANSWER seconds, so that late processes receive
  the error too.
  """
  members: dict[int, Member] = {}
  polled, wrong, go, close = time.monotonic(), '', False, math.inf
  with listening:
    while not go and polled < close:
      refusal = _admit(listening, members, processes)
      now, complete = time.monotonic(), len(members) == processes
      if not (refusal or complete) and now < polled + TICK:
        continue
      polled = now
      for process in [p for p, member in members.items() if _gone(member.line)]:
        members.pop(process).line.close()
      missing = [p for p in range(processes) if p not in members]
      why = f'missing of {processes}: process {_list(missing)}'
      if not wrong and (refusal or (missing and now > end)):
        wrong, close = refusal or why, now + (ANSWER if refusal else 0)
      go = not (wrong or missing)
      for member in members.values():
        _send(member.line, {'wrong': wrong, 'why': why, 'go': go})
  for member in members.values():
    member.line.close()


def _admit(listening: socket.socket, members: dict[int, Member], processes: int) -> str:
  """Accepts one connection, if any -> the reason to refuse the process, or ''."""
  try:
    line, _ = listening.accept()
  except OSError:  # No connection, or already closed.
    return ''
  try:
    line.settimeout(ANSWER)
    hello = json.loads(line.makefile('rb').readline(LINE))
    process, facts, host = int(hello['process']), dict(hello['facts']), hello['host']
  except (OSError, ValueError, KeyError, TypeError):
    line.close()  # Not a process of a run.
    return ''
  name, wrong = f'process {process} on {host}', ''
  if process not in range(processes):
    wrong = f'{name} is outside of --processes={processes}'
  for fact, value in _facts(processes).items():
    if facts.get(fact) != value:
      wrong = f'{fact}={facts.get(fact)} of {name}, but {value} of process 0'
  if not wrong and process in members and not _gone(members[process].line):
    hosts = f'on {host} and on {members[process].host}'
    wrong = f'two processes have --process={process}: {hosts}'
  if wrong:
    _send(line, {'wrong': wrong, 'why': '', 'go': False})
    line.close()
  else:
    members[process] = Member(line, host)
  return wrong


def _facts(processes: int) -> dict[str, Any]:
  """Settings that must be equal in all processes."""
  return {'--processes': processes, 'the version of jax': jax.__version__}


def _join(place: Place, end: float) -> None:
  """Connects to process 0, with retries, and waits there for the others."""
  name, logged = f'{place}: process {place.process}', time.monotonic()
  while True:
    for message in _visit(place, end):
      if message['go']:
        return
      if message['wrong']:
        raise ValueError(f'{place}: {message["wrong"]}')
      if time.monotonic() > end:
        raise ValueError(f'{name}: {message["why"]}; it waited for --start_timeout')
      if time.monotonic() > logged + 2 * ANSWER:
        logged = time.monotonic()
        _log.warning('%s waits: %s', name, message['why'])
    time.sleep(TICK)


def _visit(place: Place, end: float) -> Iterator[dict]:
  """Connects to process 0 once -> its messages, and a last one if the line fails."""
  host, _, port = place.address.rpartition(':')
  hello = {'process': place.process, 'facts': _facts(place.processes)}
  why = f'another program than process 0 answers at {place.address}'
  try:
    timeout = min(ANSWER, max(TICK, end - time.monotonic()))
    address = host.strip('[]'), int(port)
    with socket.create_connection(address, timeout) as line, line.makefile('rb') as lines:
      _send(line, hello | {'host': platform.node()})
      for text in iter(lambda: lines.readline(LINE), b''):
        message = json.loads(text)
        yield {name: message[name] for name in ('go', 'wrong', 'why')}
        why = f'process 0 at {place.address} closed the connection'
  except socket.gaierror:
    why = f'the name service does not know the host {host!r}'
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


def _send(line: socket.socket, message: dict) -> None:
  """Sends a message; a closed connection is no error."""
  with contextlib.suppress(OSError):
    line.sendall(json.dumps(message).encode() + b'\n')


def _gone(line: socket.socket) -> bool:
  """Whether the other end has closed the connection."""
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
  """For example '1, 3, 4 and 9 more'."""
  more = f' and {len(missing) - NAMED} more' if len(missing) > NAMED else ''
  return ', '.join(map(str, missing[:NAMED])) + more
