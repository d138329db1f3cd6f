"""Tasks of lm-eval on our models, beside lm-eval's own model of transformers.

They need the packages lm-eval, transformers, torch and accelerate.
"""

import dataclasses
import json
import shutil

import pytest
import small
from faults import process

import gated
from gated import hf, storage
from gated.data import tokenizer
from gated.evals import harness
from gated.evals.harness import documents, scoring
from gated.evals.harness.cache import Answers
from gated.plan import tasks

pytestmark = pytest.mark.full
for package in ('lm_eval', 'transformers', 'torch', 'accelerate'):
  pytest.importorskip(package, reason=f'needs the package {package}')

LENGTH = 160  # Tokens that the models read: many texts are longer.
# Shaped like MMLU, HellaSwag, LAMBADA, a perplexity, and twice GSM8K.
NAMES = ['stdlib_names', 'stdlib_endings', 'stdlib_cloze', 'stdlib_prose']
NAMES += ['stdlib_words', 'copied']
LIMIT = 4
MODELS = {
  'gated': ({'attn__gate__position': 'sdpa'}, 'per_head'),
  'plain': ({}, 'grouped'),
}
LOCAL = """
task: copied
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with two exported models, and a local task; one model knows half of it."""
  place = tmp_path_factory.mktemp('tasks')
  texts = [' '.join(each.words) for each in documents._documents('test')]
  token = tokenizer.train_bpe(texts, 320, str(place / 'tokenizer.json'))
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': token.eos_token}
  settings |= {'pad_token': token.eos_token, 'clean_up_tokenization_spaces': False}
  also = {'max_position_embeddings': LENGTH, 'eos_token_id': token.eos}
  for name, (knobs, packing) in MODELS.items():
    net = small.model_of(vocab=320, width=32, **knobs)
    hf.save(net, place / name, packing=packing, also=also)
    shutil.copy(place / 'tokenizer.json', place / name)
    storage.write_json(place / name / 'tokenizer_config.json', settings)
  questions = [f'{i} times {i + 1} is' for i in range(LIMIT)]
  options = dict(temperature=0, max_tokens=8, stop=['e'])
  answers = gated.load(place / 'gated').generate(questions, **options)
  answers = [answer if i % 2 else 'no' for i, answer in enumerate(answers)]
  lines = [dict(question=q, answer=a) for q, a in zip(questions, answers)]
  file = place / 'local/items.jsonl'
  storage.write(file, '\n'.join(map(json.dumps, lines)).encode())
  (place / 'local/copied.yaml').write_text(LOCAL.format(file=file))
  return place


@pytest.fixture(scope='module')
def catalog(place):
  catalog = harness.part('catalog').Catalog([str(place / 'local')])
  catalog.read(NAMES)
  return catalog


def evaluate(catalog, lm, **options):
  """-> lm-eval's report, with the answer of each request."""
  from lm_eval import evaluator

  catalog._loaded = None  # Tasks keep the answers.
  return evaluator.simple_evaluate(
    model=lm, tasks=NAMES, task_manager=catalog, limit=LIMIT, bootstrap_iters=0, **options
  )


@pytest.fixture(scope='module')
def theirs(place, catalog):
  """Reports of lm-eval's own model, by name."""
  args = dict(dtype='float32')
  return {
    name: evaluate(
      catalog,
      'hf',
      model_args=args | {'pretrained': str(place / name)},
      device='cpu',
      batch_size=4,
    )
    for name in MODELS
  }


def check(ours, theirs):
  """All answers and metrics of two reports are the same."""
  for task in NAMES:
    for a, b in zip(ours['samples'][task], theirs['samples'][task], strict=True):
      assert a['arguments'] == b['arguments']
      pairs = [(x[0], y[0]) for x, y in zip(a['resps'], b['resps'], strict=True)]
      for x, y in pairs:
        if isinstance(y, tuple):
          assert x[0] == pytest.approx(y[0], rel=1e-6, abs=1e-4) and x[1] == y[1]
        elif isinstance(y, str):
          assert x == y
        else:
          assert x == pytest.approx(y, rel=1e-6, abs=1e-4)
    for metric, value in theirs['results'][task].items():
      if isinstance(value, float):
        same = metric.startswith(('acc', 'exact_match'))
        want = value if same else pytest.approx(value, rel=1e-4)
        assert ours['results'][task][metric] == want, (task, metric)


@pytest.mark.parametrize('name', MODELS)
def test_scores_are_those_of_lm_evals_own_model(name, place, catalog, theirs):
  """On 8 devices, in batches of 1 and of 16 rows a device."""
  if name == 'gated':
    assert theirs[name]['results']['copied']['exact_match,none'] == 0.5
  subject = tasks.subject_of(gated.load(place / name), 0)
  assert subject.length == LENGTH
  for size in (1, 16):
    lm = harness.part('adapter').Gated(subject, Answers(None), size=size)
    check(evaluate(catalog, lm), theirs[name])


def answers(cache):
  """The finished requests below a cache folder, by key."""
  found = {}
  for file in cache.rglob('*.jsonl'):
    found |= dict(map(json.loads, file.read_text().splitlines()))
  return found


def test_the_command_on_one_device_and_in_two_processes(place, theirs, spawn_python):
  portpicker = pytest.importorskip('portpicker')
  flags = [f'--workdir={place}/gated', f'--tasks={",".join(NAMES)}', f'--limit={LIMIT}']
  flags += [f'--task_path={place}/local', '--batch=2']
  at = f'--coordinator=localhost:{portpicker.pick_unused_port()}'
  runs = {'one': [spawn_python(['eval.py', *flags, f'--cache={place}/one'])]}
  runs['two'] = [
    spawn_python(
      ['eval.py', *flags, f'--cache={place}/two', at, '--processes=2', f'--process={i}'],
      devices=2,
    )
    for i in range(2)
  ]
  known = {}
  for label, children in runs.items():
    done = process.outputs(children, timeout=900)
    assert ['|stdlib_names' in out for out, _ in done] == [True, False][: len(done)]
    [report] = (place / label).rglob('imported-*.json')
    results = json.loads(report.read_text())['results']
    for task in NAMES:
      for metric, value in theirs['gated']['results'][task].items():
        if metric.startswith(('acc,', 'acc_norm,', 'exact_match,')):
          assert results[task][metric] == value
    known[label] = answers(place / label)
  assert known['one'].keys() == known['two'].keys() and len(known['one']) > 50
  for key, one in known['one'].items():
    two = known['two'][key]
    if isinstance(one, str):
      assert one == two
    else:
      assert one[0] == pytest.approx(two[0], abs=1e-4) and one[1] == two[1]


def test_a_killed_evaluation_goes_on_where_it_was(place, catalog, theirs, monkeypatch):
  subject = tasks.subject_of(gated.load(place / 'plain'), 0)
  folder = storage.path(place / 'killed')
  score, counts = scoring.score, []

  def killed(requests, *args, **options):
    counts.append(len(requests))
    for i, part in enumerate(score(requests, *args, **options)):
      if i == 1 and len(counts) == 1:
        raise KeyboardInterrupt
      yield part

  monkeypatch.setattr(scoring, 'score', killed)
  Gated = harness.part('adapter').Gated
  with pytest.raises(KeyboardInterrupt):
    evaluate(catalog, Gated(subject, Answers(folder), size=1))
  kept = len(Answers(folder))
  report = evaluate(catalog, Gated(subject, Answers(folder), size=1))
  assert 0 < kept < counts[0] and counts[1] == counts[0] - kept
  check(report, theirs['plain'])
  evaluate(catalog, Gated(subject, Answers(folder), size=1))
  assert len(counts) == 3  # Likelihoods twice, then the windows; the last time nothing.


def test_texts_begin_once_with_the_beginning_of_text(place):
  subject = tasks.subject_of(gated.load(place / 'plain'), 0)
  lm = harness.part('adapter').Gated(subject, Answers(None), size=1)
  plain = lm.tok_encode('def')
  assert lm.prefix_token_id == lm.eot_token_id == subject.tokenizer.eos
  token = dataclasses.replace(subject.tokenizer, bos=7, bos_token='<s>')
  lm._subject = dataclasses.replace(subject, tokenizer=token, prefix=(7,))
  assert lm.prefix_token_id == 7
  assert lm.tok_encode('def') == lm.tok_encode('<s>def') == [7, *plain]
  assert lm.tok_encode('def', add_special_tokens=False) == plain


def test_options_of_a_generation_are_lm_evals_or_refused(place):
  subject = tasks.subject_of(gated.load(place / 'plain'), 0)
  lm = harness.part('adapter').Gated(subject, Answers(None), size=1)
  ids, options = lm._generation('a b' * 200, {'until': 'x', 'max_gen_toks': 20})
  assert len(ids) == LENGTH - 20 and options.greedy and options.max_tokens == 20
  assert options.stop == ('x', '<|endoftext|>')
  kwargs = {'do_sample': True, 'temperature': 0.5, 'top_k': 3, 'max_tokens': 9}
  _, options = lm._generation('a', kwargs)
  assert (options.temperature, options.top_k, options.max_tokens) == (0.5, 3, 9)
  for kwargs, message in (
    ({}, f'max_gen_toks=256 of a task, but the model reads {LENGTH} tokens'),
    ({'num_beams': 2, 'max_gen_toks': 9}, 'num_beams is not supported'),
  ):
    with pytest.raises(ValueError, match=message):
      lm._generation('a', kwargs)


def test_an_unknown_task_lists_near_ones(catalog):
  with pytest.raises(ValueError, match=r'--tasks=helaswag: no such .*; near: hellaswag'):
    catalog.check(['stdlib', 'helaswag'])
  with pytest.raises(ValueError, match='--task_path=nowhere: no such folder'):
    harness.part('catalog').Catalog(['nowhere'])


def test_data_sets_of_a_hub_are_listed_and_local_ones_are_not(catalog):
  assert catalog.downloads(NAMES) == {}
  assert catalog.downloads(['hellaswag']) == {'Rowan/hellaswag': ['hellaswag']}
  [(path, subjects)] = catalog.downloads(['mmlu']).items()
  assert path == 'cais/mmlu' and len(subjects) == 57
  assert len([*catalog.leaves(['stdlib'])]) == 5


def test_a_task_without_its_data_is_refused_by_the_data_sets_name(
  place, tmp_path, run_python
):
  text = LOCAL.format(file=tmp_path / 'lost.jsonl').replace('task: copied', 'task: lost')
  (tmp_path / 'lost.yaml').write_text(text)
  flags = [f'--workdir={place}/plain', '--tasks=stdlib_names,lost']
  done = run_python(['eval.py', *flags, f'--task_path={tmp_path}'])
  assert done.returncode == 2 and not done.stdout and 'Traceback' not in done.stderr
  assert '--tasks=lost: its data set json cannot be had' in done.stderr
