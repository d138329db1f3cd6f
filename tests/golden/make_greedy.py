"""Makes tests/golden/hf_trained: a trained gated model as exported, and its continuation.

  PYTHONPATH=.:tests python tests/golden/make_greedy.py train
  OTHER/bin/python tests/golden/make_greedy.py continue  # each version of transformers

The first trains a headwise 2sigmoid gate and exports it. The second opens the folder with
transformers and adds the 32 most probable bytes after PROMPT to continuation.json.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / 'hf_trained'
TOKENS = FOLDER / 'continuation.json'
PROMPT = b'The gate '
TEXT = (
  b'The gate opens. The gate closes. A token goes through the gate, and the next one '
)
TEXT += b'waits. '
LENGTH = 64
KNOBS = dict(
  model__attn__gate__position='sdpa',
  model__attn__gate__granularity='headwise',
  model__attn__gate__activation='2sigmoid',
  model__attn__gate__init='zero',
  model__vocab=257,
  model__width=32,
  model__numerics__init_std=0.05,
  data__length=LENGTH,
  steps=150,
  optim__lr=1e-2,
  optim__floor=1e-3,
)


def train() -> None:
  import functools

  import jax
  import numpy as np
  import small

  from gated import data, hf, model
  from gated.train import guard, optim, step

  cfg = small.whole(**KNOBS)
  text = np.frombuffer(TEXT * 40, np.uint8).astype(np.int32)
  tx = optim.make(cfg.optim, steps=cfg.steps, multipliers={})
  tx = guard.guard(tx, cfg.stability)
  options = dict(tx=tx, schedule=optim.schedule(cfg.optim, cfg.steps), accum=1)
  run = jax.jit(functools.partial(step.train, loss=cfg.loss, **options))
  build = functools.partial(model.Transformer, cfg.model)
  state = jax.jit(lambda: step.init(build, tx, cfg.seed))()
  rng, ones = np.random.default_rng(0), np.ones((cfg.batch, LENGTH), np.int32)
  position = np.arange(LENGTH, dtype=np.int32) * ones
  for _ in range(cfg.steps):
    starts = rng.integers(0, len(text) - LENGTH - 1, cfg.batch)
    rows = np.stack([text[i : i + LENGTH + 1] for i in starts])
    weights = ones.astype(np.float32)
    batch = data.Batch(rows[:, :-1], rows[:, 1:], weights, ones, position)
    state, _ = run(state, batch)
  hf.save(state.model, FOLDER, dtype='bfloat16')


def continued() -> None:
  import torch
  import transformers as theirs

  options = dict(trust_remote_code=True, dtype=torch.float32)
  model = theirs.AutoModelForCausalLM.from_pretrained(FOLDER, **options)
  prompt = torch.tensor([list(PROMPT)])
  tokens = model.generate(prompt, max_new_tokens=32, do_sample=False)
  new = tokens[0, len(PROMPT) :].tolist()
  content = json.loads(TOKENS.read_text()) if TOKENS.exists() else {}
  content[theirs.__version__] = {'text': bytes(new).decode(), 'tokens': new}
  TOKENS.write_text(json.dumps(content, sort_keys=True) + '\n')


if __name__ == '__main__':
  {'train': train, 'continue': continued}[sys.argv[1]]()
