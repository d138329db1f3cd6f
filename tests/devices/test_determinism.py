"""The settings of --deterministic, its errors, and sums in a fixed order."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gated import kernels, storage
from gated.devices import determinism, mesh
from gated.model import moe
from gated.plan import Plan
from gated.run import metrics, workdir
from gated.train import step

SWITCH = '--xla_gpu_exclude_nondeterministic_ops'


def test_flags_are_added_to_existing_ones():
  environ = {'XLA_FLAGS': ' --xla_dump_to=/d --xla_gpu_enable_triton_gemm=true', 'A': 'b'}
  determinism.enable(environ)
  words = environ.pop('XLA_FLAGS').split()
  assert words[:2] == ['--xla_dump_to=/d', '--xla_gpu_enable_triton_gemm=true']
  assert set(words[2:]) == {
    f'{SWITCH}=true',
    '--xla_gpu_deterministic_ops=true',
    '--xla_gpu_autotune_level=0',
  }
  rings = {'NCCL_NVLS_ENABLE': '0', 'NCCL_ALGO': 'Ring', 'NCCL_PROTO': 'Simple'}
  assert environ == {'A': 'b'} | rings


def test_allowed_values_are_kept_and_a_second_call_changes_nothing():
  environ = {'XLA_FLAGS': f'{SWITCH} --xla_gpu_autotune_level=0', 'NCCL_PROTO': 'll128'}
  determinism.enable(environ)
  once = dict(environ)
  determinism.enable(environ)
  assert environ == once
  assert once['NCCL_PROTO'] == 'll128'
  assert once['XLA_FLAGS'].startswith(f'{SWITCH} --xla_gpu_autotune_level=0 --xla_gpu_de')


@pytest.mark.parametrize(
  ('environ', 'message'),
  [
    (
      {'XLA_FLAGS': f'{SWITCH}=false'},
      "--xla_gpu_exclude_nondeterministic_ops='false'.*needs 'true' or '1'.*XLA_FLAGS",
    ),
    (
      {'XLA_FLAGS': '--xla_gpu_autotune_level=0 --xla_gpu_autotune_level=4'},
      "--xla_gpu_autotune_level='4', but --deterministic needs '0'",
    ),
    ({'XLA_FLAGS': '/etc/flags'}, 'names a file'),
    ({'NCCL_ALGO': 'Tree'}, "NCCL_ALGO='Tree'.*needs 'Ring'.*environment"),
    ({'NCCL_NVLS_ENABLE': '2'}, "NCCL_NVLS_ENABLE='2'"),
  ],
)
def test_a_conflicting_value_is_an_error_and_nothing_is_set(environ, message):
  before = dict(environ)
  with pytest.raises(ValueError, match=message):
    determinism.enable(environ)
  assert environ == before


def test_it_is_enabled_by_the_flag():
  enabled = lambda flags: determinism.enabled({'XLA_FLAGS': flags})
  assert enabled(SWITCH) and enabled(f'--a=b {SWITCH}=1') and enabled(f'{SWITCH}=True')
  assert not enabled('') and not enabled(f'{SWITCH}=false') and not enabled('/etc/flags')
  assert not determinism.enabled({})
  environ = {}
  determinism.enable(environ)
  assert determinism.enabled(environ)


def test_it_applies_to_gpus_only(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', f'{SWITCH}=true')
  assert determinism.applies('gpu')
  assert not determinism.applies('cpu') and not determinism.applies('tpu')
  monkeypatch.setenv('XLA_FLAGS', '')
  assert not determinism.applies('gpu')


def test_rows_are_added_as_a_scatter_adds_them():
  rng = np.random.default_rng(0)
  table, value = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (7, 13))
  # Row 2 has no value, most have several, and the table lacks rows 7 and 9.
  row = jnp.asarray(rng.choice([0, 1, 3, 6, 7, 9], 13), jnp.int32)
  sums = jax.jit(determinism.add_rows)(table, row, value)
  expected = np.array(table, np.float64)
  for r, v in zip(np.asarray(row), np.asarray(value, np.float64)):
    if r < 7:
      expected[r] += v
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(sums[2], table[2])


def test_a_router_gives_the_same_weights_and_gradients_in_order(monkeypatch):
  cfg = small.model_config(moe__experts=5, moe__top_k=2).moe
  logit = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
  share = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2)), jnp.float32)
  run = lambda: jax.jit(
    jax.value_and_grad(lambda x: jnp.sum(share * moe.route(x, cfg)[0]))
  )(logit)
  picked = run()
  monkeypatch.setattr(determinism, 'applies', lambda platform: True)
  for ours, theirs in zip(run(), picked):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_session_records_it_and_the_next_one_reports_the_change(tmp_path, monkeypatch):
  c, data = small.recipe(), {'sha256': 'd' * 64}
  home = storage.path(tmp_path / 'run')
  opts = dict(like={}, allowed=(), restore_step='')
  monkeypatch.setenv('XLA_FLAGS', f'{SWITCH}=true')
  metrics.manifest(home / 'run.json', config=c, data=data, restored=None, changed={})
  (session,) = json.loads((home / 'run.json').read_text())['sessions']
  assert session['deterministic'] is True
  assert workdir.check(home, c, data, **opts).changed == {}
  monkeypatch.setenv('XLA_FLAGS', '')
  owner = workdir.check(home, c, data, **opts)
  assert owner.changed == {'--deterministic': (True, False)}


@pytest.mark.full
def test_a_run_accepts_the_flag_and_rejects_conflicting_flags(run_python):
  command = ['train.py', '--config=configs/tiny.py', '--dry_run', '--deterministic']
  done = run_python([*command, '--config.steps=2'])
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'CPUs and TPUs are not affected' in done.stderr
  done = run_python(command, env={'XLA_FLAGS': '--xla_gpu_autotune_level=3'})
  assert done.returncode == 2
  assert "--xla_gpu_autotune_level='3', but --deterministic needs '0'" in done.stderr


@pytest.mark.full
def test_a_step_for_gpus_adds_no_floats_by_a_scatter(monkeypatch):
  """Lowered for GPUs, which need not be here; without the flag it does so."""
  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  gate = dict(model__attn__gate__position='sdpa', model__attn__backend='reference')
  experts = dict(model__moe__experts=4, model__moe__top_k=2)
  cfg = small.whole(**gate, **experts, model__numerics__compute='bfloat16')
  plan = Plan(cfg, jax.devices()[:1])
  batch = jax.tree.map(jnp.asarray, small.batch(8, cfg.data.length))

  def sums():
    """The shapes of floats that values are added to where indices may be the same."""
    opts = dict(tx=plan.tx, schedule=plan.schedule, loss=cfg.loss, accum=1)
    run = jax.jit(functools.partial(step.train, **opts)).trace(plan.state, batch)
    text = run.lower(lowering_platforms=('cuda',)).as_text()
    for scatter in text.split('"stablehlo.scatter"')[1:]:
      shapes = re.search(r'\}\) : \(tensor<(\w+)>', scatter)
      head = scatter[: shapes.start()]
      adds = 'stablehlo.add' in head and 'unique_indices = false' in head
      if adds and not shapes[1].endswith('i32'):
        yield shapes[1]

  # The embedding; the router's probabilities; weights of experts.
  assert set(sums()) >= {'40x16xf32', '8x16x4xf32', '4x16x24xf32'}
  monkeypatch.setenv('XLA_FLAGS', f'{SWITCH}=true')
  jax.clear_caches()
  assert list(sums()) == []


@pytest.mark.accelerator
def test_packed_attention_in_order_is_the_reference(monkeypatch):
  if jax.default_backend() != 'gpu':
    pytest.skip('on GPUs alone')
  monkeypatch.setenv('XLA_FLAGS', f'{SWITCH}=true')
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(2, 128, heads, 64)), jnp.bfloat16)
  q, k, v, share = draw(4), draw(2), draw(2), draw(4).astype(jnp.float32)
  segment = jnp.asarray(np.sort(rng.integers(1, 4, (2, 128)), 1), jnp.int32)

  def run(backend):
    opts = dict(backend=backend, max_segments=4)
    total = lambda *qkv: jnp.sum(share * kernels.attend(*qkv, segment, **opts))
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

  for ours, theirs in zip(run('cudnn'), run('reference')):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)
