"""The records of a run: metrics.jsonl, its views, the speed, and run.json."""

import io
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated import storage
from gated.run import metrics
from gated.run.metrics import provenance
from gated.run.metrics import records as lines

OFF = {'tensorboard': False, 'wandb': ''}


def write(workdir, values, *, step=-1, **views):
  with metrics.Log(workdir, step=step, enabled=True, **(OFF | views)) as log:
    for s, record in values:
      log.write(s, 'train', record)
  return metrics.read(workdir / 'metrics.jsonl')


def test_floats_are_read_back_to_the_last_bit(tmp_path):
  values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), -0.0]
  records = write(tmp_path, [(i, {'loss': v}) for i, v in enumerate(values)])
  assert [r['loss'].hex() for r in records] == [v.hex() for v in values]
  assert [r['step'] for r in records] == list(range(len(values)))
  assert {r['kind'] for r in records} == {'train'}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32'])
def test_device_scalars_are_written_exactly(tmp_path, dtype):
  value = jnp.asarray(2.7109375, dtype)
  values = {'x': value, 'y': np.asarray(value)}
  with jax.transfer_guard('disallow'):
    (record,) = write(tmp_path, [(0, values)])
  assert record['x'] == record['y'] == float(value)


def test_every_line_is_strict_json_even_if_the_loss_is_nan(tmp_path):
  values = {'a': math.nan, 'b': math.inf, 'c': jnp.float32(-math.inf), 'd': 'NaN?'}
  (record,) = write(tmp_path, [(3, values)])

  def refuse(word):
    raise AssertionError(word)

  json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
  assert math.isnan(record['a'])
  assert (record['b'], record['c'], record['d']) == (math.inf, -math.inf, 'NaN?')


def test_a_record_is_on_disk_before_the_next_step(tmp_path):
  log = metrics.Log(tmp_path, step=-1, enabled=True, **OFF)
  log.write(1, 'train', {'loss': 1.0})
  assert len(metrics.read(log.path)) == 1
  log.sync()
  log.close()
  log.close()


def test_a_process_that_is_not_enabled_leaves_no_trace(tmp_path):
  views = {'tensorboard': True, 'wandb': 'project'}
  with metrics.Log(tmp_path / 'run', step=-1, enabled=False, **views) as log:
    log.write(1, 'train', {'loss': 1.0})
    log.sync()
  assert not (tmp_path / 'run').exists()


def test_reopening_drops_the_records_after_the_restored_step(tmp_path):
  write(tmp_path, [(s, {'loss': s}) for s in (1, 2, 3, 4)])
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 5, "kind": "tr')
  records = write(tmp_path, [(3, {'loss': 30})], step=2)
  assert [(r['step'], r['loss']) for r in records] == [(1, 1), (2, 2), (3, 30)]
  assert write(tmp_path, [], step=-1) == []


@pytest.mark.parametrize('torn', [b'', b'{"st', b'{"step": 9, "kind": "train"}'])
def test_a_cut_off_last_line_is_ignored_and_removed(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  whole = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
  path.write_bytes(whole + torn)
  assert [r['step'] for r in metrics.read(path)] == [1, 2]
  lines.truncate(path, 7)
  assert path.read_bytes() == whole
  lines.truncate(path, 1)
  assert path.read_bytes() == whole[: whole.index(b'\n') + 1]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_step_that_two_writers_recorded_is_kept_once(tmp_path, caplog):
  path, end = (
    tmp_path / 'metrics.jsonl',
    tmp_path / 'metrics.jsonl.parts/00000001-a.jsonl',
  )
  record = lambda step, loss, kind='train': {'step': step, 'kind': kind, 'loss': loss}
  first = [record(3, 0.3), record(1, 0.1), record(1, 9.0, 'heldout'), record(2, 0.2)]
  second = [record(1, 0.1), record(2, 0.25)]
  path.write_bytes(b''.join(map(lines.line, first + second)))
  lines.truncate(path, 3)
  assert metrics.read(path) == [first[2], *second, first[0]]
  assert f'{path}: 2 repeated records were dropped' in caplog.text
  end.parent.mkdir()
  end.write_bytes(lines.line(record(3, 0.35)) + lines.line(record(4, 0.4)))
  lines.truncate(path, 3)
  assert metrics.read(path) == [first[2], *second, record(3, 0.35)]


@pytest.mark.slow
def test_a_killed_run_leaves_all_complete_records(tmp_path, spawn_python):
  story = (
    'import sys; from gated.run import metrics\n'
    'log = metrics.Log(sys.argv[1], step=-1, enabled=True, tensorboard=False, wandb="")\n'
    'step = 0\n'
    'while step := step + 1: log.write(step, "train", {"loss": 1 / step})\n'
  )
  child = spawn_python(['-c', story, tmp_path])
  path = tmp_path / 'metrics.jsonl'
  while child.lives() and not (path.exists() and path.stat().st_size > 1 << 16):
    time.sleep(0.01)
  assert child.kill().code == -signal.SIGKILL, child.err
  records = metrics.read(path)
  assert [r['step'] for r in records] == list(range(1, len(records) + 1))
  assert len(records) > 500 and all(r['loss'] == 1 / r['step'] for r in records)


def test_the_last_step_is_read_from_the_end_of_the_file(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  assert metrics.last_step(path) == 0
  write(tmp_path, [(step, {'loss': 1.0}) for step in range(1, 301)])
  assert metrics.last_step(path) == 300
  with open(path, 'ab') as file:
    file.write(b'{"step": 301, "lo')
  # A window that begins inside a record skips that record.
  for size in (200, 201, 300, 1 << 20):
    monkeypatch.setattr(lines, 'END', size)
    assert metrics.last_step(path) == 300
  # The last part may hold only a cut-off line.
  path.unlink()
  parts = tmp_path / 'metrics.jsonl.parts'
  parts.mkdir()
  (parts / '00000001-a.jsonl').write_bytes(lines.line({'step': 7}))
  (parts / '00000002-a.jsonl').write_bytes(b'{"st')
  assert metrics.last_step(path) == 7


def test_a_file_that_is_removed_or_renamed_in_use_keeps_all_records(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  with metrics.Log(tmp_path, step=-1, enabled=True, **OFF) as log:
    log.write(1, 'train', {})
    path.rename(tmp_path / 'metrics.jsonl.1')  # As a rotation of logs does.
    log.write(2, 'train', {})
    log.sync()
    assert [r['step'] for r in metrics.read(path)] == [1, 2]
    log.write(3, 'train', {})
    path.unlink()
    log.write(4, 'train', {})
  assert [r['step'] for r in metrics.read(path)] == [1, 2, 3, 4]
  assert caplog.text.count('was removed or renamed while in use: written again') == 2


def test_a_file_of_another_writer_is_not_replaced(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.Log(tmp_path, step=-1, enabled=True, **OFF) as log:
    log.write(1, 'train', {})
    storage.write(path, b'{"step": 9}\n')
  assert path.read_bytes() == b'{"step": 9}\n'


def test_lines_that_another_program_cuts_off_are_reported(tmp_path, caplog):
  with metrics.Log(tmp_path, step=-1, enabled=True, **OFF) as log:
    log.write(1, 'train', {})
    (tmp_path / 'metrics.jsonl').write_bytes(b'')
    log.write(2, 'train', {})
    log.sync()
    log.sync()
  assert caplog.text.count('to another program') == 1
  assert [r['step'] for r in metrics.read(tmp_path / 'metrics.jsonl')] == [2]


@pytest.mark.parametrize(
  ('steps', 'every', 'expected'),
  [
    (range(1, 21), 1, []),
    (range(1, 31), 1, []),  # Records after the restored step are dropped later.
    (range(5, 21, 5), 5, []),
    (range(7, 21, 7), 7, []),
    ([*range(5, 11, 5), *range(11, 21)], 1, []),  # Another interval before.
    ([], 1, [(1, 20)]),
    (range(1, 11), 1, [(11, 20)]),
    (range(11, 21), 1, [(1, 10)]),
    (range(9, 13), 1, [(1, 8), (13, 20)]),
  ],
)
def test_steps_without_a_record_are_found(steps, every, expected, tmp_path):
  write(tmp_path, [(step, {}) for step in steps])
  assert metrics.gaps(tmp_path / 'metrics.jsonl', 20, every) == expected


def test_truncating_a_missing_file_does_nothing(tmp_path):
  lines.truncate(tmp_path / 'metrics.jsonl', 3)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorboard_gets_event_files(tmp_path):
  write(tmp_path, [(1, {'loss': 1.0, 'note': 'text'})], tensorboard=True)
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in events.read_bytes()


def test_a_missing_wandb_package_is_reported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match=r"'mine'.*pip install wandb"):
    metrics.Log(tmp_path, step=-1, enabled=True, tensorboard=False, wandb='mine')


class Wandb:
  """The calls of wandb that we use, with its rule for steps, and what its server keeps.

  A run has an implicit step, which continues where the server's copy of the run ends.
  `log` drops values at an earlier step than that; without a step it counts on.
  """

  def __init__(self):
    self.words, self.rows, self.axes, self.step = [], [], {}, 0

  def init(self, **words):
    self.words.append(words)
    return self

  def define_metric(self, name, *, step_metric='', hidden=False):
    self.axes[name] = step_metric

  def log(self, values, step=None):
    if step is not None and step < self.step:
      return
    self.step = self.step + 1 if step is None else step
    self.rows.append(values)

  def finish(self):
    pass


# A resume from step 2, and then a rollback to step 1 without a restart.
SESSIONS = {-1: [1, 2, 3, 4], 2: [3, 4, 2, 3]}


def sessions(workdir):
  """Writes the steps of SESSIONS to wandb -> the rows that it has to keep."""
  losses = iter(range(100))
  rows = []
  for restored, steps in SESSIONS.items():
    values = [(step, {'loss': float(next(losses))}) for step in steps]
    write(workdir, values, step=restored, wandb='mine')
    rows += [{'step': step, 'train/loss': x['loss']} for step, x in values]
  return rows


def test_wandb_keeps_what_follows_a_resume_and_a_rollback(tmp_path, monkeypatch):
  fake = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  assert sessions(tmp_path) == fake.rows
  assert fake.axes == {'step': '', '*': 'step'}
  first, second = fake.words
  assert first['id'] == second['id'] and second['resume'] == 'allow'


@pytest.mark.slow
def test_an_offline_run_of_wandb_keeps_what_follows_a_resume_and_a_rollback(
  tmp_path, monkeypatch
):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  expected = sessions(tmp_path)
  rows, axes = [], set()
  for file in sorted(tmp_path.glob('wandb/offline-run-*/*.wandb')):
    for record in offline(file.read_bytes()):
      kind = record.WhichOneof('record_type')
      if kind == 'metric':
        axes.add((record.metric.glob_name, record.metric.step_metric))
      if kind == 'history':
        items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
        rows.append({k: json.loads(items[k]) for k in ('step', 'train/loss')})
  assert rows == expected and ('*', 'step') in axes


def offline(content):
  """A .wandb file -> its records, stored in the blocks of LevelDB's log format."""
  from wandb.proto.wandb_internal_pb2 import Record

  block, place, whole = 1 << 15, 7, b''  # The file's own header has 7 bytes.
  while place + 7 <= len(content):
    left = block - place % block
    size, kind = (
      int.from_bytes(content[place + 4 : place + 6], 'little'),
      content[place + 6],
    )
    if left < 7 or kind == 0:
      place += left
      continue
    whole += content[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # A whole record, or the last part of one.
      yield Record.FromString(whole)
      whole = b''


def test_progress_is_plain_lines_without_a_terminal(capsys):
  line = metrics.Progress(100, start=10, seconds=3600, enabled=True)
  shown = {'loss': 2.5, 'lr': 1e-3, 'tokens_per_second': 6100.0, 'mfu': 0.5234, 'z': 1}
  for step in (11, 12, 100):
    line.update(step, shown)
  line.say('saved')
  line.close()
  first, last, message = capsys.readouterr().err.splitlines()
  assert first.startswith('step 11/100  loss 2.5000  lr 1.00e-03  6.10k tok/s  mfu 52.3%')
  assert last.startswith('step 100/100') and message == 'saved'


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  screen = Terminal()
  monkeypatch.setattr(sys, 'stderr', screen)
  line = metrics.Progress(100, start=0, seconds=1, enabled=True)
  line.update(50, {'loss': 2.5})
  line.close()
  assert '50/100' in screen.getvalue() and 'loss 2.5000' in screen.getvalue()


def test_the_timer_excludes_compilation_and_pauses(monkeypatch):
  clock = iter([0, 5, 6, 10, 12, 15, 20, 22])
  monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
  timer = metrics.Timer(tokens_per_step=300, peak=1e5, devices=2)
  with timer.data():  # 0 to 5: before the first tick, so not counted.
    pass
  timer.tick(7e3)  # 6: its step is not counted
  with timer.data():  # 10 to 12
    pass
  with timer.pause():  # 15 to 20
    pass
  timer.tick(1e3)  # 22
  assert timer.read() == {
    'step_seconds': 11.0,
    'data_seconds': 2.0,
    'tokens_per_second': pytest.approx(300 / 11),
    'flops_per_second': pytest.approx(300 / 11 * 1e3),
    'mfu': pytest.approx(300 / 11 * 1e3 / 2e5),
  }
  assert timer.read() == {}


def test_an_unknown_chip_has_no_mfu():
  assert metrics.peak(jax.devices('cpu')[0]) is None
  timer = metrics.Timer(tokens_per_step=1, peak=None, devices=1)
  timer.tick(1.0)
  timer.tick(1.0)
  assert 'mfu' not in timer.read()


@pytest.mark.accelerator
def test_an_accelerator_reports_its_memory_and_its_peak():
  assert metrics.memory()['memory_peak_bytes'] > 0
  assert metrics.peak(jax.devices()[0])


def test_memory_is_empty_if_the_device_does_not_report_it(monkeypatch):
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(None)])
  assert metrics.memory() == {}
  stats = [{'bytes_in_use': 3, 'peak_bytes_in_use': n} for n in (5, 7)]
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(s) for s in stats])
  assert metrics.memory() == {'memory_bytes': 3, 'memory_peak_bytes': 7}


@pytest.fixture
def traces(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


@pytest.mark.parametrize(
  'window, steps, expected',
  [
    ((2, 4), range(8), [(2, 'start'), (4, 'stop')]),
    ((2, 4), range(3, 8), [(3, 'start'), (4, 'stop')]),
    ((2, 9), range(5), [(2, 'start'), ('end', 'stop')]),
    ((3, 3), range(5), [(3, 'start'), (3, 'stop')]),
    ((-1, -1), range(5), []),
    ((2, 4), range(5, 8), []),
  ],
)
def test_the_profiler_traces_its_window(tmp_path, traces, window, steps, expected):
  seen = []
  with metrics.Profile(tmp_path, *window, enabled=True) as profile:
    for step in steps:
      for act in (lambda: profile.before(step), lambda: profile.after(step, None)):  # noqa: B023
        act()
        seen += [(step, call) for call in traces]
        traces.clear()
  assert seen + [('end', call) for call in traces] == expected


def test_run_json_holds_the_versions_and_keeps_its_sessions(tmp_path, monkeypatch):
  jax.devices()  # XLA reads its flags now, and ends the process at an unknown one.
  monkeypatch.setenv('XLA_FLAGS', '--xla_some_flag')
  path = tmp_path / 'run' / 'run.json'
  words = {'config': {'seed': 1}, 'data': {'digest': 'abc'}}
  metrics.manifest(path, **words, restored=None, changed={})
  changed = {'config.total_steps': [10, 20]}
  metrics.manifest(path, **words, restored=0, changed=changed)
  run = json.loads(path.read_text())
  assert run['config'] == {'seed': 1} and run['data'] == {'digest': 'abc'}
  assert [s['restored_step'] for s in run['sessions']] == [-1, 0]
  last = run['sessions'][-1]
  assert last['changed'] == changed
  assert last['versions']['jax'] == jax.__version__
  assert last['devices'] == jax.device_count()
  assert last['environment']['XLA_FLAGS'] == '--xla_some_flag'
  assert [p.name for p in path.parent.iterdir()] == ['run.json']
  metrics.amend(path, {'config.init_from': ('a', 'a:7')})
  amended = json.loads(path.read_text())
  assert amended['sessions'][0] == run['sessions'][0]
  assert amended['sessions'][1]['changed']['config.init_from'] == ['a', 'a:7']
  assert amended['sessions'][1]['changed'].items() >= last['changed'].items()


def test_settings_that_changed_since_the_last_session_are_reported(
  tmp_path, monkeypatch, caplog
):
  path = tmp_path / 'run.json'
  session = lambda: metrics.manifest(path, config={}, data={}, restored=None, changed={})
  session()
  monkeypatch.setenv('JAX_LOG_COMPILES', '1')
  session()
  assert not caplog.text  # It changes no number.
  monkeypatch.setenv('JAX_ENABLE_X64', '1')
  monkeypatch.setattr(provenance, 'versions', lambda: {'jax': '9'})
  session()
  assert f'changed since the last session: jax {jax.__version__} -> 9, ' in caplog.text
  assert '$JAX_ENABLE_X64 None -> 1; the last bits may differ' in caplog.text
  run = json.loads(path.read_text())
  del run['sessions'][-1]['environment']  # An earlier version of run.json.
  path.write_text(json.dumps(run))
  caplog.clear()
  session()
  assert not caplog.text


def test_the_commit_is_that_of_the_code_and_not_of_a_hook(tmp_path, monkeypatch):
  command = ['git', '-C', pathlib.Path(__file__).parents[2], 'rev-parse', 'HEAD']
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    pytest.skip('the code is not in a checkout of git')
  monkeypatch.setenv('GIT_DIR', str(tmp_path))
  assert provenance.session()['git']['commit'] == done.stdout.strip()


def test_credentials_are_not_recorded(tmp_path, monkeypatch):
  for name in ('SECRET', 'API_KEY', 'ACCESS_TOKEN', 'PASSWORD', 'CREDENTIALS', 'x_Key'):
    monkeypatch.setenv(f'JAX_{name}', 'hush')
  monkeypatch.setenv('JAX_PROXY', 'http://me:hush@proxy:80/x')
  words = ['--wandb_api_key=hush', '--token', 'hush', '--config.x.password=hush']
  words += [
    's3://me:hush@host/b',
    '--on=s3://bucket@code,s3://b/c@d',
    '--tokenizer=bpe:9',
  ]
  monkeypatch.setattr(sys, 'argv', ['train.py', *words, '--secret', '--steps', '3'])
  metrics.manifest(tmp_path / 'run.json', config={}, data={}, restored=None, changed={})
  text = (tmp_path / 'run.json').read_text()
  assert 'hush' not in text
  (session,) = json.loads(text)['sessions']
  assert session['environment']['JAX_PROXY'] == 'http://***@proxy:80/x'
  assert session['command'] == [
    'train.py',
    '--wandb_api_key=***',
    '--token',
    '***',
    '--config.x.password=***',
    's3://***@host/b',
    '--on=s3://bucket@code,s3://b/c@d',
    '--tokenizer=bpe:9',
    '--secret',
    '--steps',
    '3',
  ]


@pytest.mark.parametrize(
  'flag, hidden',
  [
    ('--hf_token', True),
    ('-TOKEN', True),
    ('--aws_access_key_id', True),
    ('--credentials', True),
    ('--db-passwd', True),
    ('--config.data.tokenizer', False),
    ('--tokens_per_step', False),
    ('--config.model.attn.heads', False),
    ('--' + '_key' * 5000 + '!x', True),
  ],
)
def test_a_flag_is_secret_if_a_whole_word_of_its_name_is(flag, hidden):
  assert (provenance.command([f'{flag}=7'])[0] == f'{flag}=***') == hidden


def on(store, seconds=3600.0, part=5):
  """Sets the interval between writes, and a small number of records per part."""
  store.setattr(lines, 'SECONDS', seconds)
  store.setattr(lines, 'PART', part)


def steps(workdir):
  return [record['step'] for record in metrics.read(f'{workdir}/metrics.jsonl')]


def test_records_in_a_store_are_read_in_order_and_to_the_last_bit(remote, monkeypatch):
  on(monkeypatch)
  values = [0.1, 1 / 3, 5e-324, math.inf, -0.0, 1e308] * 4
  with metrics.Log(remote, step=-1, enabled=True, **OFF) as log:
    for step, value in enumerate(values):
      log.write(step, 'train', {'loss': value})
      if step % 7 == 0:
        log.sync()
  records = metrics.read(f'{remote}/metrics.jsonl')
  assert [r['loss'].hex() for r in records] == [v.hex() for v in values]
  assert steps(remote) == list(range(24))
  parts = storage.names(f'{remote}/metrics.jsonl.parts')
  assert 2 <= len(parts) <= 5 and metrics.exists(f'{remote}/metrics.jsonl')


def test_a_record_is_stored_at_sync_and_after_some_seconds(remote, monkeypatch):
  on(monkeypatch)
  log = metrics.Log(remote, step=-1, enabled=True, **OFF)
  log.write(1, 'train', {'loss': 1.0})
  assert not metrics.exists(log.path)
  with pytest.raises(FileNotFoundError, match=r'metrics\.jsonl'):
    metrics.read(log.path)
  log.sync()
  assert steps(remote) == [1]
  log.close()
  on(monkeypatch, seconds=0.05)
  with metrics.Log(remote, step=1, enabled=True, **OFF) as log:
    log.write(2, 'train', {'loss': 1.0})
    until = time.monotonic() + 10
    while steps(remote) != [1, 2]:
      assert time.monotonic() < until
      time.sleep(0.02)


def test_a_full_part_is_stored_at_once(remote, monkeypatch):
  on(monkeypatch, part=3)
  with metrics.Log(remote, step=-1, enabled=True, **OFF) as log:
    for step in range(4):
      log.write(step, 'train', {})
    until = time.monotonic() + 10
    while len(storage.names(f'{remote}/metrics.jsonl.parts')) < 1:
      assert time.monotonic() < until
      time.sleep(0.02)
  assert steps(remote) == [0, 1, 2, 3]


def test_reopening_in_a_store_drops_the_records_after_the_restored_step(
  remote, monkeypatch
):
  on(monkeypatch)
  for step, count in ((-1, 12), (6, 3), (8, 0)):
    with metrics.Log(remote, step=step, enabled=True, **OFF) as log:
      for s in range(step + 1, step + 1 + count):
        log.write(s, 'train', {'from': step})
        log.sync()
  records = metrics.read(f'{remote}/metrics.jsonl')
  assert [(r['step'], r['from']) for r in records] == [
    *((s, -1) for s in range(7)),
    (7, 6),
    (8, 6),
  ]
  lines.truncate(f'{remote}/metrics.jsonl', 3)
  assert steps(remote) == [0, 1, 2, 3]
  lines.truncate(f'{remote}/metrics.jsonl', -1)
  assert storage.names(remote) == []


def test_a_store_outage_delays_records_but_not_the_run(remote, monkeypatch, caplog):
  on(monkeypatch, seconds=0.02)
  faults = []

  def refuse(*_):
    faults.append(1)
    raise OSError('the network is down')

  with metrics.Log(remote, step=-1, enabled=True, **OFF) as log:
    with monkeypatch.context() as patch:
      patch.setattr(storage, 'write', refuse)
      for step in range(20):
        log.write(step, 'train', {})
      while len(faults) < 3:
        time.sleep(0.01)
      with pytest.raises(OSError, match='network is down'):
        log.sync()
    log.sync()
    assert steps(remote) == list(range(20))
  assert caplog.text.count('the network is down') == 1


def test_a_workdir_can_be_copied_to_a_store_and_back(remote, tmp_path, monkeypatch):
  on(monkeypatch)
  here = tmp_path / 'run'

  def more(workdir, step):
    with metrics.Log(workdir, step=step, enabled=True, **OFF) as log:
      for s in range(step + 1, step + 8):
        log.write(s, 'train', {})
    return steps(workdir)

  assert more(here, -1) == list(range(7))
  storage.upload(here, remote, storage.sizes(here))
  assert more(remote, 6) == list(range(14))
  storage.download(remote, tmp_path / 'back', storage.sizes(remote))
  assert steps(tmp_path / 'back') == list(range(14))
  assert more(tmp_path / 'back', 13) == list(range(21))
  assert storage.names(tmp_path / 'back') == ['metrics.jsonl']


@pytest.mark.parametrize('where', ['local', 's3'])
def test_append_adds_a_complete_record(where, request, tmp_path):
  folder = tmp_path if where == 'local' else request.getfixturevalue('remote')
  path = f'{folder}/deep/spikes.jsonl'
  metrics.append(path, {'step': 3, 'loss': math.nan})
  whole = storage.read(path, 1 << 20)
  metrics.append(path, {'step': 4, 'loss': np.float32(0.1)})
  records = metrics.read(path)
  assert math.isnan(records[0]['loss'])
  assert records[1] == {'step': 4, 'loss': float(np.float32(0.1))}
  storage.write(path, whole + b'{"step": 4, "lo')
  metrics.append(path, {'step': 5})
  assert [r['step'] for r in metrics.read(path)] == [3, 5]
  assert storage.names(f'{folder}/deep') == ['spikes.jsonl']


def test_event_files_are_not_written_to_a_store(remote, caplog):
  with metrics.Log(remote, step=-1, enabled=True, tensorboard=True, wandb='') as log:
    log.write(1, 'train', {'loss': 1.0})
  assert caplog.text.count('TensorBoard needs a local workdir') == 1
  assert storage.names(remote) == ['metrics.jsonl.parts']


def test_a_trace_into_a_store_is_refused_with_its_knob(remote, tmp_path):
  with pytest.raises(ValueError, match=rf'config\.log\.profile_first=3.*{remote}'):
    metrics.check_remote(remote, profile_first=3)
  metrics.check_remote(remote, profile_first=-1)
  metrics.check_remote(tmp_path, profile_first=3)


def test_wandb_keeps_its_id_in_the_store_and_its_files_on_disk(remote, monkeypatch):
  fake = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for _ in range(2):
    metrics.Log(remote, step=-1, enabled=True, tensorboard=False, wandb='mine').close()
  first, second = fake.words
  assert first['id'] == second['id'] and len(first['id']) == 8
  assert not storage.is_remote(first['dir']) and first['name'] in remote


def test_run_json_in_a_store_keeps_its_sessions(remote):
  path = f'{remote}/run.json'
  for step in (None, 10):
    metrics.manifest(path, config={'seed': 1}, data={}, restored=step, changed={})
  run = json.loads(storage.read(path, 1 << 20))
  assert [s['restored_step'] for s in run['sessions']] == [-1, 10]


@pytest.mark.parametrize(
  'line', ['{"step": 2, "kind"', '{"stop": 2}', '{"step": "2"}', '[2]', '', '[' * 10**5]
)
def test_a_damaged_line_is_reported_and_nothing_is_written(line, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  before = path.read_bytes()
  for use in (metrics.read, lambda path: lines.truncate(path, 2)):
    with pytest.raises(metrics.Damaged, match=r'metrics\.jsonl: the line .* is damaged'):
      use(path)
  assert path.read_bytes() == before
