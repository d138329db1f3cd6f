"""Multiple choice through our adapter to lm-eval, beside lm-eval's own model `hf`.

  python bench/tasks.py [--shape=proxy --items=500 --batches=16,32,64,128,256]

Each item is a context of Python's standard library and four continuations: four requests
of 200 to 400 tokens. The ungated model of `dense_1b7:28l` with random weights, 61M
parameters (proxy) or 1.7B (paper), is exported to a Qwen3 folder, which both read in
bfloat16. Times are of a second pass over the requests, texts to answers; the first pass
compiles. lm-eval's model has the best of the batch sizes. Needs requirements-tasks.txt,
torch, transformers and accelerate.
"""

import importlib
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import jax
import timing

import gated
from configs import dense_1b7
from gated import config, hf, model, storage
from gated.data import tokenizer
from gated.evals import harness
from gated.evals.harness.cache import Answers
from gated.plan import tasks

SHORTEST, LONGEST = 200, 400  # tokens of a request
VOCAB = 8192


def texts() -> list[str]:
  """The modules of the standard library that are long enough to cut items from."""
  files = sorted(Path(os.__file__).parent.glob('*.py'))
  read = [file.read_text(encoding='utf-8', errors='ignore') for file in files]
  return [text for text in read if len(text) > 8000]


def requests(items: int, token: tokenizer.Tokenizer) -> list[tuple[str, str]]:
  """-> four (context, continuation) for each item, of SHORTEST to LONGEST tokens."""
  draw, sources, found = random.Random(0), texts(), []
  while len(found) < 4 * items:
    text = draw.choice(sources)
    start = draw.randrange(len(text) - 4000)
    context = text[start : start + draw.randint(600, 1100)].rstrip()
    choices = []
    for _ in range(4):
      other = draw.choice(sources)
      at = draw.randrange(len(other) - 100)
      choices.append(' ' + other[at : at + draw.randint(20, 80)].strip())
    counts = [len(token.encode(context + choice)[0]) for choice in choices]
    if min(counts) >= SHORTEST and max(counts) <= LONGEST:
      found += [(context, choice) for choice in choices]
  return found


def export(folder: Path, shape: str) -> tokenizer.Tokenizer:
  """Writes a model with random weights and a tokenizer that transformers reads."""
  c = dense_1b7.get_config(f'28l,gate=none,scale={shape}').to_dict()
  c['model']['vocab'] = max(c['model']['vocab'], VOCAB)
  cfg = config.build(model.Config, c['model'], 'config.model')
  net = jax.jit(lambda key: model.Transformer(cfg, key))(jax.random.key(0))
  home = folder.parent / 'tokenizer.json'
  token = tokenizer.train_bpe(texts(), VOCAB, str(home))
  also = {'max_position_embeddings': 4096, 'eos_token_id': token.eos}
  hf.save(net, folder, dtype='bfloat16', also=also)
  shutil.copy(home, folder / 'tokenizer.json')
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': token.eos_token}
  settings |= {'pad_token': token.eos_token, 'clean_up_tokenization_spaces': False}
  storage.write_json(folder / 'tokenizer_config.json', settings)
  return token


def timed(lm, asked: list[tuple[str, str]]) -> tuple[float, list]:
  """-> the seconds for all requests, and their answers."""
  instance = importlib.import_module('lm_eval.api.instance').Instance
  wanted = [
    instance(request_type='loglikelihood', doc={}, arguments=pair, idx=i)
    for i, pair in enumerate(asked)
  ]
  start = time.perf_counter()
  answers = lm.loglikelihood(wanted, disable_tqdm=True)
  return time.perf_counter() - start, answers


def peer(
  folder: Path, asked: list[tuple[str, str]], sizes: list[int]
) -> tuple[float, list]:
  """-> the shortest time of lm-eval's own model over batch sizes, and its answers."""
  hflm = importlib.import_module('lm_eval.models.huggingface').HFLM
  best, answers = float('inf'), []
  for size in sizes:
    lm = hflm(pretrained=str(folder), dtype='bfloat16', batch_size=size, device='cuda')
    first, _ = timed(lm, asked)
    second, answers = timed(lm, asked)
    print(f'  hf, batch {size:3}: {second:6.2f} s (first {first:.2f})', flush=True)
    best = min(best, first, second)
  return best, answers


def ours(folder: Path, asked: list[tuple[str, str]]) -> tuple[float, list]:
  subject = tasks.subject_of(gated.load(folder), 0)
  lm = lambda: harness.part('adapter').Gated(subject, Answers(None), size=0)
  first, _ = timed(lm(), asked)
  second, answers = timed(lm(), asked)
  print(f'  ours          : {second:6.2f} s (first {first:.2f})', flush=True)
  return second, answers


def main():
  a = timing.options(
    __doc__, shape='proxy', items=500, batches='16,32,64,128,256'
  ).parse_args()
  sizes = [int(size) for size in a.batches.split(',')]
  print(timing.title(vars(a)))
  with tempfile.TemporaryDirectory() as parent:
    folder = Path(parent) / 'model'
    asked = requests(a.items, export(folder, a.shape))
    their_time, theirs = peer(folder, asked, sizes)
    our_time, own = ours(folder, asked)
  away = max(abs(x[0] - y[0]) / abs(y[0]) for x, y in zip(own, theirs, strict=True))
  print(f'{len(asked)} requests: hf / ours {their_time / our_time:.2f}')
  print(f'largest relative difference of a log-likelihood {away:.1e}')


if __name__ == '__main__':
  main()
