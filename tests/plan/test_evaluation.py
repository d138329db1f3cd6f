"""The result of an evaluation is printed before it is stored."""

import json
import types

from gated import evals, storage
from gated.plan import evaluation

ABOUT = {'data': {'sha256': 'a' * 64}}


def loaded(path, about=ABOUT):
  return types.SimpleNamespace(path=storage.path(path), step=7, tag='7', about=about)


def test_a_report_is_stored_by_its_step_and_by_data_that_are_not_the_runs(tmp_path):
  for data, name in (('a' * 64, '7.json'), ('b' * 64, '7-bbbbbbbb.json')):
    report = {'data': data, 'loss': float('inf')}
    evaluation.store(report, loaded(tmp_path), 'eval')
    stored = json.loads((tmp_path / 'eval' / name).read_text())
    assert stored == report | {'loss': 'Infinity'}
  evaluation.store({'loss': 1.5}, loaded(tmp_path), 'probes')
  assert json.loads((tmp_path / 'probes' / '7.json').read_text()) == {'loss': 1.5}
  assert len(list(tmp_path.rglob('*.json'))) == 3


def test_imported_weights_store_nothing(tmp_path):
  evaluation.store({'data': 'a'}, loaded(tmp_path, about=None), 'eval')
  assert not list(tmp_path.iterdir())


def test_a_disk_that_rejects_a_report_is_a_warning(tmp_path, caplog):
  (tmp_path / 'eval').write_text('in the way')
  evaluation.store({'loss': 1.5}, loaded(tmp_path), 'eval')
  assert 'the result was printed, but could not be stored' in caplog.text
  assert str(tmp_path / 'eval') in caplog.text


def test_without_the_runs_own_data_there_is_no_bigram_and_the_table_says_why(
  monkeypatch,
):
  """As for another mixture, after the run's dataset has moved."""

  def corpus():
    raise ValueError('config.data.mixture=old: no such dataset')

  run = loaded('run', ABOUT | {'config': {'batch': 8}, 'stability': None})
  run.corpus = corpus
  other = types.SimpleNamespace(fingerprint={'sha256': 'b' * 64}, rows=99)
  measure = lambda *_, chosen, **__: {
    'd': {f'{name}_bits_per_byte': 1 for name in chosen}
  }
  monkeypatch.setattr(evals, 'measure_yardsticks', measure)
  summary = dict(nats_per_token=2.5, perplexity=12.2, bits_per_byte=1.5, tokens=10)
  report = {'step': 7, 'rows_limit': 0, 'domains': {'d': summary}}
  options = dict(chosen=('bigram', 'xz'), rows=4, xz_bytes=0)
  evaluation.complete(report, run, other, **options)
  assert report['domains'] == {'d': summary | {'xz_bits_per_byte': 1}}
  reason = 'config.data.mixture=old: no such dataset'
  assert report['without'] == {'bigram': reason}
  assert evals.table(report).splitlines()[-1] == f'without bigram: {reason}'
