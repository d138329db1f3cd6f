"""Compares two runs: held-out loss, loss on a text of yours, and what their gates do.

python examples/compare_runs.py runs/tiny-none-1a2b3c4d runs/tiny-elementwise-5e6f7a8b
python examples/compare_runs.py A B --text='def f(x):'
"""

import argparse

import jax

import gated
from gated import storage
from gated.run import metrics

TEXT = 'def mean(values):\n  return sum(values) / len(values)\n'


def heldout(path: str) -> dict[int, float]:
  """A workdir -> its held-out losses by step, in nats a token."""
  records = metrics.read(storage.path(path) / 'metrics.jsonl')
  return {r['step']: r['loss'] for r in records if r['kind'] == 'heldout'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('runs', nargs=2, metavar='WORKDIR')
  parser.add_argument('--text', default=TEXT, help='a text whose loss is compared')
  args = parser.parse_args()
  losses = [heldout(path) for path in args.runs]
  print(f'{"step":>6}' + ''.join(f'{path:>24.22}' for path in args.runs))
  for step in sorted(losses[0].keys() & losses[1].keys()):
    print(f'{step:6}' + ''.join(f'{loss[step]:24.4f}' for loss in losses))
  for path in args.runs:
    run = gated.load(path)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.model))
    print(
      f'{path}: {parameters:,} parameters, {run.loss(args.text):.4f} nats on the text'
    )
    if run.cfg.attn.gate.position != 'none':
      score = run.gates(args.text)
      print(
        f'  gate scores: mean {score.mean():.3f}, below 0.1: {(score < 0.1).mean():.1%}'
      )


if __name__ == '__main__':
  main()
