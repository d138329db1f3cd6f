"""Text generation beside transformers' `generate` with its compiled static cache.

  python bench/generate.py [--rows=64 --prompt=128 --tokens=256]

The ungated 62M model (`dense_1b7:28l`, scale proxy, random weights) is exported to a
Qwen3 folder, which both read in bfloat16. Greedy decoding of rows of equal length, after
two calls that compile; tokens/s counts new tokens, prefill included.
"""

import importlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
import timing

import gated
from configs import dense_1b7
from gated import config, hf, model


def seconds(run) -> float:
  """The shortest of three calls, after two that compile."""
  times = []
  for _ in range(5):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times[2:])


def export(folder: str) -> None:
  c = dense_1b7.get_config('28l,gate=none,scale=proxy').to_dict()
  cfg = config.build(model.Config, c['model'], 'config.model')
  net = jax.jit(lambda key: model.Transformer(cfg, key))(jax.random.key(0))
  hf.save(net, folder, dtype='bfloat16')


def ours(folder: str, prompt_BT: np.ndarray, tokens: int):
  run = gated.load(folder)
  return lambda: run.generate(list(prompt_BT), max_tokens=tokens, temperature=0.0)


def peer(folder: str, prompt_BT: np.ndarray, tokens: int):
  torch, transformers = map(importlib.import_module, ('torch', 'transformers'))
  net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
  net = net.to('cuda').eval()
  ids = torch.tensor(prompt_BT, device='cuda')
  options: dict[str, Any] = dict(
    max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
  )
  options |= dict(cache_implementation='static', pad_token_id=0)

  def run():
    with torch.no_grad():
      net.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()

  return run


def main():
  parser = timing.options(__doc__, rows=0, prompt=128, tokens=256)
  a = parser.parse_args()
  print(timing.title(vars(a)))
  with tempfile.TemporaryDirectory() as parent:
    folder = f'{parent}/model'
    export(folder)
    for rows in [a.rows] if a.rows else [1, 64]:
      rng = np.random.default_rng(0)
      prompt_BT = rng.integers(1, 2000, (rows, a.prompt)).astype(np.int32)
      rates = []
      for name, make in (('ours', ours), ('transformers', peer)):
        rates.append(rows * a.tokens / seconds(make(folder, prompt_BT, a.tokens)))
        print(f'{rows:3} rows  {name:12} {rates[-1]:10,.0f} tokens/s', flush=True)
      print(f'{rows:3} rows  ours / transformers {rates[0] / rates[1]:.2f}', flush=True)


if __name__ == '__main__':
  main()
