"""The least time of a train step: its products, attention and optimizer, each alone.

  python bench/floor.py configs/dense_1b7.py:28l batch=8
  python bench/floor.py configs/moe_15b.py batch=8 model.depth=4 -- gate=headwise

The recipe and its overrides are as for train_step.py. A product is timed with both of its
gradients, in bfloat16, at the shape that it has in the model; experts as batched products
with the same number of tokens each; attention over whole rows, with its gradients. The
optimizer reads a gradient, and reads and writes a weight and two moments, at the measured
speed of a copy. Sums, norms, the softmax of the vocabulary and all else count as nothing.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import timing
from train_step import recipe_or_exit, variants

from gated import kernels, model
from gated.devices import trees

COPY = 1 << 28  # elements


def products(cfg):
  """A recipe -> {(name, tokens, inputs, outputs, groups): how often it occurs}."""
  m, tokens = cfg.model, cfg.batch // cfg.accum * cfg.data.length
  counts = collections.Counter()
  for name, leaf in trees.flatten(model.abstract(m)).items():
    shape = leaf.shape
    layers = name.startswith('blocks')
    if len(shape) < 2 + layers or name.startswith('embed'):
      continue
    times, own = (shape[0], shape[1:]) if layers else (1, shape)
    grouped = m.moe.experts and '.ffn.' in name and len(own) == 3
    E, own = (own[0], own[1:]) if grouped else (1, own)
    rows = tokens * m.moe.top_k // E if grouped else tokens
    size = leaf.size // (times * E)
    ins = m.width if m.width in (own[0], own[-1]) else own[0]
    short = name.removesuffix('.weight').rpartition('.')[2]
    counts[short, rows, ins, size // ins, E] += times * cfg.accum
  if m.tied:
    counts['unembedding', tokens, m.width, m.vocab, 1] += cfg.accum
  return counts


def product_ms(rows, ins, outs, groups):
  """x W and its two gradients."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (groups, rows, ins), (groups, ins, outs), (groups, rows, outs)
  x, w, dy = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes))
  three = 'gri,gio->gro', 'gro,gio->gri', 'gri,gro->gio'
  pairs = (x, w), (dy, w), (x, dy)
  return sum(
    timing.milliseconds(jax.jit(lambda a, b, to=to: jnp.einsum(to, a, b)), *pair)
    for to, pair in zip(three, pairs)
  )


def attention_ms(cfg):
  attn, T = cfg.model.attn, cfg.data.length
  keys, rows = jax.random.split(jax.random.key(0), 4), cfg.batch // cfg.accum
  heads = attn.heads, attn.kv_heads, attn.kv_heads, attn.heads
  q, k, v, w = (
    jax.random.normal(key, (rows, T, h, attn.head_dim), jnp.bfloat16)
    for key, h in zip(keys, heads)
  )
  attend = lambda q, k, v: kernels.attend(q, k, v, None, backend='auto', max_segments=2)
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32) * w)
  both = timing.milliseconds(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), q, k, v)
  return both * cfg.model.depth * cfg.accum


def optimizer_ms(cfg):
  x = jnp.ones(COPY, jnp.float32)
  speed = 8 * COPY / timing.milliseconds(jax.jit(lambda x: x + 1), x)
  return 28 * model.count(model.abstract(cfg.model)) / speed


def main():
  parser = timing.options(__doc__)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  overrides = 'KNOB=VALUE ... [-- KNOB=VALUE ...]'
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help=overrides)
  a = parser.parse_args()
  common, groups = variants(a.overrides)
  print(timing.title(' '.join([a.recipe, *common])))
  for group in groups:
    cfg, total = recipe_or_exit(parser, a.recipe, common + group), 0.0
    print(' '.join(group) or 'no override')
    for (name, *shape), times in products(cfg).items():
      ms = product_ms(*shape)
      rows, ins, outs, E = shape
      rate = 6 * rows * ins * outs * E / ms / 1e9
      what = f'{times:4} x {name:12} {rows} x {ins} x {outs}' + f', {E} groups' * (E > 1)
      print(f'{times * ms:9.2f} ms  {what:50} {rate:7.1f} TFLOP/s', flush=True)
      total += times * ms
    for name, ms in ('attention', attention_ms(cfg)), ('optimizer', optimizer_ms(cfg)):
      print(f'{ms:9.2f} ms       {name}', flush=True)
      total += ms
    print(f'{total:9.2f} ms  in all')


if __name__ == '__main__':
  main()
