"""Samples while training: prompts, files, and a run that they do not change."""

import json
import types

import numpy as np
import pytest
import small
from faults import evidence, process

import gated
from gated import data
from gated.data import tokenizer
from gated.evals import generate, samples
from gated.evals.sampling import Sampling
from gated.run import metrics

BYTES = tokenizer.load('bytes')
GREEDY = Sampling(max_tokens=5, temperature=0)


def corpus(**texts):
  """A corpus whose held-out rows are two documents each: 'ab|cdef'."""

  def heldout(domain, *, batch, rows, limit):
    assert (batch, rows) == (1, [0])
    for row in texts[domain][:limit]:
      first, second = row.split('|')
      ids = np.frombuffer(f'{first}{second}--'.encode(), np.uint8).astype(np.int32)
      segments = [1] * len(first) + [2] * len(second) + [0, 0]
      arrays = dict.fromkeys(data.Batch._fields, ids[None])
      yield data.Batch(**arrays | {'segments': np.array(segments)[None]}), None

  return types.SimpleNamespace(tokenizer=BYTES, domains=tuple(texts), heldout=heldout)


def sampler(corpus, texts=(), context=64, **changes):
  cfg = small.model_config(vocab=264, **changes)
  options = dict(cfg=cfg, on=small.mesh_of(), context=context)
  return samples.sampler(corpus, texts, GREEDY, **options)


def prompts(corpus, context=64):
  return [b.tobytes().decode() for b in map(np.uint8, samples._heldout(corpus, context))]


def test_prompts_begin_the_longest_documents_of_rows_from_all_domains():
  two = corpus(code=['ab|cdef', 'ghi|j', 'k|l'], prose=['m|no', 'p|q', 'r|s'])
  assert prompts(two) == ['cdef', 'ghi', 'no', 'p']
  assert prompts(two, 3) == ['cde', 'ghi', 'no', 'p']
  many = corpus(**{f'd{i}': ['a|bc', 'd|ef'] for i in range(6)})
  assert prompts(many) == ['bc'] * 6


@pytest.mark.slow
def test_samples_are_the_continuations_that_generation_gives():
  net = small.model_of(vocab=264)
  ours = sampler(corpus(), ('def f', 'é'))(net)
  theirs = generate.texts(
    ['def f', 'é'],
    GREEDY,
    cfg=net.cfg,
    read_model=lambda: net,
    on=small.mesh_of(),
    read_tokenizer=lambda: BYTES,
    context=64,
  )
  assert [sample['prompt'] for sample in ours] == ['def f', 'é']
  assert [sample['text'] for sample in ours] == theirs and all(theirs)
  from_rows = sampler(corpus(code=['ab|cdef']))(net)
  assert [sample['prompt'] for sample in from_rows] == ['cdef']


def test_samples_without_a_prompt_are_refused_by_their_knob():
  with pytest.raises(ValueError, match=r"config\.log\.sample_prompts: '' has no tokens"):
    sampler(corpus(), ('a', ''))
  with pytest.raises(ValueError, match=r'sample_prompts=\(\), but the data has no held-'):
    sampler(corpus())
  for knob, value in (
    ('samples', -1),
    ('sample_tokens', 0),
    ('sample_temperature', -1.0),
  ):
    with pytest.raises(ValueError, match=rf'config\.log\.{knob}={value}'):
      small.whole(**{f'log__{knob}': value})


def test_prompts_that_exceed_the_rows_are_logged_once_before_the_run(caplog):
  sampler(corpus(), ('x' * 20,), context=24)
  assert 'a prompt of 20 tokens and max_tokens=5 exceed the 24 tokens' in caplog.text


def test_samples_are_files_and_texts_of_tensorboard_and_later_ones_are_dropped(tmp_path):
  options = dict(enabled=True, tensorboard=True, wandb='')
  texts = [{'prompt': 'def', 'text': ' fé\n'}]
  with metrics.Log(tmp_path, step=-1, **options) as log:
    for step in (1, 4, 8):
      log.write_samples(step, texts)
  content = json.loads((tmp_path / 'samples/4.json').read_text())
  assert content == {'step': 4, 'samples': texts}
  [events] = (tmp_path / 'tensorboard').iterdir()
  assert 'def\N{LEFT HALF BLOCK} fé'.encode() in events.read_bytes()
  with metrics.Log(tmp_path, step=4, **options):
    assert {path.name for path in (tmp_path / 'samples').iterdir()} == {
      '1.json',
      '4.json',
    }
  with metrics.Log(tmp_path, step=-1, **options | {'enabled': False}) as log:
    log.write_samples(9, texts)
    assert len([*(tmp_path / 'samples').iterdir()]) == 2


KNOBS = {
  'steps': 4,
  'batch': 8,
  'data.length': 64,
  'model.width': 32,
  'model.ffn': 64,
  'model.depth': 2,
  'model.attn.head_dim': 8,
  'model.numerics.compute': 'float32',
  'eval.every': 4,
  'eval.rows': 8,
  'log.tensorboard': False,
  'log.sample_tokens': 12,
  'log.sample_temperature': 0.0,
}
SPLIT = {f'mesh.{axis}': 2 for axis in ('tensor', 'context')}


def command(workdir, **knobs):
  knobs = KNOBS | {name.replace('__', '.'): value for name, value in knobs.items()}
  flags = [f'--config.{name}={value}' for name, value in knobs.items()]
  return ['train.py', '--config=configs/tiny.py', f'--workdir={workdir}', *flags]


def texts_of(workdir):
  return {
    int(path.stem): json.loads(path.read_text())['samples']
    for path in (workdir / 'samples').glob('*.json')
  }


def together(spawn_python, args):
  """Runs `python ARGS` in two processes of two devices -> the first one's output."""
  args = [*args, '--processes=2', f'--coordinator=127.0.0.1:{process.free_port()}']
  children = [spawn_python([*args, f'--process={i}'], devices=2) for i in range(2)]
  return process.outputs(children, timeout=300)[0][0]


@pytest.mark.full
def test_a_run_with_samples_has_the_losses_of_one_without(
  tmp_path, run_python, spawn_python
):
  """To the last bit, on a mesh; two processes write the same texts, and load them."""
  off, on, two = (tmp_path / name for name in ('off', 'on', 'two'))
  for workdir, knobs in ((off, {}), (on, {'log__samples': 2})):
    done = run_python(command(workdir, **knobs | SPLIT), devices=4)
    assert done.returncode == 0, done.stderr[-4000:]
  assert evidence.losses(on) == evidence.losses(off)
  assert evidence.losses(on, 'heldout') == evidence.losses(off, 'heldout')
  assert evidence.digest(on, 4) == evidence.digest(off, 4)
  assert not (off / 'samples').exists() and [*sorted(texts_of(on))] == [1, 2, 4]
  # The model that was saved gives the same texts.
  last = texts_of(on)[4]
  prompts = [sample['prompt'] for sample in last]
  options = dict(max_tokens=12, temperature=0)
  assert len(prompts) == 4 and all(prompts)
  run = gated.load(on)
  assert run.generate(prompts, **options) == [sample['text'] for sample in last]
  together(spawn_python, command(two, log__samples=2, mesh__context=4))
  assert texts_of(two) == texts_of(on)
  # The same prompts, continued by two processes and by one.
  flags = [f'--prompt={prompt}' for prompt in prompts]
  flags += ['--max_tokens=12', '--temperature=0']
  out = together(spawn_python, ['eval.py', f'--workdir={on}', *flags])
  expected = '\n\n'.join(sample['prompt'] + sample['text'] for sample in last)
  assert expected in out
