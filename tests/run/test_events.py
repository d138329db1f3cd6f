"""Bad steps stay in spikes.jsonl if they belong to the history of the run."""

import json
import math

import pytest

from gated import storage
from gated.run import events, metrics

VALUES = dict(
  loss=3.0,
  loss_zscore=7.5,
  grad_norm=1 / 3,
  grad_norm_zscore=-0.25,
  param_norm=50.0,
  bad_in_row=0.0,
  lr=1e-3,
)
RECORDS = [['stdlib', 'code-0', 4], ('stdlib', 'prose-1', 0)]


def put(ledger, data_step, *, ahead=0, action='note', **values):
  ledger.write(
    data_step + 1 - ahead,
    data_step,
    action=action,
    why='it is bad',
    values=VALUES | values,
    records=RECORDS,
  )


def opened(workdir, data_step=0, *, enabled=True):
  return events.Events(workdir, data_step=data_step, enabled=enabled)


def test_an_event_holds_the_metrics_the_action_and_the_records(tmp_path):
  ledger = opened(tmp_path)
  put(ledger, 57, ahead=3, action='rollback', bad_in_row=1.0)
  expected = dict(step=55, data_step=57, action='rollback', why='it is bad', skipped=True)
  expected |= {name: VALUES[name] for name in events.KEPT}
  expected['records'] = [list(record) for record in RECORDS]
  assert events.read(tmp_path) == ledger.all == [expected]


def test_nan_and_infinity_are_read_back_from_strict_json(tmp_path):
  ledger = opened(tmp_path)
  put(ledger, 0, loss=math.nan, grad_norm=math.inf, loss_zscore=-math.inf)
  (event,) = events.read(tmp_path)
  assert math.isnan(event['loss']) and event['grad_norm'] == math.inf
  assert event['loss_zscore'] == -math.inf
  assert event['grad_norm_zscore'] == VALUES['grad_norm_zscore']

  def strange(word):
    pytest.fail(f'{word} is not JSON')

  json.loads((tmp_path / events.NAME).read_text(), parse_constant=strange)


def test_a_run_without_events_has_no_file(tmp_path):
  assert opened(tmp_path).all == events.read(tmp_path) == []
  assert list(tmp_path.iterdir()) == []


def test_events_of_batches_that_will_be_read_again_are_dropped(tmp_path):
  for data_step in (3, 8, 12):
    put(opened(tmp_path, data_step), data_step)
  ledger = opened(tmp_path, 9)
  assert [event['data_step'] for event in ledger.all] == [3, 8]
  assert events.read(tmp_path) == ledger.all
  put(ledger, 12)
  assert [event['data_step'] for event in events.read(tmp_path)] == [3, 8, 12]
  assert opened(tmp_path, 12).all == ledger.all[:2]


def test_events_before_a_rollback_are_kept(tmp_path):
  """The bad batch was read, and the data continues past it."""
  ledger = opened(tmp_path)
  put(ledger, 8, action='rollback', bad_in_row=1.0)
  ledger = opened(tmp_path, 9)  # Restored at step 6, for example.
  assert [event['step'] for event in ledger.all] == [9]
  put(ledger, 11, ahead=3)
  assert [event['step'] for event in events.read(tmp_path)] == [9, 9]
  assert ledger.report() == {'bad steps': 2, 'skipped updates': 1, 'rollbacks': 1}


def test_the_report_counts_events_of_all_sessions(tmp_path):
  for data_step, values in enumerate(
    (
      dict(bad_in_row=1.0, loss=math.nan),
      dict(bad_in_row=2.0, loss=math.nan),
      dict(),
      dict(action='rollback', bad_in_row=1.0),
      dict(action='stop', bad_in_row=5.0),
    )
  ):
    put(opened(tmp_path, data_step), data_step, **values)
  counts = {'bad steps': 5, 'skipped updates': 4, 'rollbacks': 1}
  assert opened(tmp_path, 5).report() == counts
  assert opened(tmp_path / 'none', 5).report() == dict.fromkeys(counts, 0)


def test_a_process_that_does_not_write_counts_the_same_events(tmp_path):
  one, other = opened(tmp_path), opened(tmp_path, enabled=False)
  for ledger in (one, other):
    put(ledger, 2)
  assert other.all == one.all == events.read(tmp_path)
  before = (tmp_path / events.NAME).read_bytes()
  assert opened(tmp_path, 1, enabled=False).all == []
  assert (tmp_path / events.NAME).read_bytes() == before


def test_a_line_cut_off_by_a_kill_is_dropped_at_the_next_event(tmp_path):
  put(opened(tmp_path), 1)
  path = tmp_path / events.NAME
  with path.open('ab') as file:
    file.write(b'{"step": 9, "data_st')
  ledger = opened(tmp_path, 5)
  assert [event['data_step'] for event in ledger.all] == [1]
  put(ledger, 5)
  assert [event['data_step'] for event in metrics.read(path)] == [1, 5]


def test_an_event_without_a_data_step_is_refused_with_its_step(tmp_path):
  home = storage.path(tmp_path)
  (tmp_path / 'spikes.jsonl').write_text('{"step": 3}\n')
  with pytest.raises(metrics.Damaged, match=r'spikes\.jsonl: step 3 has no data_step'):
    events.Events(home, data_step=9, enabled=True)
  assert (tmp_path / 'spikes.jsonl').read_text() == '{"step": 3}\n'


def test_a_summary_lists_the_nonzero_counts():
  report = {'bad steps': 2, 'skipped updates': 0, 'rollbacks': 1}
  assert events.summary(report) == '2 bad steps, 1 rollbacks'
