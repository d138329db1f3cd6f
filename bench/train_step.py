"""Optimizer steps of a recipe on this machine: tokens/s, MFU and memory of each variant.

  python bench/train_step.py configs/dense_1b7.py:28l batch=8
  python bench/train_step.py --documents=8 configs/dense_1b7.py batch=8 -- gate=headwise

Each group of overrides after `--` is a variant; `gate=NAME` selects one of base.GATES.
Tokens are random, in rows of one or more documents; MFU counts the pairs that attend. The
time is the median step.
"""

import argparse
import ast
import gc
import importlib
import itertools
import math
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import timing

from configs import base
from gated import config, data
from gated.devices import mesh
from gated.plan import Config, Plan
from gated.plan.prepare import fitted
from gated.run import metrics

STEPS = 10


def recipe(spec, overrides):
  """FILE:ARGUMENT and KNOB=VALUE texts -> the config."""
  file, _, argument = spec.partition(':')
  c = importlib.import_module(f'configs.{Path(file).stem}').get_config(argument)
  for text in overrides:
    knob, _, value = text.partition('=')
    if knob == 'gate':
      c.model.attn.gate.update(base.GATES[value])
    else:
      c.update_from_flattened_dict({knob: _literal(value)})
  return config.build(Config, c.to_dict(), 'config')


def recipe_or_exit(parser, spec, overrides):
  """As `recipe`; a wrong one ends the program with one line."""
  try:
    return recipe(spec, overrides)
  except (ValueError, ImportError, KeyError) as problem:
    parser.error(f'{" ".join([spec, *overrides])}: {problem}')


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def random_batch(cfg, documents, rng):
  B, T = cfg.batch, cfg.data.length
  token = rng.integers(0, cfg.model.vocab, (B, T + 1)).astype(np.int32)
  segment = np.sort(rng.integers(1, documents + 1, (B, T)), 1).astype(np.int32)
  starts = np.where(np.diff(segment, axis=1, prepend=0) > 0, np.arange(T), 0)
  position = (np.arange(T) - np.maximum.accumulate(starts, 1)).astype(np.int32)
  weight = np.ones((B, T), np.float32)
  return data.Batch(token[:, :-1], token[:, 1:], weight, segment, position)


def variants(words):
  """The words after the recipe -> (common overrides, those of each variant)."""
  groups = [list(g) for dash, g in itertools.groupby(words, '--'.__eq__) if not dash]
  common = groups.pop(0) if words[:1] != ['--'] and groups else []
  return common, groups or [[]]


def measure(cfg, documents):
  """Runs the train step -> a line of the table."""
  plan = Plan(fitted(cfg, documents, float(documents)))
  begun = time.perf_counter()
  step = plan.train_step().compile()
  compiled = time.perf_counter() - begun
  rng = np.random.default_rng(0)
  batches = [random_batch(cfg, documents, rng) for _ in range(4)]
  batches = [mesh.place(batch, plan.mesh, cfg.batch) for batch in batches]
  state, times = plan.init(), []
  for batch in itertools.islice(itertools.cycle(batches), STEPS + 2):
    begun = time.perf_counter()
    state, values = jax.block_until_ready(step(state, batch))
    times.append(time.perf_counter() - begun)
  seconds = statistics.median(times[2:])
  rate = plan.tokens_per_step / seconds
  peak = metrics.peak(jax.devices()[0]) or math.nan
  mfu = rate * float(values['flops_per_token']) / (peak * jax.device_count())
  stats = step.memory_analysis()
  need = (stats.argument_size_in_bytes + stats.temp_size_in_bytes) / 2**30
  used = metrics.memory().get('memory_peak_bytes', 0) / 2**30
  return (
    f'{1e3 * seconds:8.1f} ms {rate:10,.0f} tok/s  mfu {mfu:.3f}  {need:6.1f} GiB '
    f'planned {used:6.1f} peak so far  compile {compiled:4.0f} s  '
    f'loss {float(values["loss"]):.3f}'
  )


def main():
  parser = timing.options(__doc__, documents=1)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  overrides = 'KNOB=VALUE ... [-- KNOB=VALUE ...]'
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help=overrides)
  a = parser.parse_args()
  spec, (common, groups) = a.recipe, variants(a.overrides)
  packed = f'{a.documents} documents a row'
  print(timing.title(', '.join([' '.join([spec, *common]), packed])))
  for group in groups:
    try:
      line = measure(recipe(spec, common + group), a.documents)
    except Exception as problem:
      line = f'failed: {type(problem).__name__}: {str(problem)[:200]}'
    print(f'{" ".join(group) or "no override":48} {line}', flush=True)
    gc.collect()


if __name__ == '__main__':
  main()
