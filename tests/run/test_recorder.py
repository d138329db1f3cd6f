"""The metrics of a step are read one step late, logged and judged."""

import math
import types

import jax.numpy as jnp
import pytest
import small

from gated.probes import indicators
from gated.run import events, metrics, recorder

NAN, INF = math.nan, math.inf
FINE = dict(
  loss=3.0,
  grad_norm=1.0,
  param_norm=50.0,
  lr=1e-3,
  flops_per_token=1e3,
  verdict=0,
  bad_in_row=0,
  skipped=0,
  spikes=0,
  loss_zscore=0.5,
  grad_norm_zscore=-0.5,
)
SPIKE = dict(verdict=1, loss=300.0, loss_zscore=99.0)
BROKEN = dict(verdict=2, loss=NAN, loss_zscore=INF, bad_in_row=1, skipped=1)


def values(**changes):
  """The metrics of a step on the device, as the train step returns them."""
  return {name: jnp.asarray(value) for name, value in (FINE | changes).items()}


def ids(data_step):
  return [['stdlib', 'code-0', 8 * data_step + i] for i in range(2)]


@pytest.fixture
def begin(tmp_path):
  """begin(step, **knobs) -> a recorder after that step, whose beats are in `.beats`."""
  opened = []

  def begin(step=0, *, ahead=0, **knobs):
    cfg = small.whole(**dict(steps=9, log__tensorboard=False) | knobs)
    corpus = types.SimpleNamespace(record_ids=ids)
    beats = []
    record = recorder.Recorder(
      corpus,
      tmp_path,
      log=cfg.log,
      stability=cfg.stability,
      steps=cfg.steps,
      tokens_per_step=128,
      restored=step or None,
      data_step=step + ahead,
      beat=beats.append,
    )
    record.beats = beats
    opened.append(record)
    return record

  yield begin
  for record in opened:
    record.__exit__(None, None, None)


def written(workdir, kind='train'):
  return [r for r in metrics.read(workdir / 'metrics.jsonl') if r['kind'] == kind]


def beaten(record):
  return [int(beat.removeprefix('step ')) for beat in record.beats]


def steps(workdir):
  return [r['step'] for r in written(workdir)]


def test_a_step_is_read_when_the_next_is_taken(begin, tmp_path):
  record = begin()
  for step in (1, 2, 3):
    record.take(step, values(loss=float(step)))
    assert steps(tmp_path) == beaten(record) == list(range(1, step))
  assert record.settle() and record.settle()
  assert steps(tmp_path) == beaten(record) == [1, 2, 3]
  assert [r['loss'] for r in written(tmp_path)] == [1.0, 2.0, 3.0]


def test_the_last_step_is_read_only_by_settle(begin, tmp_path):
  with begin() as record:
    record.take(1, values())
  assert steps(tmp_path) == []


@pytest.mark.parametrize(
  ('changes', 'finite'),
  [
    ({}, True),
    (SPIKE, True),
    (SPIKE | dict(bad_in_row=1), True),
    (BROKEN, False),
    (BROKEN | dict(loss=3.0, grad_norm=INF), False),
    (BROKEN | dict(loss=3.0), False),  # The update was not finite.
  ],
)
def test_settle_returns_whether_the_last_step_was_finite(changes, finite, begin):
  record = begin()
  record.take(1, values(**changes))
  assert record.settle() == finite
  record.take(2, values())
  assert record.settle()


def test_every_nth_step_the_last_and_every_bad_one_are_written(begin, tmp_path):
  record = begin(log__every=4)
  for step in range(1, 10):
    record.take(step, values(**BROKEN if step == 6 else {}))
  record.settle()
  assert steps(tmp_path) == [4, 6, 8, 9]
  assert beaten(record) == list(range(1, 10))
  assert math.isnan(written(tmp_path)[1]['loss'])


def test_a_bad_step_is_recorded_with_the_records_of_its_batch(begin, tmp_path, capsys):
  record = begin(2, ahead=3)
  record.take(3, values(**BROKEN))
  record.take(4, values(**SPIKE))
  record.settle()
  broken, spike = events.read(tmp_path)
  assert (broken['step'], broken['data_step'], broken['skipped']) == (3, 5, True)
  assert (spike['step'], spike['data_step'], spike['skipped']) == (4, 6, False)
  assert broken['records'] == ids(5) and spike['records'] == ids(6)
  assert broken['action'] == spike['action'] == 'note'
  output = capsys.readouterr().err
  assert 'step 3: the loss is NaN' in output
  assert 'step 4: the loss 300 is 99 standard deviations above its mean' in output


@pytest.mark.parametrize('by', ['the next step', 'settle'])
def test_a_spike_raises_a_rollback_past_its_batch(by, begin, tmp_path):
  record = begin(2, ahead=3, stability__on_spike='rollback')
  record.take(3, values(**SPIKE, bad_in_row=1))
  with pytest.raises(recorder.Rollback, match='the loss 300') as caught:
    if by == 'settle':
      record.settle()
    else:
      record.take(4, values())
  assert caught.value.data_step == 6  # The next batch: 3 steps, and 3 ahead.
  assert steps(tmp_path) == [3]
  (event,) = events.read(tmp_path)
  assert (event['action'], event['data_step']) == ('rollback', 5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (BROKEN | dict(bad_in_row=4), r'4 bad steps in a row \(config\.stability\.max_bad_'),
    (dict(param_norm=NAN), 'the parameter norm is NaN'),
  ],
)
def test_a_fatal_step_is_recorded_and_stops_the_run(changes, message, begin, tmp_path):
  record = begin(stability__max_bad_steps=4)
  record.take(1, values(**changes))
  with pytest.raises(FloatingPointError, match=f'step 1: {message}'):
    record.settle()
  assert [event['action'] for event in events.read(tmp_path)] == ['stop']
  assert steps(tmp_path) == [1]


def test_rollbacks_of_earlier_sessions_count(begin):
  knobs = dict(stability__on_spike='rollback', stability__max_rollbacks=2)
  for rollbacks in range(2):
    record = begin(ahead=rollbacks, **knobs)
    record.take(1, values(**SPIKE))
    with pytest.raises(recorder.Rollback):
      record.settle()
  record = begin(ahead=2, **knobs)
  assert record.events.report()['rollbacks'] == 2
  record.take(1, values(**SPIKE))
  with pytest.raises(FloatingPointError, match=r'config\.stability\.max_rollbacks=2'):
    record.settle()


def test_a_session_drops_later_records_of_another_session(begin, tmp_path):
  with begin() as record:
    for step in (1, 2, 3):
      record.take(step, values(**SPIKE if step == 3 else {}))
    record.settle()
  assert steps(tmp_path) == [1, 2, 3] and len(events.read(tmp_path)) == 1
  with begin(2):
    pass
  assert steps(tmp_path) == [1, 2] and events.read(tmp_path) == []


def test_indicators_are_written_even_if_they_are_not_finite(begin, tmp_path):
  record = begin(log__every=4)
  seen = dict(attention_logit=jnp.float32(NAN), attention_layer=jnp.int32(3))
  watched = lambda tree: {'indicators': (tree, indicators.scalars)}
  record.take(1, values(), watched(seen))
  record.take(2, values())
  last = watched(seen | dict(output_logit=jnp.float32(INF)))
  record.take(3, values(param_norm=NAN), last)
  with pytest.raises(FloatingPointError, match='step 3'):
    record.settle()
  first, last = written(tmp_path, 'indicators')
  assert (first['step'], first['attention_layer']) == (1, 3)
  assert math.isnan(first['attention_logit']) and last['output_logit'] == INF
  assert [r['kind'] for r in metrics.read(tmp_path / 'metrics.jsonl')][-2:] == [
    'train',
    'indicators',
  ]


def heldout(loss):
  summary = dict(nats_per_token=loss, bits_per_byte=2.5, rows=3)
  return dict(loss=loss, domains=dict(code=summary))


def test_a_held_out_loss_is_written_by_domain(begin, tmp_path):
  record = begin()
  assert record.heldout(4, heldout(2.25)) == 2.25
  (row,) = written(tmp_path, 'heldout')
  assert (row['step'], row['loss']) == (4, 2.25)
  assert row['code/nats_per_token'] == 2.25 and row['code/bits_per_byte'] == 2.5
  assert record.heldout(5, dict(loss=None, domains={})) is None
  assert len(written(tmp_path, 'heldout')) == 1


def test_text_without_bytes_has_no_bits_per_byte_in_the_log(begin, tmp_path, capsys):
  report = heldout(2.25)
  report['domains'] |= {'empty': dict(nats_per_token=1.0, bits_per_byte=None)}
  begin().heldout(4, report)
  (row,) = written(tmp_path, 'heldout')
  assert row['empty/nats_per_token'] == 1.0 and 'empty/bits_per_byte' not in row
  assert 'held-out bits per byte: code 2.5000, empty -' in capsys.readouterr().err


@pytest.mark.parametrize('loss', [NAN, INF])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(loss, begin, tmp_path):
  with pytest.raises(FloatingPointError, match='step 4: the held-out loss is'):
    begin().heldout(4, heldout(loss))
  assert len(written(tmp_path, 'heldout')) == 1
