"""Early warnings are what a plain computation finds, anywhere, and move no loss."""

import json
import math

import jax
import numpy as np
import pytest
import small
from faults import evidence, process

from gated import kernels, model
from gated.devices import mesh, trees
from gated.kernels.attention import largest
from gated.model import layers
from gated.plan import Plan
from gated.probes import indicators
from gated.run import metrics

LENGTH = 16
BATCH = small.batch(8, LENGTH)
NAMES = {'attention_logit', 'attention_layer', 'output_logit'}
NAMES |= {'residual_rms_first', 'residual_rms_last', 'residual_growth'}


def measured(net, batch=BATCH, micro=8):
  measure = jax.jit(lambda net, batch: indicators.measure(net, batch, micro=micro))
  return {name: x.item() for name, x in measure(net, batch).items()}


def by_hand(net, batch=BATCH):
  """In float64, from the queries and keys that the kernel is given and each layer's x."""

  @jax.jit
  def run(net, batch):
    given, attend, attend_lse = [], kernels.attend, kernels.attend_lse

    def spy(kernel):
      def spied(q, k, *args, **opts):
        given.append((q, k))
        return kernel(q, k, *args, **opts)

      return spied

    cfg = net.cfg
    documents = batch.segments, batch.positions
    if not cfg.mask_documents:
      documents = None, np.broadcast_to(np.arange(LENGTH), batch.tokens.shape)
    frequency = layers.rope_frequencies(
      cfg.attn.head_dim, cfg.attn.rope_base, cfg.attn.yarn
    )
    angles = layers.rope_angles(jax.numpy.asarray(documents[1]), frequency)
    residual = [net.embed(batch.tokens)]
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(kernels, 'attend', spy(attend))
      patch.setattr(kernels, 'attend_lse', spy(attend_lse))
      for block in model.unstack(net.blocks, cfg.depth):
        live = jax.numpy.asarray(batch.segments > 0)
        residual.append(block(residual[-1], angles, documents[0], live)[0])
    return given, residual, net.norm(residual[-1]), net.unembedding()

  given, residual, x_BTD, w_VD = jax.tree.map(
    lambda x: np.asarray(x, np.float64), run(net, batch)
  )
  live_BT = batch.segments > 0
  mask = np.tril(np.ones((LENGTH, LENGTH), bool)) & live_BT[:, :, None]
  if net.cfg.mask_documents:
    mask &= batch.segments[:, :, None] == batch.segments[:, None]
  repeat = net.cfg.attn.heads // net.cfg.attn.kv_heads
  tops = []
  for q, k in given:
    score = np.einsum('bthk,bshk->bhts', q, np.repeat(k, repeat, 2)) / q.shape[-1] ** 0.5
    tops.append(np.abs(score)[np.broadcast_to(mask[:, None], score.shape)].max())
  rms = lambda x: np.sqrt(np.mean(np.square(x[live_BT])))
  first, last = rms(residual[0]), rms(residual[-1])
  return {
    'attention_logit': max(tops),
    'attention_layer': int(np.argmax(tops)),
    'output_logit': rms(x_BTD @ w_VD.T),
    'residual_rms_first': first,
    'residual_rms_last': last,
    'residual_growth': last / first,
  }


def agree(actual, expected):
  assert actual.keys() == expected.keys() == NAMES
  for name in NAMES:
    np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, err_msg=name)


YARN = dict(attn__yarn__factor=4.0, attn__yarn__original=8)
EXPERTS = dict(moe__experts=4, moe__top_k=2, ffn=16)
SWITCH = dict(where='key_value', experts=3, top_k=2)
MODELS = {
  'plain': dict(),
  'gate, YaRN, caps, norms': dict(
    attn__gate__position='query',
    attn__gate__place='after',
    attn__logit_cap=0.5,
    logit_cap=0.5,
    norm='gated',
    branch_norm='rms',
    branch_clip=0.5,
    **YARN,
  ),
  'sinks, remat, one document': dict(
    attn__normalizer='sink_logit',
    attn__sink_tokens=2,
    remat='full',
    mask_documents=False,
    tied=False,
  ),
  'sigmoid, unrolled': dict(attn__normalizer='sigmoid', layers='unroll', remat='dots'),
  'softpick, no QK-norm': dict(attn__normalizer='softpick', attn__qk_norm=False),
  'experts': dict(attn__gate__position='sdpa', **EXPERTS),
  'switch': {f'attn__switch__{k}': v for k, v in SWITCH.items()},
}


@pytest.mark.full
@pytest.mark.parametrize('name', MODELS)
def test_indicators_are_those_of_a_plain_computation(name):
  net = small.model_of(**MODELS[name])
  agree(measured(net), by_hand(net))


def test_rows_are_read_evenly_apart_eight_at_least_and_one_on_each_device():
  assert [indicators._rows(micro, 1) for micro in (1, 3, 8, 12, 64)] == [1, 3, 8, 12, 8]
  assert [indicators._rows(32, ways) for ways in (2, 8, 16, 32)] == [8, 8, 16, 32]
  assert indicators._rows(24, 3) == 12  # Of 9 and 12, those that divide the batch.


@pytest.mark.full
def test_of_a_large_batch_some_rows_stand_for_all():
  net, whole = small.model_of(), small.batch(32, LENGTH)
  some = type(whole)(*(x[::4] for x in whole))
  assert measured(net, whole, micro=16) == measured(net, some)


@pytest.mark.full
def test_scores_are_made_block_by_block(monkeypatch):
  """Of 64 tokens never more scores than are allowed, and the same largest one."""
  net, batch = small.model_of(vocab=8, width=8, ffn=8), small.batch(8, 64, vocab=8)
  expected = measured(net, batch)
  monkeypatch.setattr(largest, 'PAIRS', 256)
  run = jax.jit(
    lambda net, batch: kernels.largest_scores(
      *net_scores(net, batch), batch.segments, batch.segments > 0
    )
  )
  heads = net.cfg.attn.heads
  assert small.largest_array(run.lower(net, batch).compile()) <= 8 * heads * 64 * 8
  agree(measured(net, batch), expected)


def net_scores(net, batch):
  cfg = net.cfg.attn
  frequency = layers.rope_frequencies(cfg.head_dim, cfg.rope_base, cfg.yarn)
  angles = layers.rope_angles(jax.numpy.asarray(batch.positions), frequency)
  (block, *_) = model.unstack(net.blocks, net.cfg.depth)
  return block.attn.query_and_key(block.attn_norm(net.embed(batch.tokens)), angles)


def on_devices(net, batch=BATCH, *, accum=1, **sizes):
  """A model's indicators on a mesh, by the plan of a run."""
  on = small.mesh_of(**sizes)
  rows, changes = len(batch.tokens), {f'mesh__{k}': n for k, n in sizes.items()}
  changes |= dict(mesh__fsdp=sizes.get('fsdp', 1), batch=rows, accum=accum)
  cfg = small.whole(log__indicators=3, **changes)
  plan = Plan(cfg, on.devices.flatten())
  placed = jax.device_put(net, mesh.shardings(net, plan.mesh))
  watched = plan.watch()(3, placed, mesh.place(batch, plan.mesh, rows))
  values, read = watched['indicators']
  return read(values)


MESHES = [
  pytest.param(dict(fsdp=2, tensor=2, context=2), id='rows, heads and tokens'),
  pytest.param(dict(fsdp=8), marks=pytest.mark.full, id='rows alone'),
  pytest.param(dict(data=2, context=4), marks=pytest.mark.full, id='tokens'),
  pytest.param(dict(fsdp=2, tensor=2, accum=2), marks=pytest.mark.full, id='accum'),
]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES)
def test_eight_devices_see_what_a_plain_computation_does(sizes):
  # Of a vocabulary that they split unevenly.
  net, batch = small.model_of(vocab=42), small.batch(16, LENGTH)
  some = type(batch)(*(x[::2] for x in batch))
  agree(on_devices(net, batch, **sizes), by_hand(net, some))


@pytest.mark.full
def test_experts_on_devices_see_what_one_sees():
  net = small.model_of(**EXPERTS)
  on = small.mesh_of(data=2, expert=2, context=2)
  with jax.set_mesh(on):
    placed = jax.device_put(net, mesh.shardings(net, on))
    agree(measured(placed, mesh.place(BATCH, on, 8)), measured(net))


@pytest.mark.full
def test_a_nan_on_one_device_is_told():
  """A token that stands in one row alone, so that other rows have numbers."""
  net = small.model_of(vocab=42, tied=False)
  batch = BATCH._replace(tokens=BATCH.tokens.copy())
  batch.tokens[5, 0] = 41
  leaves = trees.flatten(net)
  leaves['embed.table'] = leaves['embed.table'].at[41].set(math.nan)
  net = trees.unflatten(net, leaves)
  for values in (measured(net, batch), on_devices(net, batch, fsdp=8)):
    assert all(math.isnan(values[name]) for name in NAMES - {'attention_layer'})
    assert values['attention_layer'] == 0


def test_they_are_due_at_the_first_step_and_at_multiples(monkeypatch):
  """And off they are absent: nothing is traced, whatever the step."""
  traced = []
  monkeypatch.setattr(indicators, 'measure', lambda *_, micro: traced.append(micro) or {})
  on = small.mesh_of().devices.flatten()
  plan = Plan(small.whole(mesh__fsdp=1), on)
  assert [plan.watch()(step, (), ()) for step in range(1, 9)] == [{}] * 8
  assert not traced
  plan = Plan(small.whole(mesh__fsdp=1, log__indicators=3, accum=2), on)
  due = plan.watch()
  assert [step for step in range(1, 9) if due(step, (), ())] == [1, 3, 6]
  assert traced == [4]


@pytest.mark.parametrize('kind', ['indicators', 'probes'])
def test_a_negative_cadence_is_refused_by_its_knob(kind):
  with pytest.raises(ValueError, match=rf'config\.log\.{kind}=-1'):
    small.whole(**{f'log__{kind}': -1})


KNOBS = {
  'model.depth': 2,
  'steps': 4,
  'eval.every': 3,
  'eval.rows': 8,
  'mesh.fsdp': 2,
  'log.tensorboard': False,
}
RECIPE = 'configs/dense_1b7.py:28l,gate=elementwise,scale=test'


def command(workdir, **knobs):
  knobs = KNOBS | {name.replace('__', '.'): value for name, value in knobs.items()}
  flags = [f'--config.{name}={value}' for name, value in knobs.items()]
  return ['train.py', f'--config={RECIPE}', f'--workdir={workdir}', *flags]


BOTH = dict(log__indicators=2, log__probes=2)


def logged(workdir, kind='indicators'):
  """Step -> its scalars."""
  records = metrics.read(workdir / 'metrics.jsonl')
  fixed = {'step', 'kind', 'time'}
  return {
    r['step']: {name: value for name, value in r.items() if name not in fixed}
    for r in records
    if r['kind'] == kind
  }


@pytest.mark.full
def test_a_run_with_them_has_the_losses_of_one_without(
  tmp_path, run_python, spawn_python
):
  """To the last bit; and two processes tell the same as one."""
  off, on, two = (tmp_path / name for name in ('off', 'on', 'two'))
  for workdir, knobs in ((off, {}), (on, BOTH | dict(log__tensorboard=True))):
    done = run_python(command(workdir, **knobs), devices=2)
    assert done.returncode == 0, done.stderr[-4000:]
  args = [*command(two, **BOTH), '--processes=2']
  args.append(f'--coordinator=127.0.0.1:{process.free_port()}')
  children = [spawn_python([*args, f'--process={i}'], devices=1) for i in range(2)]
  for child in children:
    child.wait(300).expect(0)
  assert evidence.losses(on) == evidence.losses(off)
  assert evidence.losses(on, 'heldout') == evidence.losses(off, 'heldout')
  assert evidence.digest(on, 4) == evidence.digest(off, 4)
  assert logged(off) == {} and list(logged(on)) == list(logged(two)) == [1, 2, 4]
  for step, values in logged(on).items():
    agree(logged(two)[step], values)
  one, other = logged(on, 'probes'), logged(two, 'probes')
  assert list(one) == list(other) == [1, 2, 4]
  assert {'m_act', 'gate_mean', 'first_token_attention'} < one[4].keys()
  for step, values in one.items():
    for name, value in values.items():
      np.testing.assert_allclose(other[step][name], value, rtol=2e-5, err_msg=name)
  assert any(on.glob('tensorboard/*')) and json.loads((on / 'run.json').read_text())
