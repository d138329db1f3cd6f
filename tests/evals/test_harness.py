"""Tasks of lm-eval: what needs no lm-eval. Its own model agrees: test_tasks.py."""

import functools
import json
import math
import sys
import types

import jax
import numpy as np
import pytest
import small
from absl import flags

from gated import storage
from gated.evals import harness
from gated.evals.harness import cache, documents, options, scoring, sharing
from gated.evals.harness.scoring import Answer, Request
from gated.plan import load

ANSWERS = [Answer(-1.5, True), Answer(-math.inf, False)]


LOGITS = jax.jit(lambda net, token_BT: net(token_BT))


def definition(net, each):
  """A request's answer from the logits of its text alone."""
  tokens = [*each.context, *each.continuation[:-1]]
  logit_TV = LOGITS(net, np.pad([tokens], ((0, 0), (0, 64 - len(tokens)))))[0]
  logit_TV = np.asarray(logit_TV)[len(each.context) - 1 : len(tokens)].astype(float)
  nats_TV = logit_TV - np.log(np.exp(logit_TV).sum(-1, keepdims=True))
  picked = nats_TV[range(len(each.continuation)), each.continuation]
  best = logit_TV.argmax(-1).tolist() == [*each.continuation]
  return picked.sum(), best


def requests():
  """Requests of many lengths; some share an input, one is greedy decoding's."""
  rng = np.random.default_rng(0)
  draw = lambda n: tuple(rng.integers(0, 40, n).tolist())
  several = [Request(draw(n), draw(m)) for n, m in [(1, 1), (3, 9), (20, 2), (33, 17)]]
  context = draw(12)
  return several + [Request(context, (letter,)) for letter in (3, 5, 7, 9)]


def scored(asked, net, on, **flags):
  """-> the answers, and the shapes of the batches that were measured."""
  shapes = []
  compiled = jax.jit(scoring.measure)

  def measured(net, *batch):
    shapes.append((*batch[0].shape, batch[1].shape[1]))
    with jax.set_mesh(on):
      return compiled(net, *batch)

  answers = {}
  for part in scoring.score(asked, measured, net, on=on, **flags):
    answers |= part
  return answers, shapes


@pytest.mark.slow
def test_answers_are_those_of_each_text_alone_for_any_batch_and_devices():
  knobs = dict(attn__gate__position='sdpa', moe__experts=4, moe__top_k=2)
  net, asked = small.model_of(**knobs), requests()
  greedy = asked[2].context
  padded = np.pad([greedy], ((0, 0), (0, 64 - len(greedy))))
  asked.append(Request(greedy, (int(LOGITS(net, padded)[0, len(greedy) - 1].argmax()),)))
  want = {each: definition(net, each) for each in asked}
  assert want[asked[-1]][1] and not all(best for _, best in want.values())
  for on, size in (
    (small.mesh_of(), 16),
    (small.mesh_of(data=2, fsdp=4), 1),
  ):
    answers, _ = scored(asked, net, on, size=size)
    assert answers.keys() == want.keys()
    for each, (nats, best) in want.items():
      assert answers[each].nats == pytest.approx(nats, abs=1e-4)
      assert answers[each].greedy == best


def choices():
  """Three questions with two to ten choices, and requests that share nothing."""
  rng = np.random.default_rng(1)
  draw = lambda n: tuple(rng.integers(0, 40, n).tolist())
  asked = requests()
  for length, count in ((33, 4), (40, 2), (47, 10)):
    context = draw(length)
    asked += [Request(context, draw(1 + i)) for i in range(count)]
  return asked


@pytest.mark.slow
@pytest.mark.parametrize(
  'knobs',
  [{}, pytest.param({'moe__experts': 4, 'moe__top_k': 2}, marks=pytest.mark.full)],
  ids=str,
)
def test_choices_that_share_their_context_have_the_answers_of_each_text_alone(knobs):
  net, asked = small.model_of(attn__gate__position='sdpa', **knobs), choices()
  want = {each: definition(net, each) for each in asked}
  for on, size in (
    (small.mesh_of(), 0),
    (small.mesh_of(data=2, fsdp=4), 4),
    (small.mesh_of(data=2, context=4), 4),
  ):
    calls = []
    measured = recording(on, calls)
    shared = functools.partial(sharing.works, measured=measured, on=on, size=size)
    answers, whole = scored(asked, net, on, size=size, shared=shared)
    assert answers.keys() == want.keys()
    for each, (nats, best) in want.items():
      assert answers[each].nats == pytest.approx(nats, abs=1e-4)
      assert answers[each].greedy == best
    if on.shape['context'] > 1:
      assert not calls
    else:
      assert sum(C * N for C, N, _ in calls) >= 16 and len(whole) < 6


def recording(on, calls):
  """`sharing.measure`, compiled; it adds each batch's (C, N, T) to `calls`."""
  compiled = jax.jit(sharing.measure)

  def measured(net, *batch):
    calls.append(tuple(batch[2].shape))
    with jax.set_mesh(on):
      return compiled(net, *batch)

  return measured


def test_a_context_is_shared_by_rows_that_differ_only_after_it():
  found, alone = sharing.families(scoring.rows(choices()))
  sizes = [(len(each.context), len(each.rows)) for each in found]
  assert [*sizes[:2], *sorted(sizes[2:])] == [(46, 8), (32, 4), (39, 2), (46, 2)]
  assert len(alone) == 5
  for each in found:
    for row in each.rows:
      assert row.tokens[: len(each.context)] == each.context
      assert min(at for at, _ in row.asks) == len(each.context)
  context, start, token, position, target = sharing.arrays(found[1:2], ways=2, full=3)
  assert context.shape == (2, 32) and token.shape == (2, 4, 16)
  assert position.shape == target.shape == (2, 4, 4) and start.ravel().tolist() == [32, 0]
  assert [*filter(None, sharing.slots(found[1:2]))] == found[1].rows


def test_one_token_continuations_of_a_context_share_a_row():
  rows = scoring.rows(requests())
  shared = [row for row in rows if len(row.members) > 1]
  assert len(rows) == 5 and [len(row.asks) for row in shared] == [4]
  assert [asks for _, asks in shared[0].members] == [[0], [1], [2], [3]]
  assert [len(row.tokens) for row in rows] == [49, 21, 12, 11, 1]


def test_continuations_that_differ_in_the_last_token_or_the_cut_share_a_row():
  asked = [Request((1, 2), (3, 4)), Request((1, 2), (3, 5)), Request((1, 2, 3), (4,))]
  [row] = scoring.rows([*asked, asked[0]])
  assert [*row.asks] == [(1, 3), (2, 4), (2, 5)]
  assert [asks for _, asks in row.members] == [[0, 1], [0, 2], [1]]


def test_a_text_too_long_loses_its_start_as_in_lm_eval():
  """lm-eval reads the last length + 1 tokens of context and continuation, less one."""
  assert scoring.request([1, 2], [3], 8) == ((1, 2), (3,))
  assert scoring.request([1, 2, 3, 4], [5, 6], 4) == ((2, 3, 4), (5, 6))
  assert scoring.request([1, 2], [3, 4, 5, 6], 4) == ((2,), (3, 4, 5, 6))
  for bad in ([], [1] * 5):
    with pytest.raises(ValueError, match=f'has {len(bad)} tokens, but 1 to 4'):
      scoring.request([1], bad, 4)


def test_batches_hold_rows_of_few_lengths_and_are_padded():
  lengths = {scoring.padded_length(n) for n in range(1, 1025)}
  assert lengths == {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256} | {
    *range(320, 513, 64),
    *range(640, 1025, 128),
  }
  assert all(scoring.padded_length(n) >= n for n in range(1, 1025))
  asks = [scoring.padded_asks(n, 64) for n in (1, 4, 5, 16, 17, 64, 65)]
  assert asks == [4, 4, 16, 16, 64, 64, 256]
  assert [scoring.padded_asks(1, n) for n in (65, 512, 1024)] == [4, 64, 64]
  sizes = [scoring.padded_rows(n, 24) for n in (1, 2, 3, 6, 7, 24)]
  assert sizes == [1, 2, 6, 6, 24, 24] and scoring.padded_rows(1, 1) == 1
  rows = scoring.rows([Request((i,) * 20, (1,)) for i in range(5)])
  token_BT, position_BS, target_BS = scoring.arrays(rows, ways=2, full=4)
  assert token_BT.shape == (8, 32) and position_BS.shape == target_BS.shape == (8, 4)
  assert (token_BT[4, :20] == 4).all() and not token_BT[4, 20:].any()
  assert position_BS[:5, 0].tolist() == [19] * 5
  sizes = [(len(batch), n) for batch, n in scoring.batches(rows, size=1, ways=2)]
  assert sizes == [(2, 1), (2, 1), (1, 1)]
  batch, full = next(scoring.batches(rows * 400, size=0, ways=2))
  assert len(batch) == 2 * full == 2 * (1 << 14) // 32


def test_few_programs_are_compiled_for_many_lengths():
  """500 questions of 150 to 350 tokens with four answers each, and 40 texts."""
  rng = np.random.default_rng(0)
  draw = lambda low, high: tuple(rng.integers(0, 99, rng.integers(low, high)).tolist())
  asked = [
    Request(context, draw(2, 50))
    for context in (draw(150, 350) for _ in range(500))
    for _ in range(4)
  ]
  found, alone = sharing.families(scoring.rows(asked))
  shapes, slots, rows = set(), 0, 0
  for batch, full in sharing.batches(found, size=0, ways=1):
    context, _, token, position, _ = sharing.arrays(batch, ways=1, full=full)
    shapes.add((context.shape, token.shape, position.shape))
    slots += context.size + token.size
    rows += len(sharing.slots(batch))
  assert not alone and rows == 2000 and len(shapes) <= 6
  texts = scoring.rows([Request(draw(900, 1000), draw(4, 20)) for _ in range(40)])
  whole = [
    tuple(array.shape for array in scoring.arrays(batch, ways=1, full=full))
    for batch, full in scoring.batches(texts, size=0, ways=1)
  ]
  assert len({*whole}) == 1
  alone = sum(len(each.context) + len(each.continuation) for each in asked)
  assert slots < alone / 1.5


def test_an_interrupted_session_leaves_its_answers_to_the_next(tmp_path):
  folder = storage.path(tmp_path / 'requests')
  first = cache.Answers(folder)
  first.add({'a': [*ANSWERS[0]]})
  first.add({'b': [*ANSWERS[1]], 'c': 'text\n'})
  [file] = (tmp_path / 'requests').iterdir()
  file.write_bytes(file.read_bytes() + b'["d", [-2.')  # Killed while it wrote.
  second = cache.Answers(folder)
  assert len(second) == 3 and 'd' not in second
  assert Answer(*second['a']) == ANSWERS[0] and Answer(*second['b']) == ANSWERS[1]
  second.add({'d': 'again'})
  third = cache.Answers(folder)
  assert third['d'] == 'again' and third['c'] == 'text\n'
  assert len([*(tmp_path / 'requests').iterdir()]) == 2


def test_answers_go_to_a_store_in_parts(monkeypatch):
  written = {}
  monkeypatch.setattr(storage, 'is_remote', lambda path: True)
  monkeypatch.setattr(storage, 'names', lambda folder: sorted(written))
  write = lambda path, content: written.update({path.name: content})
  monkeypatch.setattr(storage, 'write', write)
  answers = cache.Answers(storage.path('store'))
  answers.add({'a': 1})
  assert not written and answers['a'] == 1
  answers.flush()
  answers.add({'b': 2})
  answers.flush()
  assert [*written] == ['000000.jsonl', '000001.jsonl']
  assert json.loads(written['000001.jsonl']) == ['b', 2]


def test_a_full_disk_is_a_warning_and_the_evaluation_goes_on(tmp_path, caplog):
  (tmp_path / 'requests').write_text('a file where the folder should be')
  answers = cache.Answers(storage.path(tmp_path / 'requests'))
  answers.add({'a': 1})
  answers.add({'b': 2})
  assert answers['b'] == 2 and caplog.text.count('no longer stored') == 1


def test_keys_differ_by_kind_ids_options_and_cut():
  keys = [
    cache.key('likelihood', (1, 2), (3,)),
    cache.key('likelihood', (1,), (2, 3)),
    cache.key('generation', (1, 2), (3,)),
    cache.key('generation', (1, 2), '{}'),
  ]
  assert len({*keys}) == 4
  assert cache.key('likelihood', np.array([1, 2]), [3]) == keys[0]


def test_local_tasks_have_balanced_answers_and_one_right_choice():
  for kind in ('names', 'endings'):
    items = documents.KINDS[kind]('test')
    assert len(items) >= 100
    counts = np.bincount([item['answer'] for item in items])
    if kind == 'names':
      assert counts.max() - counts.min() <= 1
    assert counts.max() < 0.35 * len(items)
    assert all(len({*item['choices']}) == 4 for item in items)
  for item in documents.words('test'):
    assert item['word'] in item['text'].split()
  assert documents.endings('test') == documents.endings('test')


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (dict(limit=-1), 'limit=-1, but it must be at least 0'),
    (dict(fewshot=-2), 'fewshot=-2, but it must be at least -1'),
    (dict(tasks=('a', 'a')), 'tasks=a,a has a task twice'),
  ],
)
def test_options_out_of_range_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    options.Options(**dict(tasks=('a',)) | values)


@pytest.fixture
def read():
  """A command line -> its options, with flags of its own."""
  values = flags.FlagValues()
  kinds = ('DEFINE_list', 'DEFINE_integer')
  own = {
    kind: functools.partial(getattr(flags, kind), flag_values=values) for kind in kinds
  }
  for name in ('batch', 'length', 'rows'):
    own['DEFINE_integer'](name, 8, '')
  define = types.SimpleNamespace(FLAGS=values, **own)
  options_of = harness.define(define, excludes=['rows'])

  def read(*line):
    values(['eval.py', *line])
    return options_of()

  return read


def test_flags_become_options(read):
  line = ['--tasks=b,a', '--limit=3', '--fewshot=0', '--task_path=x,y', '--batch=2']
  assert read(*line) == harness.Options(
    tasks=('b', 'a'), limit=3, fewshot=0, task_path=('x', 'y'), batch=2
  )


def test_without_tasks_there_are_no_options(read):
  assert read('--rows=3', '--batch=2') is None


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (['--limit=3'], '--limit=3 is not allowed without --tasks'),
    (['--tasks=a', '--rows=3'], '--rows=3 is not allowed with --tasks'),
    (['--tasks=a', '--limit=-3'], '--limit=-3, but it must be at least 0'),
    (['--tasks='], '--tasks= has an empty name'),
    (['--tasks=a,,b'], '--tasks=a,,b has an empty name'),
  ],
)
def test_flags_that_do_not_fit_are_refused_by_name(line, message, read):
  with pytest.raises(ValueError, match=message):
    read(*line)


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'lm_eval.api.model', raising=False)
  with pytest.raises(ValueError) as refused:
    harness.part('adapter')
  wanted = '--tasks needs the package lm-eval: pip install -r requirements-tasks.txt'
  assert str(refused.value) == wanted


def test_experts_of_an_evaluation_drop_no_token():
  cfg = small.model_config(moe__experts=4, moe__top_k=2, moe__dispatch='capacity')
  place = storage.path('model')
  run = load.Loaded(place, cfg, step=None, about=None, cache='here').dropless()
  assert run.cfg.moe.dispatch == 'dropless' and run.cfg.moe.experts == 4
  assert (run.path, run.cache) == (place, 'here')
