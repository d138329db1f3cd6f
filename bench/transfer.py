"""The best learning rates of two widths, with muP and without.

  python bench/transfer.py --widths=32,128 --seeds=2

Trains byte models of two layers on the embedded corpus: the narrow one, and the wide one
with optim.transfer=none and mup, relative to the narrow one. Prints the mean loss of the
last tenth of the steps, the best rate (a parabola in log lr through the three lowest
points), and the ratio of the wide model's best to the narrow one's. About 10 minutes on
2 idle CPU cores at these widths; 16 times longer at 4 times the widths.
"""

import argparse
import functools
from collections.abc import Sequence

import jax
import numpy as np

from configs import base
from gated import config, data, model, plan
from gated.train import optim, step, transfer

VOCAB, ROWS, LENGTH = 320, 8, 64


def recipe(width: int, mup: bool, args: argparse.Namespace) -> plan.Config:
  """A learning rate of 1, which `trained` multiplies."""
  c, heads = base.get_config(), width // (args.widths[0] // 2)
  c.steps, c.batch, c.data.length = args.steps, ROWS, LENGTH
  c.model.update(vocab=VOCAB, width=width, depth=2, ffn=2 * width)
  c.model.numerics.compute = 'float32'
  c.model.attn.update(heads=heads, kv_heads=heads // 2, head_dim=args.widths[0] // 2)
  c.model.attn.gate.update(base.GATES[args.gate])
  c.optim.update(name=args.optimizer, lr=1.0, warmup=args.steps // 10, floor=0.0)
  c.optim.update(transfer='mup' if mup else 'none', base_width=args.widths[0])
  return config.build(plan.Config, c.to_dict(), 'config')


def trained(cfg: plan.Config, batches: data.Batch, seed: jax.Array, lr: jax.Array):
  """A recipe, stacked batches -> the loss of each step with the learning rate lr."""
  growth = transfer.growth(cfg.optim, cfg.model)
  tx = optim.make(cfg.optim, steps=cfg.steps, multipliers={}, growth=growth)

  def body(state, batch):
    net, opt = state
    grads = step.gradients(net, batch, accum=1, loss=cfg.loss)
    updates, opt = tx.update(grads.grads, opt, net)
    net = jax.tree.map(lambda p, u: p + lr * u, net, updates)
    return (net, opt), grads.losses['loss']

  net = transfer.initial(model.Transformer(cfg.model, jax.random.key(seed)), growth)
  return jax.lax.scan(body, (net, tx.init(net)), batches)[1]


def losses(cfg: plan.Config, args: argparse.Namespace) -> np.ndarray:
  """-> the mean final loss over seeds, for each learning rate."""
  opened = data.open(cfg.data, vocab=VOCAB, batch=ROWS, seed=0, max_segments=0)
  rows = opened.train(0, range(ROWS))
  batches = jax.tree.map(lambda *x: np.stack(x), *(next(rows) for _ in range(cfg.steps)))
  last, run = max(cfg.steps // 10, 1), jax.jit(functools.partial(trained, cfg))
  loss = lambda lr, seed: np.mean(run(batches, seed, lr)[-last:])
  return np.array([[loss(lr, s) for s in range(args.seeds)] for lr in args.rates]).mean(1)


def best(rates: Sequence[float], loss: np.ndarray) -> float:
  """The minimum of the parabola through the lowest point and its neighbours."""
  i = min(max(int(np.nanargmin(loss)), 1), len(loss) - 2)
  a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), loss[i - 1 : i + 2], 2)
  return float(np.exp(-b / (2 * a))) if a > 0 else rates[int(np.nanargmin(loss))]


def main(argv: Sequence[str] | None = None) -> int:
  layout = argparse.RawDescriptionHelpFormatter
  words = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
  listed = lambda kind: lambda text: [kind(n) for n in text.split(',')]
  add, rates = words.add_argument, [2.0**power * 1e-3 for power in range(8)]
  add('--widths', type=listed(int), default=[64, 256], help='narrow,wide')
  add('--rates', type=listed(float), default=rates, help='at least 3, in order')
  add('--optimizer', choices=('adamw', 'muon'), default='adamw')
  add('--gate', choices=[*base.GATES], default='elementwise')
  add('--steps', type=int, default=300)
  add('--seeds', type=int, default=1)
  args = words.parse_args(argv)
  print('rates', *(f'{lr:9.4g}' for lr in args.rates))
  first = None
  for width, mup in (
    (args.widths[0], False),
    *((args.widths[1], m) for m in (False, True)),
  ):
    loss = losses(recipe(width, mup, args), args)
    rate = best(args.rates, loss)
    first = first or rate
    print(
      f'width {width}, {"mup " if mup else "none"}', *(f'{x:.4f}' for x in loss), end=' '
    )
    print(f'best {rate:.3g}, {rate / first:.2f} times the narrow one', flush=True)
  return 0


if __name__ == '__main__':
  main()
