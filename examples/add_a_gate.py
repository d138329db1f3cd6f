"""Adds a gate of your own, and trains it for 50 steps beside the baseline.

  python examples/add_a_gate.py [--steps=50]

An activation of a gate is one line in one table, `ACTIVATIONS` in gated/model/gate.py.
This example adds the line from outside. To keep it, write it into that file: then
`python train.py --config.model.attn.gate.activation=relu6` accepts it too.
2 CPU cores, about a minute.
"""

import argparse

import jax

from configs import tiny
from gated import config, data
from gated.devices import mesh
from gated.model import gate
from gated.plan import Config, Plan

# The whole addition: a name, and a function of the gate's logit in float32.
gate.ACTIVATIONS['relu6'] = jax.nn.relu6


def recipe(name: str, steps: int, **gate_knobs) -> Config:
  """The demo's recipe, small, with these knobs of `config.model.attn.gate`."""
  c = tiny.get_config('gate=none')
  c.name, c.steps = name, steps
  c.model.update(width=96, depth=2, ffn=256)
  c.model.attn.update(heads=3, kv_heads=1)
  c.optim.warmup = 5
  c.model.attn.gate.update(gate_knobs)
  return config.build(Config, c.to_dict(), 'config')


def train(cfg: Config) -> list[float]:
  """Trains in memory, as train.py does without its checkpoints -> the losses in nats."""
  plan = Plan(cfg)
  corpus = data.open(cfg.data, **plan.reads)
  batches = corpus.train(0, mesh.rows(plan.mesh, cfg.batch))
  state, step, losses = plan.init(), plan.train_step().compile(), []
  for _ in range(cfg.steps):
    batch = mesh.place(next(batches), plan.mesh, cfg.batch)
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  print(f'{cfg.name:>14}: {plan.parameters:,} parameters, loss {losses[-1]:.4f} nats')
  return losses


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=50)
  steps = parser.parse_args().steps
  baseline = train(recipe('baseline', steps))
  sigmoid = train(recipe('sigmoid', steps, position='sdpa'))
  relu = train(recipe('relu6', steps, position='sdpa', activation='relu6'))
  print(f'{"step":>6}{"baseline":>14}{"sigmoid":>14}{"relu6":>14}')
  for step in range(9, steps, 10):
    row = baseline[step], sigmoid[step], relu[step]
    print(f'{step + 1:6}' + ''.join(f'{loss:14.4f}' for loss in row))


if __name__ == '__main__':
  main()
