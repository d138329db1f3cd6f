"""RULER on models: losses and ranks, answers, the report, finished requests, flags."""

import functools
import json
import types
from typing import Any

import numpy as np
import pytest
import small
from absl import flags
from faults import process

import gated
from gated import hf
from gated.data import tokenizer
from gated.evals import generate, ruler
from gated.evals.harness import scoring
from gated.evals.ruler import options, scores
from gated.evals.ruler.texts import local
from gated.plan import drawing
from gated.plan import ruler as running
from gated.plan.drawing import FORMATS
from gated.run import exit_codes
from scripts import ruler_text

LENGTH = 1280  # Tokens that the model is prepared for.
SHOWN = (('loss', '.3f'), ('rank', '.1f'))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A Hugging Face folder of a small model, gated, with a vocabulary of words."""
  place = tmp_path_factory.mktemp('ruler') / 'small'
  net = small.model_of(vocab=512, depth=1, attn__gate__position='sdpa')
  also = {'max_position_embeddings': LENGTH}
  hf.save(net, place, packing='per_head', also=also)
  tokenizer.train_bpe(local().essay[:5000], 512, f'{place}/tokenizer.json')
  return place


def run(place, capsys, yarn='', **values):
  """-> the printed table, by line, and the report."""
  given: dict[str, Any] = dict(ruler=(LENGTH,), limit=2) | values
  loaded = gated.load(place, cache=str(place.parent / 'cache'))
  running.run(loaded.stretched(yarn), options.Options(**given))
  *table, report = capsys.readouterr().out.splitlines()
  return table, json.loads(report)


@pytest.mark.full
def test_losses_and_answers_are_those_of_each_item_alone(place, capsys, monkeypatch):
  """In a batch on 8 devices; a repeated evaluation measures nothing."""
  loaded = gated.load(place)
  maker = ruler.Maker(tokenizer=loaded.tokenizer, prefix=(), texts=local(), seed=42)
  items = [*maker.items('qa_1', LENGTH, 2)]
  want = []
  for item in items:
    logit_TV = loaded.logits([*item.context, *item.reference[:-1]]).astype(float)
    logit_TV = logit_TV[len(item.context) - 1 :]
    index = range(len(item.reference)), item.reference
    nats_T = logit_TV[index] - np.log(np.exp(logit_TV).sum(-1))
    rank_T = (logit_TV > logit_TV[index][:, None]).sum(-1) + 1
    want.append((-nats_T.mean(), rank_T.mean()))
  most = max(item.new for item in items)
  new = loaded.generate([i.prompt for i in items], max_tokens=most, temperature=0)
  texts, score = [], ruler.score
  monkeypatch.setattr(ruler, 'score', lambda text, *_, **__: texts.append(text) or 50.0)
  table, report = run(place, capsys, tasks=('qa_1',))
  end = loaded.tokenizer.eos
  whole = [[*ids.tolist(), end][: [*ids.tolist(), end].index(end)] for ids in new]
  decode = loaded.tokenizer.decode
  assert texts == [decode(ids).decode(errors='replace') for ids in whole]
  qa = report['lengths'][str(LENGTH)]['qa_1']
  assert qa['loss'] == pytest.approx(np.mean([loss for loss, _ in want]), abs=1e-4)
  assert qa['rank'] == pytest.approx(np.mean([rank for _, rank in want]), abs=1e-4)
  assert qa['score'] == 50 and qa['items'] == 2
  cells = ['qa_1', 'small', '50.0', f'{qa["loss"]:.3f}', f'{qa["rank"]:.1f}']
  assert [line.split() for line in table[2:]] == [cells, ['mean', *cells[1:]]]
  monkeypatch.setattr(generate, 'run', None)
  monkeypatch.setattr(scoring, 'arrays', None)
  assert run(place, capsys, tasks=('qa_1',)) == (table, report)
  assert texts[:2] == texts[2:] and score('ab', ['B'], any_of=False) == 100
  [stored] = (place.parent / 'cache').rglob('imported-ruler-1280-qa_1-limit2.json')
  assert json.loads(stored.read_text()) == report


@pytest.mark.full
def test_yarn_is_measured_beside_the_model_before_it(place, capsys):
  lengths = (LENGTH, 2 * LENGTH)
  given: dict[str, Any] = dict(
    ruler=lengths, tasks=('niah_single_1',), limit=1, loss_only=True
  )
  with pytest.raises(ValueError, match=r'--ruler=2560, .* prepared'):
    run(place, capsys, **given)
  table, report = run(place, capsys, yarn='2', **given)
  before = report['lengths']
  [(label, after)] = report['beside'].items()
  assert label == 'small yarn=2' and report['yarn'] == '2'
  assert before['2560'] is None and after['lengths']['2560']['mean']['loss'] > 0
  losses = [each['1280']['mean']['loss'] for each in (before, after['lengths'])]
  assert losses[0] != losses[1] and before['1280']['mean']['score'] is None
  assert table[2].split() == [
    'niah_single_1',
    'small',
    *(format(before['1280']['mean'][name], form) for name, form in SHOWN),
    *'--',
  ]
  assert table[0].split() == ['1280', '2560'] and 'score' not in table[1]


@pytest.mark.full
def test_two_processes_measure_as_one_does(place, spawn_python, tmp_path):
  """Losses, ranks and generated answers; each process has two devices."""
  flags = ['eval.py', f'--workdir={place}', f'--ruler={LENGTH}', '--tasks=qa_1,vt']
  flags += ['--limit=3', '--batch=1']
  at = [f'--coordinator=127.0.0.1:{process.free_port()}', '--processes=2']
  pair = [[*at, f'--process={i}'] for i in range(2)]
  reports = []
  for number, extra in enumerate(([[]], pair)):
    cache = f'--cache={tmp_path}/{number}'
    children = [spawn_python([*flags, cache, *own], devices=2) for own in extra]
    (out, _), *others = process.outputs(children, timeout=600)
    assert all('qa_1' not in other for other, _ in others)
    reports.append(json.loads(out.splitlines()[-1])['lengths'][str(LENGTH)])
  one, two = reports
  assert one.keys() == two.keys() == {'qa_1', 'vt', 'mean'}
  for task, numbers in one.items():
    assert two[task]['score'] == numbers['score']
    for name in ('loss', 'rank'):
      assert two[task][name] == pytest.approx(numbers[name], rel=1e-4)


@pytest.mark.full
def test_the_table_is_drawn_into_a_workdir(place, capsys, monkeypatch):
  pytest.importorskip('matplotlib')
  given: dict[str, Any] = dict(limit=1, tasks=('niah_single_1',), figures=True)
  with pytest.raises(ValueError, match='figures are drawn into a workdir, but'):
    run(place, capsys, **given)
  monkeypatch.setattr(drawing, 'check', lambda loaded: None)  # As if it were one.
  run(place, capsys, **given)
  stem = f'imported-ruler-{LENGTH}-niah_single_1-limit1-by-length-'
  files = {f'{stem}{shown}.{kind}' for shown in ('loss', 'score') for kind in FORMATS}
  assert {path.name for path in (place / 'evals').iterdir()} == files


def test_a_table_has_dashes_for_a_model_that_is_prepared_for_no_length():
  """Such as the first one, with --yarn and a length beyond RoPE only."""
  summary = {'score': None, 'loss': 2.0, 'rank': 3.0}
  reports = {
    'm': {'lengths': {'512': None}},
    'm yarn=4': {'lengths': {'512': {'vt': summary}}},
  }
  lines = [line.split() for line in ruler.table(reports, loss_only=True).splitlines()]
  assert lines[2:] == [['vt', 'm', '-', '-'], ['vt', 'm', 'yarn=4', '2.000', '3.0']]


def test_a_length_beyond_rope_needs_yarn_or_its_word_that_rope_stays(place):
  loaded = gated.load(place)
  lengths = LENGTH, LENGTH + 1, 2 * LENGTH, 2 * LENGTH + 1
  allowed = lambda run: [running._is_prepared(run, length) for length in lengths]
  assert allowed(loaded) == [True, False, False, False]
  assert allowed(loaded.stretched('2')) == [True, True, True, False]
  assert allowed(loaded.stretched('1')) == [True] * 4


def test_scores_are_those_of_ruler():
  """string_match_all and string_match_part of scripts/eval/synthetic/constants.py."""
  answers = ('Abc', 'def', 'x1', '7')
  assert scores.score('ABC, 7 and DE', answers, any_of=False) == 50
  assert scores.score('ABC, 7 and DE', answers, any_of=True) == 100
  assert scores.score('nothing', answers, any_of=True) == 0


def test_a_summary_has_means_errors_and_bins_of_depth():
  values = [(0, 1.0, 3, 0.1), (100, 3.0, 5, 0.15), (100, 5.0, 10, 0.99)]
  results = [dict(score=s, loss=l, rank=r, depth=d, tokens=10) for s, l, r, d in values]
  summary = ruler.summarize(results)
  assert [summary[k] for k in ('items', 'loss', 'rank')] == [3, 3, 6]
  assert summary['loss_stderr'] == pytest.approx(2 / 3**0.5)
  first, *_, last = summary['by_depth']
  assert (first['items'], first['loss'], first['score']) == (2, 2, 50)
  assert (last['depth'], last['items'], last['rank']) == ([0.8, 1.0], 1, 10)
  assert summary['by_depth'][2]['loss'] is None
  other = dict(score=None, loss=1, rank=1, depth=None, tokens=10)
  summary = ruler.summarize([other])
  assert summary['by_depth'] is summary['score'] is summary['loss_stderr'] is None
  assert ruler.means([{'score': 0, 'loss': 1, 'rank': 2}, summary]) == {
    'score': None,
    'loss': 1,
    'rank': 1.5,
  }


@pytest.fixture
def read_flags():
  """A command line -> its options, with flags of its own."""
  values = flags.FlagValues()
  own = {
    kind: functools.partial(getattr(flags, kind), flag_values=values)
    for kind in ('DEFINE_list', 'DEFINE_boolean', 'DEFINE_integer')
  }
  for name in ('batch', 'limit', 'rows'):
    own['DEFINE_integer'](name, 8, '')
  for name in ('tasks', 'beside'):
    own['DEFINE_list'](name, [], '')
  own['DEFINE_boolean']('figures', False, '')
  define = types.SimpleNamespace(FLAGS=values, **own)
  options_of = ruler.define(define, excludes=['rows', 'beside'])

  def read(*line):
    values(['eval.py', *line])
    return options_of()

  return read


def test_flags_become_options(read_flags):
  line = ['--ruler=1024,2048', '--tasks=vt,cwe', '--limit=3', '--beside=a,b']
  assert read_flags(*line, '--loss_only', '--figures', '--batch=2') == options.Options(
    ruler=(1024, 2048),
    tasks=('vt', 'cwe'),
    limit=3,
    batch=2,
    beside=('a', 'b'),
    loss_only=True,
    figures=True,
  )


def test_all_tasks_and_a_hundred_items_are_the_default(read_flags):
  found = read_flags('--ruler=4096')
  assert found.tasks == tuple(ruler.TASKS) and found.limit == 100 and not found.beside


def test_without_ruler_there_are_no_options(read_flags):
  assert read_flags('--rows=3', '--tasks=hellaswag') is None


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (['--loss_only'], '--loss_only is not allowed without --ruler'),
    (['--ruler=1024', '--rows=3'], '--rows=3 is not allowed with --ruler'),
    (['--ruler=4k'], '--ruler=4k, but numbers are expected'),
    (['--ruler='], '--ruler= is empty'),
    (['--ruler=0'], '--ruler=0, but it must be at least 1'),
    (['--ruler=1024,1024'], '--ruler=1024,1024 is empty, or repeats'),
    (['--ruler=1024', '--limit=0'], '--limit=0, but it must be at least 1'),
    (
      ['--ruler=1024', '--tasks=niah_single_4'],
      'no such task; did you mean niah_single_',
    ),
    (['--ruler=1024', '--tasks=hellaswag'], 'no such task; known are niah_single_1'),
  ],
)
def test_flags_that_do_not_fit_are_refused_by_name(line, message, read_flags):
  with pytest.raises(ValueError, match=message):
    read_flags(*line)


def test_items_become_documents_that_end_with_their_answers(tmp_path, capsys):
  out = tmp_path / 'items.jsonl'
  flags = [f'--out={out}', '--tasks=niah_single_1,fwe', '--lengths=800,900', '--items=2']
  assert ruler_text.main(flags) == exit_codes.FINISHED
  texts = [json.loads(line)['text'] for line in out.read_text().splitlines()]
  assert len({*texts}) == len(texts) == 8 and '8 documents' in capsys.readouterr().out
  for text in texts[:4]:
    number = text.rpartition(' ')[2]
    assert number.isdigit() and f'is: {number}.' in text
  copies = [f'--out={out}', '--copies=50']
  assert ruler_text.main(copies) == exit_codes.FINISHED
  texts = [json.loads(line)['text'] for line in out.read_text().splitlines()]
  counts = set()
  for text in texts:
    first, second = text.split('\n')
    assert first == second and all(len(number) == 7 for number in first.split())
    counts.add(len(first.split()))
  assert len({*texts}) == 50 and counts == {1, 2, 3, 4, 5, 6}
  with pytest.raises(SystemExit):
    ruler_text.main([f'--out={out}', '--tasks=vt'])
  assert ruler_text.main([*flags, '--tasks=qa_3']) == exit_codes.REFUSED
  assert 'qa_3: RULER has no such task' in capsys.readouterr().err
