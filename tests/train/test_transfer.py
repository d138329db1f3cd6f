"""muP by its published table, and its folded multipliers as if they were applied."""

import argparse
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from test_optim import layered, layered_updates

from gated import model
from gated.devices import trees
from gated.train import optim, transfer

check = importlib.import_module('scripts.coordinate_check')
BASE, R = 16, 4  # The width of the base model, and how many times wider a model is.

# All kinds of parameters in one model: {name: (initial value, AdamW, Muon)} at width R
# times the base's, as powers of R.
MODEL = dict(
  width=BASE * R,
  norm='gated',
  tied=False,
  moe__experts=4,
  moe__top_k=2,
  moe__shared=1,
  attn__gate__position='sdpa',
  attn__sink_tokens=2,
  attn__switch__where='value',
  attn__switch__experts=2,
  attn__bias=True,
  attn__out_bias=True,
  attn__output='rms_norm',
)
HIDDEN, FIXED, VECTOR = (-0.5, -1, -0.5), (-1, -1, -1), (0, 0, 0)
BY_ADAM = (-0.5, -1, -1)  # Hidden, but Muon leaves it to AdamW.
TABLE = {
  'blocks.attn.gate.weight': HIDDEN,
  'blocks.attn.query.weight': HIDDEN,
  'blocks.attn.query.bias': VECTOR,
  'blocks.attn.key.weight': HIDDEN,
  'blocks.attn.key.bias': VECTOR,
  'blocks.attn.value.project.weight': HIDDEN,
  'blocks.attn.value.project.bias': VECTOR,
  'blocks.attn.value.router.weight': BY_ADAM,
  'blocks.attn.out.weight': HIDDEN,
  'blocks.attn.out.bias': VECTOR,
  'blocks.attn.query_norm.scale': VECTOR,
  'blocks.attn.key_norm.scale': VECTOR,
  'blocks.attn.output_norm.scale': VECTOR,
  'blocks.attn.sinks.key': VECTOR,
  'blocks.attn.sinks.value': VECTOR,
  'blocks.ffn.experts.act': HIDDEN,
  'blocks.ffn.experts.up': HIDDEN,
  'blocks.ffn.experts.down': HIDDEN,
  'blocks.ffn.shared.act.weight': HIDDEN,
  'blocks.ffn.shared.up.weight': HIDDEN,
  'blocks.ffn.shared.down.weight': HIDDEN,
  'blocks.ffn.router.weight': FIXED,
  'embed.table': VECTOR,
  'head.table': VECTOR,
  'norm.rms.scale': (-1, -1, -1),  # The output multiplier.
  'norm.down.weight': (0, 0, 0),  # Its inverse times a fixed fan-out's.
  'norm.up.weight': VECTOR,
} | {
  f'blocks.{norm}.{name}': powers
  for norm in ('attn_norm', 'ffn_norm')
  for name, powers in {
    'rms.scale': VECTOR,
    'down.weight': FIXED,
    'up.weight': VECTOR,
  }.items()
}


def growth_of(cfg, **changes):
  knobs = small.optim_config(**dict(transfer='mup', base_width=BASE) | changes)
  return transfer.growth(knobs, cfg)


def ones(cfg):
  return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model.abstract(cfg))


def powers(tree):
  """A tree of ones, scaled -> {name: its power of R}."""
  power = lambda leaf: float(np.log(np.asarray(leaf).max()) / np.log(R))
  return {name: power(leaf) for name, leaf in trees.flatten(tree).items()}


@pytest.mark.slow
def test_every_kind_of_parameter_follows_the_table():
  cfg = small.model_config(**MODEL)
  growth, tree = growth_of(cfg), ones(cfg)
  muon = lambda parameter: optim.matrix(parameter) is not None
  scaled = [
    transfer.initial(tree, growth),
    transfer.scaled(tree, growth, muon=lambda _: False),
    transfer.scaled(tree, growth, muon=muon),
  ]
  for column, result in enumerate(map(powers, scaled)):
    expected = {name: row[column] for name, row in TABLE.items()}
    assert result == pytest.approx(expected, abs=1e-6), column


@pytest.mark.parametrize(
  ('gate', 'expected'),
  [
    (dict(granularity='headwise'), BY_ADAM),
    (dict(source='parameter'), VECTOR),
    (dict(position='out'), HIDDEN),
    (dict(position='value', source='value'), VECTOR),
    (dict(inputs='first:3'), VECTOR),
    (dict(inputs='rank:3'), VECTOR),
  ],
)
def test_gates_of_each_shape_follow_the_table(gate, expected):
  changes = {f'attn__gate__{k}': v for k, v in (dict(position='sdpa') | gate).items()}
  cfg = small.model_config(width=BASE * R, **changes)
  growth, tree = growth_of(cfg), ones(cfg)
  initial, adam = (
    transfer.initial(tree, growth),
    transfer.scaled(tree, growth, muon=lambda _: False),
  )
  name, reduce = 'blocks.attn.gate.weight', 'blocks.attn.gate.reduce'
  assert powers(initial)[name] == pytest.approx(expected[0], abs=1e-6)
  assert powers(adam)[name] == pytest.approx(expected[1], abs=1e-6)
  # It is drawn with a std of 1 / sqrt(width).
  assert powers(initial).get(reduce, 0) == pytest.approx(0, abs=1e-6)
  assert powers(adam).get(reduce, -1) == pytest.approx(-1, abs=1e-6)


def test_at_the_base_width_nothing_changes():
  cfg = small.model_config(**MODEL | dict(width=BASE))
  tree, growth = small.filled(model.abstract(cfg)), growth_of(cfg)
  for result in (
    transfer.initial(tree, growth),
    transfer.scaled(tree, growth, muon=lambda _: True),
  ):
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, result, tree)
  assert transfer.initial(tree, None) is tree
  plain = transfer.growth(small.optim_config(), small.model_config(width=BASE * R))
  assert plain is None


def test_the_largest_changes_are_named_for_people():
  cfg = small.model_config(width=BASE * R)
  assert str(growth_of(cfg)) == 'rates of matrices / 4 (Muon / 2), logits / 4'
  assert str(growth_of(cfg, base_head_dim=2)).endswith('logits / 4, scores / 2')


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['rms', 'gated', 'pre_affine'])
@pytest.mark.parametrize('qk_norm', [True, False])
def test_folded_multipliers_scale_the_logits_and_the_scores(norm, qk_norm):
  """The output by 1 / R, the queries by sqrt(d0 / d), as runtime multipliers would."""
  cfg = small.model_config(width=BASE * R, norm=norm, attn__qk_norm=qk_norm)
  growth = growth_of(cfg, base_head_dim=2)  # head_dim is 8.
  params = small.filled(model.abstract(cfg))
  folded = transfer.initial(params, growth)
  unfolded = transfer.initial(params, transfer.Growth(growth.width, growth.head_dim, {}))
  x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, BASE * R)), jnp.float32)
  np.testing.assert_allclose(folded.norm(x_BTD), unfolded.norm(x_BTD) / R, rtol=1e-5)
  angle = small.angles(np.arange(3)[None], 8, 1e4)
  first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree.blocks).attn
  (q, k), (q0, k0) = (
    first(tree).query_and_key(x_BTD, angle) for tree in (folded, unfolded)
  )
  np.testing.assert_allclose(q, q0 / 2, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(k, k0)


def test_a_folded_multiplier_trains_as_one_that_is_applied():
  """Lemma J.1: s' = m s with the gradient g / m and the rate m stays m s under Adam."""
  m, rng = 1 / R, np.random.default_rng(0)
  growth = transfer.Growth(R, 1.0, {'norm.scale': m})
  knobs = small.optim_config(eps=0.0, clip=0.0, warmup=0)
  grads = [jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3)]

  def trained(growth, m):
    tx = optim.make(knobs, steps=9, multipliers={}, growth=growth)
    tree = lambda x: {'norm': {'scale': nnx.Param(x, axes=(None,))}}
    params = tree(jnp.full(5, m))
    state = tx.init(params)
    for grad in grads:
      update, state = tx.update(tree(grad / m), state, params)
      params = jax.tree.map(jnp.add, params, update)
    return params['norm']['scale'][...]

  np.testing.assert_allclose(trained(growth, m), m * trained(None, 1.0), rtol=1e-5)


@pytest.mark.parametrize('name', ['adamw', pytest.param('muon', marks=pytest.mark.slow)])
def test_rates_are_multiplied_but_not_the_decay(name, monkeypatch):
  """With lr * weight_decay as it is at the base width (mup.MuAdamW's convention)."""
  growth, make = transfer.Growth(R, 1.0, {}), optim.make
  plain = layered_updates(1, name=name, weight_decay=0.0)[0]
  decayed = layered_updates(1, name=name, weight_decay=0.1)[0]
  monkeypatch.setattr(optim, 'make', lambda *args, **kw: make(*args, growth=growth, **kw))
  scaled = layered_updates(1, name=name, weight_decay=0.1)[0]
  hidden = R**-0.5 if name == 'muon' else 1 / R
  rates = {'router.weight': 1 / R, 'query.bias': 1.0, 'norm.scale': 1.0}
  assert {*rates} < {*trees.flatten(layered(0))}
  for leaf, update in plain.items():
    expected = rates.get(leaf, hidden) * update + (decayed[leaf] - update)
    np.testing.assert_allclose(scaled[leaf], expected, rtol=1e-4, atol=1e-7, err_msg=leaf)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(transfer='ump'), r"config\.optim\.transfer='ump'.*'none', 'mup'"),
    (dict(base_width=0), r'config\.optim\.base_width=0'),
    (dict(base_head_dim=-1), r'config\.optim\.base_head_dim=-1'),
    (
      dict(base_head_dim=4, form='add', position='query', place='after'),
      r"base_head_dim other than 8 with .*gate\.form='add' on q.*base_head_dim=0",
    ),
    (dict(base_head_dim=4, source='value', position='value'), "gate.source='value'"),
    (
      dict(value_scale='fixed'),
      r"transfer='mup' with .*attn\.value_scale='fixed': its constant .*='none'",
    ),
    (dict(norm='dyt'), r"config\.model\.norm='dyt'.*'rms', 'pre_affine', 'gated'"),
  ],
)
def test_a_bad_knob_or_combination_is_refused_by_name(changes, message):
  groups = dict.fromkeys(('transfer', 'base_width', 'base_head_dim'), 'optim')
  groups |= dict(norm='model', value_scale='model__attn')
  group = lambda key: groups.get(key, 'model__attn__gate')
  knobs = {f'{group(key)}__{key}': value for key, value in changes.items()}
  with pytest.raises(ValueError, match=message):
    small.whole(**dict(optim__transfer='mup') | knobs)


def args_of(**changes):
  defaults = vars(check.parser().parse_args([]))
  return argparse.Namespace(**defaults | changes)


@pytest.mark.full
def test_activations_are_flat_in_the_width_with_mup_and_only_with_it():
  args = args_of(widths=[64, 256])
  plain, mup = (check.measure(mup, args) for mup in ('none', 'mup'))
  assert check.flat(mup, args.widths), check.exponents(mup, args.widths)
  assert not check.flat(plain, args.widths)
  grown = check.exponents(plain, args.widths)
  assert all(
    grown[name][-1] > 0.4 for name in ('attention', 'FFN', 'stream', 'gate logits')
  ), grown
