"""Coordinate check of muP: how activations grow with the width, with it and without.

  python scripts/coordinate_check.py
  python scripts/coordinate_check.py --optimizer=muon --experts=4 --out=DIR

Takes ten steps at a constant learning rate on one batch, at each width, with
optim.transfer=none and mup (arXiv 2203.03466, section D.1). Prints mean |activation| of
the last layer and its exponent in the width, writes coordinate_check.svg, .pdf and .png,
and exits with 1 unless all exponents with muP are small. Widths 64 to 1024 take a few
minutes on 2 CPU cores.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from configs import base
from gated import config, data, model, plan
from gated.probes import style
from gated.train import optim, step, transfer

STEPS, ROWS, LENGTH, VOCAB, HEAD_DIM = 10, 8, 32, 64, 32
DRAWN = (0, 1, 2, 5, 10)  # The steps in the figure.
FLAT = 0.25  # Largest exponent of a flat activation; without muP, they reach 0.5 to 2.

# {name: mean |activation| as [width, step]}
Sizes = Mapping[str, np.ndarray]


def recipe(width: int, mup: str, args: argparse.Namespace) -> plan.Config:
  """A model of two layers whose heads and FFN grow with the width."""
  c, heads = base.get_config(), width // HEAD_DIM
  c.steps, c.batch, c.data.length = STEPS, ROWS, LENGTH
  c.model.update(vocab=VOCAB, width=width, depth=2, ffn=2 * width)
  c.model.numerics.compute = 'float32'
  c.model.attn.update(heads=heads, kv_heads=heads // 2, head_dim=HEAD_DIM)
  c.model.attn.gate.update(base.GATES[args.gate])
  c.model.moe.update(experts=args.experts, top_k=2)
  c.optim.update(name=args.optimizer, lr=1e-2, schedule='constant', warmup=0)
  c.optim.update(transfer=mup, base_width=min(args.widths))
  return config.build(plan.Config, c.to_dict(), 'config')


def sizes(net: Any, batch: data.Batch) -> dict[str, jax.Array]:
  """-> {name: mean |activation|}, of the last layer where it has layers."""
  size = lambda x: jnp.abs(x.astype(jnp.float32)).mean()

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest)
    points = dict(attention=trace.attn_branch, FFN=trace.ffn_branch, stream=trace.output)
    if block.attn.gate is not None:
      points['gate logits'] = block.attn.gate.logit(block.attn_norm(x_BTD))
    if trace.report is not None:
      points['router logits'] = block.ffn.router(block.ffn_norm(trace.middle))
    return trace.output, jax.tree.map(size, points)

  inputs = batch.tokens, batch.segments, batch.positions
  x_BTD, layers = net.hidden(*inputs, through=through)
  last = jax.tree.map(lambda size_L: size_L[-1], layers)
  return last | {'logits': size(net.logits(x_BTD))}


def run(cfg: plan.Config) -> dict[str, np.ndarray]:
  """A recipe -> {name: size before each of its steps, and after the last}."""
  growth = transfer.growth(cfg.optim, cfg.model)
  tx = optim.make(cfg.optim, steps=STEPS, multipliers={}, growth=growth)
  # The same tokens at every step, so that all updates are aligned.
  token_BT = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH), np.int32)
  one_BT, target_BT = np.ones_like(token_BT), np.roll(token_BT, -1, 1)
  arrays = token_BT, target_BT, one_BT.astype(np.float32), one_BT, one_BT.cumsum(1) - 1
  batch = data.Batch(*arrays)

  def body(state, _):
    net, opt = state
    grads = step.gradients(net, batch, accum=1, loss=cfg.loss).grads
    updates, opt = tx.update(grads, opt, net)
    return (jax.tree.map(jnp.add, net, updates), opt), sizes(net, batch)

  def steps():
    net = transfer.initial(model.Transformer(cfg.model, jax.random.key(1)), growth)
    return jax.lax.scan(body, (net, tx.init(net)), length=STEPS + 1)[1]

  return jax.device_get(jax.jit(steps)())


def measure(mup: str, args: argparse.Namespace) -> Sizes:
  runs = [run(recipe(width, mup, args)) for width in args.widths]
  return {name: np.array([run[name] for run in runs]) for name in runs[0]}


def exponents(measured: Sizes, widths: Sequence[int]) -> dict[str, np.ndarray]:
  """-> {name: the exponent in the width after each step}, by least squares."""
  fit = lambda size_WS: np.polyfit(np.log(widths), np.log(size_WS), 1)[0]
  return {name: fit(size_WS) for name, size_WS in measured.items()}


def flat(measured: Sizes, widths: Sequence[int]) -> bool:
  """Whether no activation grows with the width, nor shrinks after the last step.

  Logits shrink at first: the output multiplier acts on weights that are still random.
  """
  each = exponents(measured, widths).values()
  return all(e.max() <= FLAT and abs(e[-1]) <= FLAT for e in each)


@style.styled
def drawn(results: Mapping[str, Sizes], widths: Sequence[int]) -> Figure:
  """{transfer: sizes} -> a row of panels for each; a line is a step."""
  names = [*results['mup']]
  figure = Figure(figsize=(1.5 * len(names) + 0.5, 4.2))
  panels = figure.subplots(len(results), len(names), sharex=True, sharey='col')
  for row, (mup, measured) in zip(panels, results.items()):
    for ax, name in zip(row, names):
      for i, at in enumerate(DRAWN):
        ax.plot(widths, measured[name][:, at], label=f'step {at}', **style.look(i))
      ax.set_xscale('log', base=2)
      ax.set_yscale('log')
      ax.set_xticks(widths, [str(width) for width in widths], rotation=90)
      ax.yaxis.set_major_formatter('{x:g}')
      ax.yaxis.set_minor_formatter('')
    row[0].set_ylabel(f'transfer={mup}\nmean |activation|')
  for ax, name in zip(panels[0], names):
    ax.set_title(name)
  figure.supxlabel('width', fontsize=8)
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=len(DRAWN))
  return figure


def parser() -> argparse.ArgumentParser:
  layout = argparse.RawDescriptionHelpFormatter
  words = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
  add, numbers = words.add_argument, lambda text: [int(n) for n in text.split(',')]
  add('--widths', type=numbers, default=[64, 128, 256, 512, 1024], help='multiples of 64')
  add('--optimizer', choices=('adamw', 'muon'), default='adamw')
  add('--gate', choices=[*base.GATES], default='elementwise')
  add('--experts', type=int, default=0, help='0 for a dense FFN')
  add('--out', default='runs/coordinate_check', help='folder of the figure')
  return words


def main(argv: Sequence[str] | None = None) -> int:
  args = (words := parser()).parse_args(argv)
  if len({*args.widths}) < 2 or any(width < 64 or width % 64 for width in args.widths):
    words.error(f'--widths={args.widths}, but two or more multiples of 64 are expected')
  if args.experts not in (0, *range(2, 1025)):
    words.error(f'--experts={args.experts}, but 0 or 2 to 1024 are expected')
  results = {mup: measure(mup, args) for mup in transfer.TRANSFERS}
  for mup, measured in results.items():
    print(f'optim.transfer={mup}, step {STEPS}, widths {args.widths}')
    for name, exponent in exponents(measured, args.widths).items():
      last = ' '.join(f'{size:9.4f}' for size in measured[name][:, -1])
      print(f'  {name:14}{last}  exponent {exponent[-1]:+.2f}')
  style.save(drawn(results, args.widths), args.out, 'coordinate_check')
  passed = flat(results['mup'], args.widths)
  print(f'with muP: {"flat" if passed else "NOT flat"}; figure in {args.out}')
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
