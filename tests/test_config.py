"""The door refuses what is mistyped, missing or of the wrong type, and names the knob."""

import dataclasses
import math

import pytest
import small

from configs import base
from gated import config, model, plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  size: int
  rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class House:
  name: str
  lit: bool
  sizes: tuple[int, ...]
  room: Room


def house(**changes) -> dict:
  return dict(name='h', lit=True, sizes=[1, 2], room=dict(size=3, rate=0.5)) | changes


def test_a_mapping_becomes_nested_frozen_dataclasses():
  built = config.build(House, house(), 'config')
  assert built == House(name='h', lit=True, sizes=(1, 2), room=Room(size=3, rate=0.5))
  with pytest.raises(dataclasses.FrozenInstanceError):
    built.room.size = 4


def test_a_whole_number_is_taken_for_a_float():
  built = config.build(House, house(room=dict(size=3, rate=1)), 'config')
  assert type(built.room.rate) is float


@pytest.mark.parametrize(
  ('changes', 'knob', 'message'),
  [
    (dict(name=3), 'config.name=3', 'str'),
    (dict(lit=1), 'config.lit=1', 'bool'),
    (dict(sizes=4), 'config.sizes=4', 'tuple'),
    (dict(sizes='12'), "config.sizes='12'", 'tuple'),
    (dict(sizes=[1, 'b']), "config.sizes[1]='b'", 'int'),
    (dict(room=3), 'config.room=3', 'group of knobs'),
    (dict(room=dict(size=True, rate=0.5)), 'config.room.size=True', 'int'),
    (dict(room=dict(size=3.0, rate=0.5)), 'config.room.size=3.0', 'int'),
    (dict(room=dict(size=None, rate=0.5)), 'config.room.size=None', 'int'),
    (dict(room=dict(size=3, rate='0.5')), "config.room.rate='0.5'", 'float'),
    (dict(room=dict(size=3, rate=True)), 'config.room.rate=True', 'float'),
    (dict(room=dict(size=3, rate=math.nan)), 'config.room.rate=nan', 'finite'),
    (dict(room=dict(size=3, rate=math.inf)), 'config.room.rate=inf', 'finite'),
    (dict(room=dict(size=3)), 'config.room.rate', 'missing'),
    (dict(room=dict(size=3, rate=0.5, sise=1)), 'config.room.sise', 'config.room.size?'),
    (dict(nam='h'), 'config.nam', 'did you mean config.name?'),
  ],
)
def test_a_bad_value_is_refused_by_the_knobs_full_name(changes, knob, message):
  with pytest.raises(ValueError) as error:
    config.build(House, house(**changes), 'config')
  assert str(error.value).startswith(knob)
  assert message in str(error.value)


def test_a_typo_deep_in_a_recipe_names_the_nearest_knob():
  c = small.recipe()
  c['model']['attn']['gate']['postion'] = 'sdpa'
  with pytest.raises(ValueError, match=r'mean config\.model\.attn\.gate\.position\?'):
    config.build(plan.Config, c, 'config')


def test_base_is_a_complete_recipe():
  built = small.whole()
  assert built.model == config.build(
    model.Config, small.recipe()['model'], 'config.model'
  )


def test_nearest_lists_all_known_names_if_none_is_near():
  assert config.nearest('zzzzz', ['alpha', 'beta']) == '; known are alpha, beta'


KNOBS = config.flatten(base.get_config().to_dict())


def test_every_alias_stands_for_a_knob_and_is_none_itself():
  assert set(config.ALIASES.values()) <= KNOBS.keys()
  assert not {knob.rpartition('.')[2] for knob in KNOBS} & config.ALIASES.keys()
  named = [name for names in config.USUAL.values() for name in names.split()]
  assert len(named) == len(set(named)) == len(config.ALIASES)


@pytest.mark.parametrize(
  ('typed', 'meant'),
  [
    ('config.optim.learning_rate', 'config.optim.lr'),
    ('config.learning-rate', 'config.optim.lr'),
    ('config.batch_size', 'config.batch'),
    ('config.model.num_layers', 'config.model.depth'),
    ('config.model.hidden_size', 'config.model.width'),
    ('config.model.n_heads', 'config.model.attn.heads'),
    ('config.data.seq_len', 'config.data.length'),
    ('config.max_steps', 'config.steps'),
    ('config.optim.warmup_steps', 'config.optim.warmup'),
    ('config.optim.grad_clip', 'config.optim.clip'),
    ('config.model.vocab_size', 'config.model.vocab'),
    # The right name in the wrong group, and a group.
    ('config.lr', 'config.optim.lr'),
    ('config.heads', 'config.model.attn.heads'),
    ('optim.lr', 'config.optim.lr'),
    ('config.gate', 'config.model.attn.gate'),
    # Typos.
    ('config.optim.lrr', 'config.optim.lr'),
    ('config.opt', 'config.optim'),
    ('config.model.atn.headz', 'config.model.attn.heads'),
  ],
)
def test_a_usual_name_or_a_wrong_group_suggests_our_knob(typed, meant):
  assert config.nearest(typed, KNOBS) == f'; did you mean {meant}?'


def test_an_unknown_knob_lists_its_group_or_the_group_above():
  of_mesh = 'choice, config.mesh.context, config.mesh.data, config.mesh.expert'
  known = config.nearest('config.mesh.zzzz', KNOBS)
  assert known.startswith(f'; known are config.mesh.{of_mesh}')
  assert config.nearest('config.zzzz.yyyy', KNOBS).startswith('; known are config.accum,')


def test_a_recipe_file_with_a_usual_name_is_told_ours():
  c = small.recipe()
  c['optim']['learning_rate'] = 1e-3
  with pytest.raises(
    ValueError, match=r'learning_rate is not a knob.*config\.optim\.lr\?'
  ):
    config.build(plan.Config, c, 'config')


def test_one_of_lists_the_allowed_values():
  config.one_of('config.a', 'x', ('x', 'y'))
  with pytest.raises(ValueError, match=r"config\.a='z', but allowed are 'x', 'y'"):
    config.one_of('config.a', 'z', ('x', 'y'))


@pytest.mark.parametrize('value', [0.9, math.nan])
def test_at_least_refuses_lower_values_and_nan(value):
  config.at_least('config.a', 1, 1)
  with pytest.raises(ValueError, match=r'config\.a=.* at least 1'):
    config.at_least('config.a', value, 1)


def test_within_refuses_lower_and_higher_values():
  config.within('config.a', 1, 1, 2)
  config.within('config.a', 2, 1, 2)
  with pytest.raises(ValueError, match=r'config\.a=0, but it must be at least 1'):
    config.within('config.a', 0, 1, 2)
  with pytest.raises(ValueError, match=r'config\.a=3, but 2 is the most'):
    config.within('config.a', 3, 1, 2)


def test_nests_counts_the_deepest_way_down():
  for value, depth in ((1, 0), ([], 1), ({'a': 1, 'b': [2, {'c': 3}]}, 3)):
    assert not config.nests(value, depth)
    assert depth == 0 or config.nests(value, depth - 1)


@pytest.mark.parametrize('divisor', [4, 0, -3])
def test_divides_names_both_knobs(divisor):
  config.divides('config.a', 6, 'config.b', 3)
  with pytest.raises(ValueError, match=rf'config\.a=6 .* config\.b={divisor}'):
    config.divides('config.a', 6, 'config.b', divisor)


def test_differences_use_full_names_and_treat_lists_as_tuples():
  old = dict(a=1, b=dict(c=(1, 2), d='x', gone=None))
  new = dict(a=1, b=dict(c=[1, 2], d='y', come=0))
  assert config.differences(old, new) == {
    'config.b.d': ('x', 'y'),
    'config.b.gone': (None, None),
    'config.b.come': (None, 0),
  }
  assert config.differences(old, old) == {}


def test_a_knob_that_was_added_later_leaves_old_recipes_as_they_are(monkeypatch):
  monkeypatch.setitem(config.SINCE, 'config.optim.b2', [0.95])
  old, new = ({'optim': dict(b1=0.9)} for _ in range(2))
  new['optim']['b2'] = (0.95,)
  assert config.differences(old, new) == config.differences(new, old) == {}
  assert config.earlier(new) == old
  new['optim']['b2'] = 0.9
  assert config.differences(old, new) == {'config.optim.b2': ([0.95], 0.9)}
  assert config.earlier(new) == new
  monkeypatch.setitem(config.SINCE, 'config.seed', 7)
  recipe = {k: v for k, v in small.recipe().items() if k != 'seed'}
  assert config.build(plan.Config, recipe, 'config').seed == 7
  assert plan.recipe.digest(recipe | {'seed': 7}) == plan.recipe.digest(recipe)


def test_digest_depends_on_values_and_not_on_order():
  known = '43258cff783fe7036d8a43033f830adfc60ec037382473548ac742b888292777'
  assert config.digest({'b': 2, 'a': 1}) == config.digest({'a': 1, 'b': 2}) == known
  assert config.digest({'a': 1, 'b': 3}) != known
  assert config.digest(small.recipe()) == config.digest(small.recipe())
  assert config.digest(small.recipe(seed=1)) != config.digest(small.recipe())


def test_a_knob_that_an_old_recipe_lacks_is_read_as_it_was_then():
  assert config.dig({'model': {}}, 'model.numerics.matmul') == 'compute'
  now = {'model': {'numerics': {'matmul': 'fp8'}}}
  assert config.dig(now, 'model.numerics.matmul') == 'fp8'
  with pytest.raises(ValueError, match=r'model\.width is missing'):
    config.dig({'model': {}}, 'model.width')
