"""Optimizer steps of a recipe on this machine: tokens/s, MFU, memory, a line a variant.

  python bench/train_step.py configs/dense_1b7.py:28l batch=8
  python bench/train_step.py configs/dense_1b7.py:28l batch=8 -- gate=headwise

Each group of overrides after `--` is a variant; `gate=NAME` picks one of base.GATES.
Tokens are random, in packed rows of 8 documents; the time is the median step.
"""

import ast
import dataclasses
import gc
import importlib.util
import statistics
import sys
import time

import jax
import numpy as np

from configs import base
from gated import config, data
from gated.devices import mesh
from gated.plan import Config, Plan
from gated.run import metrics


def recipe(spec, overrides):
  path, _, argument = spec.partition(':')
  found = importlib.util.spec_from_file_location('recipe', path)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  c = module.get_config(argument)
  for text in overrides:
    knob, _, value = text.partition('=')
    if knob == 'gate':
      c.model.attn.gate.update(base.GATES[value])
      continue
    *path, last = knob.split('.')
    group = c
    for part in path:
      group = group[part]
    group[last] = value if isinstance(group[last], str) else ast.literal_eval(value)
  return config.build(Config, c.to_dict(), 'config')


def random_batch(cfg, rng):
  B, T = cfg.batch, cfg.data.length
  token = rng.integers(0, cfg.model.vocab, (B, T + 1)).astype(np.int32)
  segment = np.sort(rng.integers(1, 9, (B, T)), 1).astype(np.int32)
  starts = np.where(np.diff(segment, axis=1, prepend=0) > 0, np.arange(T), 0)
  position = (np.arange(T) - np.maximum.accumulate(starts, 1)).astype(np.int32)
  return data.Batch(
    token[:, :-1], token[:, 1:], np.ones((B, T), np.float32), segment, position
  )


def measure(cfg, steps):
  plan = Plan(cfg)
  begun = time.perf_counter()
  step = plan.train_step().compile()
  compiled = time.perf_counter() - begun
  rng = np.random.default_rng(0)
  batches = [mesh.place(random_batch(cfg, rng), plan.mesh, cfg.batch) for _ in range(4)]
  state, times = plan.init(), []
  for i in range(steps + 2):
    begun = time.perf_counter()
    state, values = step(state, batches[i % 4])
    jax.block_until_ready(values)
    times.append(time.perf_counter() - begun)
  seconds = statistics.median(times[2:])
  rate = plan.tokens_per_step / seconds
  peak = metrics.peak(jax.devices()[0])
  mfu = (
    rate * plan.flops_per_token / (peak * jax.device_count()) if peak else float('nan')
  )
  stats = step.memory_analysis()
  need = (stats.argument_size_in_bytes + stats.temp_size_in_bytes) / 2**30
  used = metrics.memory().get('memory_peak_bytes', 0) / 2**30
  return (
    f'{1e3 * seconds:8.1f} ms {rate:10,.0f} tok/s  mfu {mfu:.3f}  {need:6.1f} GiB '
    f'planned {used:6.1f} peak so far  compile {compiled:4.0f} s  '
    f'loss {float(values["loss"]):.3f}'
  )


def main():
  spec, *rest = sys.argv[1:]
  groups, common = [], []
  for text in rest:
    if text == '--':
      groups.append([])
    else:
      (groups[-1] if groups else common).append(text)
  print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {spec} {" ".join(common)}'
  )
  for group in groups or [[]]:
    try:
      line = measure(dataclasses.replace(recipe(spec, common + group)), steps=10)
    except Exception as problem:
      line = f'failed: {type(problem).__name__}: {str(problem)[:200]}'
    print(f'{" ".join(group) or "as it is":48} {line}', flush=True)
    gc.collect()


if __name__ == '__main__':
  main()
