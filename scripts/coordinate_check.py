"""Coordinate check of muP: how activations grow with the width, with it and without.

  python scripts/coordinate_check.py
  python scripts/coordinate_check.py --optimizer=muon --experts=4 --out=DIR

Takes ten steps at a constant learning rate on one batch, at each width, with
optim.transfer=none and mup (arXiv 2203.03466, section D.1). Prints mean |activation| and
its exponent in the width, writes coordinate_check.svg, .pdf and .png, and exits with 1
unless all exponents with muP are small. Widths 64 to 1024 take minutes on 2 CPU cores.
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
from gated import config, data, plan
from gated.devices import mesh
from gated.probes import style

WIDTHS = (64, 128, 256, 512, 1024)
STEPS, ROWS, LENGTH, VOCAB, HEAD_DIM = 10, 8, 32, 64, 32
DRAWN = (0, 1, 2, 5, 10)  # The steps in the figure.
FLAT = 0.25  # Largest exponent of a flat activation; SP's are 0.5 to 2.
NAMES = {
  'gate': 'gate logits',
  'router': 'router logits',
  'attn': 'attention branch',
  'ffn': 'FFN branch',
  'stream': 'residual stream',
  'logits': 'logits',
}

# {name: mean |activation| as [width, step]}; of the last layer, where it has layers.
Measured = Mapping[str, np.ndarray]


def recipe(width: int, transfer: str, args: argparse.Namespace) -> plan.Config:
  """A model of two layers whose heads and FFN grow with the width."""
  c = base.get_config()
  c.steps, c.batch, c.data.length = STEPS, ROWS, LENGTH
  c.model.update(vocab=VOCAB, width=width, depth=2, ffn=2 * width, norm=args.norm)
  c.model.numerics.compute = 'float32'
  heads = width // HEAD_DIM
  c.model.attn.update(heads=heads, kv_heads=heads // 2, head_dim=HEAD_DIM)
  c.model.attn.gate.update(base.GATES[args.gate])
  c.model.moe.update(experts=args.experts, top_k=2)
  c.optim.update(name=args.optimizer, lr=args.lr, schedule='constant', warmup=0)
  c.optim.update(transfer=transfer, base_width=min(args.widths))
  return config.build(plan.Config, c.to_dict(), 'config')


def batch() -> data.Batch:
  """The same random tokens at every step, so that all updates are aligned."""
  token_BT = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH), np.int32)
  ones_BT, position_BT = np.ones_like(token_BT), np.indices(token_BT.shape)[1]
  target_BT, weight_BT = np.roll(token_BT, -1, 1), ones_BT.astype(np.float32)
  return data.Batch(token_BT, target_BT, weight_BT, ones_BT, position_BT.astype(np.int32))


def sizes(model: Any, batch: data.Batch) -> dict[str, jax.Array]:
  """-> {name of NAMES: mean |activation|}."""
  size = lambda x: jnp.abs(x.astype(jnp.float32)).mean()

  def through(block, x_BTD, *rest):
    trace = block.trace(x_BTD, *rest)
    points = dict(attn=trace.attn_branch, ffn=trace.ffn_branch, stream=trace.output)
    if block.attn.gate is not None:
      points['gate'] = block.attn.gate.logit(block.attn_norm(x_BTD))
    if trace.report is not None:
      points['router'] = block.ffn.router(block.ffn_norm(trace.middle))
    return trace.output, jax.tree.map(size, points)

  x_BTD, layers = model.hidden(
    batch.tokens, batch.segments, batch.positions, through=through
  )
  last = jax.tree.map(lambda size_L: size_L[-1], layers)
  return last | {'logits': size(model.logits(x_BTD))}


def run(cfg: plan.Config) -> list[dict[str, float]]:
  """A recipe -> the sizes before each of its steps, and after the last."""
  built = plan.Plan(cfg, jax.devices()[:1])
  state, step = built.init(), built.train_step().compile()
  measure, rows = jax.jit(sizes), mesh.place(batch(), built.mesh, ROWS)
  results = []
  with jax.set_mesh(built.mesh):
    for number in range(STEPS + 1):
      results.append(jax.device_get(measure(state.model, rows)))
      if number < STEPS:
        state, _ = step(state, rows)
  return results


def measure(transfer: str, args: argparse.Namespace) -> Measured:
  runs = [run(recipe(width, transfer, args)) for width in args.widths]
  return {
    name: np.array([[at[name] for at in steps] for steps in runs])
    for name in NAMES
    if name in runs[0][0]
  }


def exponents(measured: Measured, widths: Sequence[int]) -> dict[str, np.ndarray]:
  """-> {name: the exponent in the width after each step}, by least squares."""
  fit = lambda size_WS: np.polyfit(np.log(widths), np.log(size_WS), 1)[0]
  return {name: fit(size_WS) for name, size_WS in measured.items()}


def flat(measured: Measured, widths: Sequence[int]) -> bool:
  """Whether no activation grows with the width, and after the last step none shrinks.

  Logits shrink at first: the output multiplier acts on weights that are still random.
  """
  each = exponents(measured, widths).values()
  return all(e.max() <= FLAT and abs(e[-1]) <= FLAT for e in each)


@style.styled
def drawn(results: Mapping[str, Measured], widths: Sequence[int]) -> Figure:
  """{transfer: sizes} -> a row of panels for each; a line is a step."""
  names = [*results['mup']]
  figure = Figure(figsize=(1.25 * len(names) + 0.4, 3.4))
  panels = figure.subplots(len(results), len(names), sharex=True, sharey='col')
  for row, (transfer, measured) in zip(panels, results.items()):
    for ax, name in zip(row, names):
      for i, step in enumerate(DRAWN):
        ax.plot(widths, measured[name][:, step], label=f'step {step}', **style.look(i))
      ax.set_xscale('log', base=2)
      ax.set_yscale('log')
    row[0].set_ylabel(f'transfer={transfer}\nmean |activation|')
  for ax, name in zip(panels[0], names):
    ax.set_title(NAMES[name])
  figure.supxlabel('width', fontsize=8)
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=len(DRAWN))
  return figure


def parser() -> argparse.ArgumentParser:
  layout = argparse.RawDescriptionHelpFormatter
  words = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
  add, numbers = words.add_argument, lambda text: [int(n) for n in text.split(',')]
  add('--widths', type=numbers, default=list(WIDTHS), help='multiples of 64')
  add('--optimizer', choices=('adamw', 'muon'), default='adamw')
  add('--lr', type=float, default=1e-2, help='peak learning rate, of the first width')
  add('--gate', choices=[*base.GATES], default='elementwise')
  add('--norm', choices=('rms', 'gated'), default='rms')
  add('--experts', type=int, default=0, help='0 for a dense FFN')
  add('--out', default='runs/coordinate_check', help='folder of the figure')
  return words


def main(argv: Sequence[str] | None = None) -> int:
  words = parser()
  args = words.parse_args(argv)
  if len(args.widths) < 2 or any(width < 64 or width % 64 for width in args.widths):
    words.error(f'--widths={args.widths}, but two or more multiples of 64 are expected')
  results = {}
  for transfer in ('none', 'mup'):
    results[transfer] = measured = measure(transfer, args)
    rates = exponents(measured, args.widths)
    print(f'optim.transfer={transfer}, widths {args.widths}')
    for name, size_WS in measured.items():
      last = ' '.join(f'{size:9.4f}' for size in size_WS[:, -1])
      print(f'  {NAMES[name]:18} step {STEPS}: {last}  exponent {rates[name][-1]:+.2f}')
  style.save(drawn(results, args.widths), args.out, 'coordinate_check')
  passed = flat(results['mup'], args.widths)
  print(f'with muP: {"flat" if passed else "NOT flat"}; figure in {args.out}')
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
