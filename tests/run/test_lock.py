"""One run owns a workdir, on a disk and in an object store."""

import contextlib
import json
import os
import platform
import threading
import time

import pytest

from gated import storage
from gated.run import lock

FAST = dict(stale_after=0.4, settle=0.05)  # A beat every 0.1 s.

HOLD = """
import sys, time
from gated.run import lock
lock.Lock(sys.argv[1], stale_after=60, settle=0).acquire()
print('held', flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def hold(workdir, **settings):
  """Holds a workdir with a fresh lock inside a `with` block."""
  held = lock.Lock(workdir, **settings)
  held.acquire()
  try:
    yield held
  finally:
    held.release()


@pytest.fixture(params=['local', 's3'])
def workdir(request, tmp_path):
  if request.param == 'local':
    return storage.path(tmp_path / 'run')
  return storage.path(f'{request.getfixturevalue("remote")}/run')


def note(workdir):
  return json.loads(storage.read(workdir / 'lock.json', 1 << 16))


def leave(workdir, **changes):
  """Writes the note of another machine; it is old unless changed."""
  old = dict(
    host='far',
    machine='far',
    pid=7,
    started=1,
    since=1e9,
    beat=1e9,
    period=0.1,
    token='theirs',
  )
  storage.write(workdir / 'lock.json', json.dumps(old | changes).encode())


def wait_for(true, seconds=10):
  until = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < until
    time.sleep(0.02)


def refused(workdir, message):
  with pytest.raises(ValueError, match=f'--workdir={workdir} {message}'):
    lock.Lock(workdir, **FAST).acquire()


def test_a_lock_is_taken_and_released(workdir):
  with hold(workdir, **FAST) as held:
    content = note(workdir)
    assert (content['host'], content['pid']) == (platform.node(), os.getpid())
    assert content['since'] == pytest.approx(time.time(), abs=10)
    assert not held.lost
  assert storage.names(workdir) == []
  held.release()
  held.acquire()
  assert note(workdir)['token'] != content['token']
  held.release()


def test_the_owner_renews_only_the_beat(workdir):
  with hold(workdir, **FAST) as held:
    first = note(workdir)
    wait_for(lambda: note(workdir)['beat'] > first['beat'])
    assert note(workdir) | {'beat': 0} == first | {'beat': 0}
    assert not held.lost


@pytest.mark.slow
def test_a_living_run_keeps_its_workdir_and_a_killed_one_does_not(
  workdir, spawn_python, caplog
):
  child = spawn_python(['-c', HOLD, workdir])
  assert child.until(lambda: child.out == 'held\n'), child.err
  refused(workdir, rf'is in use by process {child.pid} on .* since 2.*lock\.json')
  assert note(workdir)['pid'] == child.pid
  child.kill()
  wait_for(lambda: lock.started(child.pid) is None)  # A zombie counts as dead.
  with hold(workdir, stale_after=3600, settle=0.05):
    assert note(workdir)['pid'] == os.getpid()
  assert f'left locked by process {child.pid} on {platform.node()}' in caplog.text


def test_the_same_process_cannot_hold_it_twice(workdir):
  with hold(workdir, **FAST):
    refused(workdir, f'is in use by process {os.getpid()}')
    assert lock.living(workdir, stale_after=1)
  assert not lock.living(workdir, stale_after=1)


def test_a_reused_pid_is_not_the_owner(workdir):
  here = dict(machine=lock.machine(), pid=os.getpid(), beat=time.time())
  leave(workdir, **here, started=lock.started(os.getpid()))
  refused(workdir, 'is in use')
  leave(workdir, **here, started=lock.started(os.getpid()) - 1)
  with hold(workdir, **FAST):
    pass


def test_the_beat_decides_about_another_machine(workdir, caplog):
  leave(workdir, beat=time.time() + 60)  # Its clock is ahead.
  refused(workdir, 'is in use by process 7 on far')
  leave(workdir, beat=time.time() - 5)
  with pytest.raises(ValueError, match='is in use by process 7 on far'):
    lock.Lock(workdir, stale_after=60, settle=0).acquire()
  with hold(workdir, **FAST):
    assert note(workdir)['host'] == platform.node()
  assert 'left locked by process 7 on far since 2001-09-09 01:46:40 UTC' in caplog.text


def test_another_machine_with_a_slow_clock_counts_as_living(workdir):
  ended = threading.Event()

  def beat():
    n = 0
    while not ended.wait(0.03):
      n += 1
      leave(workdir, beat=1e9 + n, period=0.5)

  leave(workdir, period=0.5)
  other = threading.Thread(target=beat)
  other.start()
  try:
    refused(workdir, 'is in use by process 7 on far')
  finally:
    ended.set()
    other.join()


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'{"host": "far", "pi',
    b'[]',
    b'[' * 50000,
    b'x' * (1 << 17),
    b'{"host": "far", "machine": "far", "pid": -1, "started": 1, "since": NaN, '
    b'"beat": 1e999, "period": 1e9, "token": "x"}',
  ],
  ids=['empty', 'torn', 'list', 'deep', 'large', 'wild'],
)
def test_the_age_decides_about_a_damaged_note(tmp_path, content, caplog, monkeypatch):
  monkeypatch.setattr(lock, 'MAX_PERIOD', 0.1)
  path = tmp_path / 'lock.json'
  path.write_bytes(content)
  refused(tmp_path, r'is in use by an unknown process \(lock.json is damaged')
  assert path.read_bytes() == content and lock.living(tmp_path, stale_after=60)
  os.utime(path, (1e9, 1e9))
  assert not lock.living(tmp_path, stale_after=60)
  with hold(tmp_path, **FAST) as held:
    assert not held.lost
  assert 'lock.json is damaged, last written 2001-09-09' in caplog.text


def test_one_of_two_simultaneous_runs_is_refused(workdir):
  outcomes = []
  start = threading.Barrier(2)

  def run():
    held = lock.Lock(workdir, stale_after=60, settle=0.3)
    start.wait()
    try:
      held.acquire()
      outcomes.append(held)
    except ValueError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=run) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  (fault,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
  assert 'was taken at the same time by process' in fault or 'is in use' in fault
  (held,) = [outcome for outcome in outcomes if not isinstance(outcome, str)]
  assert not held.lost
  held.release()
  assert storage.names(workdir) == []


def test_an_owner_notices_a_takeover_and_leaves_the_new_note(workdir):
  with hold(workdir, **FAST) as held:
    leave(workdir)
    wait_for(lambda: held.lost)
    assert f'{workdir} was taken over by process 7 on far' in held.lost
  assert note(workdir)['token'] == 'theirs'


def test_a_takeover_is_noticed_before_the_next_beat_by_a_check(workdir):
  with hold(workdir, stale_after=4000.0, settle=0) as held:
    held.check()
    assert not held.lost
    leave(workdir)
    assert not held.lost
    held.check()
    assert f'{workdir} was taken over by' in held.lost


def test_a_missing_note_is_a_lost_lock(workdir):
  with hold(workdir, **FAST) as held:
    storage.remove(workdir / 'lock.json')
    wait_for(lambda: held.lost)
    assert 'lock.json is missing' in held.lost
  assert storage.names(workdir) == []


def test_a_storage_outage_does_not_end_the_run(tmp_path, monkeypatch, caplog):
  with hold(tmp_path, **FAST) as held:
    before, faults = note(tmp_path)['beat'], []

    def refuse(*_):
      faults.append(1)
      raise OSError('the network is down')

    with monkeypatch.context() as patch:
      patch.setattr(storage, 'read', refuse)
      wait_for(lambda: len(faults) > 3)
    wait_for(lambda: note(tmp_path)['beat'] > before)
    assert not held.lost
  assert caplog.text.count('the network is down') == 1


def test_a_workdir_that_is_unmounted_for_a_while_is_not_lost(tmp_path, caplog):
  with hold(tmp_path / 'run', **FAST) as held:
    first = note(tmp_path / 'run')['beat']
    # The next beat is not due yet.
    wait_for(lambda: note(tmp_path / 'run')['beat'] > first)
    (tmp_path / 'run').rename(tmp_path / 'away')
    wait_for(lambda: 'could not be renewed' in caplog.text)
    (tmp_path / 'away').rename(tmp_path / 'run')
    before = note(tmp_path / 'run')['beat']
    wait_for(lambda: note(tmp_path / 'run')['beat'] > before)
    assert not held.lost


def test_an_unwritable_workdir_is_refused_with_the_flag(tmp_path, s3):
  (tmp_path / 'file').write_bytes(b'')
  for workdir in (tmp_path / 'file' / 'run', 's3://nobucket/run'):
    refused(workdir, 'cannot be used: ')


def test_a_pid_without_a_process_is_not_alive():
  assert lock.lives(os.getpid(), lock.started(os.getpid()))
  assert lock.lives(os.getpid(), 0)
  assert not lock.lives(2**22 + 1, 0) and not lock.lives(2**70, 0)
