"""Domains by sliding windows, copying by distance, and what is refused; by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small

from gated import storage
from gated.data import tokenizer
from gated.evals import copying, domains, long_text, positions
from gated.plan.load import Loaded

RNG = np.random.default_rng(0)
LENGTH, STRIDE = 8, 3
BYTES = tokenizer.load('bytes')


def options(**changes):
  plain = dict.fromkeys(('domain', 'suffixes', 'streaming', 'copying'), ())
  plain |= dict(length=0, stride=0, batch=2, rows=0, by_position=False, figures=False)
  return long_text.Options(**plain | changes)


@pytest.mark.parametrize('targets', [1, 7, 8, 9, 20])
def test_each_target_counts_once_after_as_many_tokens_as_the_stride_leaves(targets):
  seen = []
  for start, stop, first in domains.windows(targets, length=LENGTH, stride=STRIDE):
    assert 0 < stop - start <= LENGTH and start % STRIDE == 0
    for target in range(first + 1, stop + 1):
      seen.append(target)
      assert target - start > LENGTH - STRIDE or start == 0
  assert seen == [*range(1, targets + 1)]


def test_the_losses_of_domains_are_those_of_each_target_after_its_window(monkeypatch):
  """On two devices, with masked documents, and errors by document."""
  monkeypatch.setattr(domains, 'EARLY', 3)
  monkeypatch.setattr(domains, 'LATE', 7)
  net, on = small.model_of(attn__gate__position='sdpa'), small.mesh_of(data=2)
  sizes = {'a': (4, 23, 9), 'b': (2, 12)}
  made = [
    domains.Domain(k, [RNG.integers(0, 40, n, np.int32) for n in v], [n - 1 for n in v])
    for k, v in sizes.items()
  ]
  run = jax.jit(lambda batch: positions.measure(net, batch, chunk=16)[1])
  counted = []

  def evaluate(batch):
    with jax.set_mesh(on):
      return run(batch)

  report = domains.measure(
    evaluate,
    made,
    cfg=net.cfg,
    on=on,
    length=LENGTH,
    stride=STRIDE,
    batch=2,
    after=counted.append,
  )
  # By hand: the first window that predicts a target, padded on the right.
  rows, targets = [], []
  for i, domain in enumerate(made):
    for j, ids_N in enumerate(domain.ids):
      for t in range(1, len(ids_N)):
        start = next(s for s in range(0, 99, STRIDE) if s + LENGTH >= t)
        rows.append(np.pad(ids_N[start:t], (0, LENGTH - (t - start))))
        targets.append((i, j, t, t - start - 1, ids_N[t]))
  logit_RTV = np.asarray(jax.jit(lambda x: net(x))(np.array(rows)), float)
  at = np.arange(len(rows)), [place for *_, place, _ in targets]
  logit_RV = logit_RTV[at]
  top = logit_RV.max(-1)
  target = np.arange(len(rows)), [token for *_, token in targets]
  nats_R = np.log(np.exp(logit_RV - top[:, None]).sum(-1)) + top - logit_RV[target]
  for i, domain in enumerate(made):
    found = report['domains'][domain.name]
    mine = [k for k, each in enumerate(targets) if each[0] == i]
    assert found['tokens'] == len(mine) and found['documents'] == len(domain.ids)
    mean = nats_R[mine].mean()
    assert found['nats_per_token'] == pytest.approx(mean, rel=1e-5)
    by_document = [
      nats_R[[k for k in mine if targets[k][1] == j]] - mean
      for j in range(len(domain.ids))
    ]
    D = len(by_document)
    square = D / (D - 1) * sum(x.sum() ** 2 for x in by_document) / len(mine) ** 2
    assert found['nats_per_token_stderr'] == pytest.approx(square**0.5, rel=1e-4)
  nats = {each[:3]: x for each, x in zip(targets, nats_R)}
  # The 7th token is predicted from 6, so the document of 4 tokens has none.
  rises = [nats[0, j, 6] - nats[0, j, 2] for j in (1, 2)]
  late = report['domains']['a']['loss_7_minus_3']
  assert late['documents'] == 2 and late['nats'] == pytest.approx(
    np.mean(rises), rel=1e-4
  )
  assert late['stderr'] == pytest.approx(np.std(rises, ddof=1) / 2**0.5, rel=1e-4)
  curve = report['positions']
  assert sum(curve['tokens']) == len(rows) and len(curve['tokens']) == LENGTH
  last = [x for each, x in zip(targets, nats_R) if each[3] == LENGTH - 1]
  assert curve['nats_per_token'][-1] == pytest.approx(np.mean(last), rel=1e-5)
  assert sum(counted) == sum(
    len([*domains.windows(n - 1, length=LENGTH, stride=STRIDE)])
    for v in sizes.values()
    for n in v
  )


def test_averages_over_domains_are_named_by_their_formulas():
  summary = lambda nats, error: dict(nats_per_token=nats, nats_per_token_stderr=error)
  both = domains.means({'a': summary(1.0, 0.1), 'b': summary(3.0, 0.2)})
  e = np.exp
  assert both['mean_of_perplexities'] == pytest.approx((e(1) + e(3)) / 2)
  assert both['exp_of_mean_loss'] == pytest.approx(e(2))
  error = np.hypot(e(1) * 0.1, e(3) * 0.2) / 2
  assert both['mean_of_perplexities_stderr'] == pytest.approx(error)
  error = e(2) * np.hypot(0.1, 0.2) / 2
  assert both['exp_of_mean_loss_stderr'] == pytest.approx(error)
  assert domains.means({'a': summary(1.0, None)})['mean_of_perplexities_stderr'] is None


def test_documents_are_read_from_files_with_the_bytes_of_their_targets(tmp_path):
  lines = [json.dumps({'text': text}) for text in ('héllo', 'x', '', 'abc')]
  (tmp_path / 'many.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'code.py').write_text('x = 1\n')
  given = dict(tokenizer=BYTES, suffixes=(), limit=0)
  many = domains.read(f'm={tmp_path}/many.jsonl', prefix=(), **given)
  assert [bytes(ids.tolist()).decode() for ids in many.ids] == ['héllo', 'abc']
  assert many.name == 'm' and many.bytes == [5, 2]
  begun = domains.read(f'm={tmp_path}/many.jsonl', prefix=(256,), **given)
  assert [len(ids) for ids in begun.ids] == [7, 2, 4] and begun.bytes == [6, 1, 3]
  assert len(domains.read(f'm={tmp_path}', prefix=(), **given | {'limit': 1}).ids) == 1
  assert domains.read(f'm={tmp_path}/code.py', prefix=(), **given).bytes == [5]
  (tmp_path / 'short.txt').write_text('x')
  for spec, message in (
    (f'm={tmp_path}/none', '/none: .*none'),
    (f'm={tmp_path}/short.txt', 'short.txt: no document has at least two tokens'),
    (f'={tmp_path}', 'but NAME=PATH is expected'),
    ('name', 'but NAME=PATH is expected'),
  ):
    with pytest.raises(ValueError, match=message) as error:
      domains.read(spec, prefix=(), **given)
    assert str(error.value).startswith(f'--domain={spec}')


def test_a_repeat_has_no_loss_for_a_model_that_copies_and_its_control_has():
  ids_N = RNG.integers(0, 200, 400)
  distances, span = (32, 100), copying.SPAN
  for distance in distances:
    repeat, control = copying.rows(ids_N, distance, count=3, seed=1)
    for batch in (repeat, control):
      assert batch.weights.sum(1).tolist() == [span - 1] * 3
      np.testing.assert_array_equal(
        batch.targets[:, : distance + span - 2], batch.tokens[:, 1 : distance + span - 1]
      )
      text = batch.tokens[0, span:distance]
      starts = range(len(ids_N) - len(text) + 1)
      assert any((ids_N[i : i + len(text)] == text).all() for i in starts)
    last = slice(distance, distance + span - 1)
    np.testing.assert_array_equal(repeat.targets[:, last], control.targets[:, last])
    np.testing.assert_array_equal(repeat.targets[:, last], repeat.tokens[:, 1:span])
    assert (control.targets[:, last] != control.tokens[:, 1:span]).mean() > 0.9

  def copies(batch):
    """2 nats for a token that does not follow an earlier place of the last three."""
    rows = zip(*map(np.asarray, (batch.tokens, batch.targets, batch.weights)))
    sums = []
    for tokens, targets, weights in rows:
      nats = 0.0
      for t in np.flatnonzero(weights):
        near = [
          s for s in range(t) if tokens[s] == tokens[t] and tokens[s + 1] == targets[t]
        ]
        nats += 0 if near else 2
      sums.append((nats, weights.sum()))
    return tuple(np.array(x) for x in zip(*sums))

  counted = []
  report = copying.measure(
    copies,
    ids_N,
    distances=distances,
    on=small.mesh_of(data=2),
    count=3,
    batch=1,
    seed=1,
    after=counted.append,
  )
  assert sum(counted) == 2 * 2 * 3 and [*report['distances']] == ['32', '100']
  for found in report['distances'].values():
    assert found['nats_per_token'] == 0 and 1.8 < found['control'] <= 2
    assert found['gain'] == found['control'] and found['gain_stderr'] < 0.1
  with pytest.raises(ValueError, match=r'--copying=999, .* 32 more than the 400 tokens'):
    copying.rows(ids_N, 999, count=3, seed=1)


def loaded(**changes):
  about = {'config': {'data': {'length': 64}}}
  cfg = small.model_config(**changes)
  return Loaded(storage.path('/run'), cfg, step=1, about=about, cache='')


def test_yarn_stretches_the_rows_that_a_run_was_trained_on():
  plain = loaded()
  assert plain.prepared == 64 and plain.stretched('') is plain
  four = plain.stretched('4,truncate=False')
  yarn = four.cfg.attn.yarn
  assert (yarn.factor, yarn.original, yarn.truncate, four.prepared) == (4, 64, False, 256)
  rest = lambda run: dataclasses.replace(run.cfg, attn=plain.cfg.attn)
  assert rest(four) == plain.cfg and four.dropless().yarn == four.yarn
  # A model with YaRN keeps its original length; the factor is replaced.
  has = loaded(attn__yarn__factor=8.0, attn__yarn__original=16)
  assert has.prepared == 128 and has.stretched('2').prepared == 32
  assert plain.stretched('1').prepared == 64
  assert (plain.tag, four.tag) == ('1', '1-yarn=4+truncate=False')


def test_lengths_that_rope_was_not_prepared_for_are_refused_by_the_flag():
  domain = ('a=b',)
  assert options(domain=domain).window(64, '') == (64, 32)
  assert options(domain=domain, length=9, stride=9).window(64, '') == (9, 9)
  assert options(domain=domain, length=99).window(0, '') == (99, 49)
  assert options(domain=domain, length=99).window(64, '1,attention=1.2') == (99, 49)
  # The positions of a cache stay within it.
  assert options(domain=domain, length=99, streaming=('60:4',)).window(64, '')
  for given, message in (
    (dict(length=65), '--length=65, but RoPE is prepared for 64 tokens: --yarn='),
    (dict(streaming=('61:4',)), '--streaming=61:4, but RoPE is prepared for 64'),
    (dict(copying=(33,)), '--copying=33, but RoPE is prepared for 64'),
    (dict(length=8, stride=9), '--stride=9, but a window has only 8 tokens'),
  ):
    with pytest.raises(ValueError, match=f'^{message}'):
      options(domain=domain, **given).window(64, '')
  with pytest.raises(ValueError, match=r'^--length=TOKENS is needed'):
    options(domain=domain).window(0, '')
  for given, message in (
    (dict(stride=4), '--stride=4 needs --domain'),
    (dict(copying=(64,), figures=True), '--figures=True needs --domain'),
    (dict(domain=('a=x', 'a=y')), '--domain=a=... is given twice'),
    (dict(domain=domain, streaming=('8',)), '--streaming=8, but WINDOW:KEPT'),
    (dict(domain=domain, streaming=('0:4',)), '--streaming=0:4, but WINDOW:KEPT'),
    (dict(copying=(8,)), '--copying=8, but it must be at least 32'),
  ):
    with pytest.raises(ValueError, match=f'^{message}'):
      options(**given)


def test_streaming_refuses_a_model_that_has_a_window_or_no_softmax():
  streamed = loaded().streaming(8, 2)
  assert streamed.cfg.attn.window == 8 and not streamed.cfg.mask_documents
  assert len(streamed.changes) == 1
  assert not loaded().streaming(8, 0).changes
  for knobs, message in (
    (dict(attn__window=4), r'attn\.window=4'),
    (dict(attn__normalizer='sigmoid'), "normalizer='sigmoid'"),
  ):
    with pytest.raises(ValueError, match=message):
      loaded(**knobs).streaming(8, 2)
