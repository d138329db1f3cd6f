"""Packed rows as ragged sequences of cuDNN: tables by hand, the call as JAX makes it."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated import kernels
from gated.kernels.attention import cudnn

B, T, H, G, K, ROOM = 3, 24, 4, 2, 8, 6
SEGMENTS = np.array(
  [[1] * 10 + [2] * 9 + [0] * 5, [1] * 24, [1, 1, 1, 2, 3, 3, 3, 4, *[5] * 15, 0]],
  np.int32,
)


def runs_by_hand(rows):
  """(first token, size) of each run, tokens numbered through all rows."""
  runs, at = [], 0
  for row in rows:
    for _, group in itertools.groupby(row):
      size = len(list(group))
      runs.append((at, size))
      at += size
  return runs


def random_rows():
  rng = np.random.default_rng(0)
  rows = np.cumsum(rng.random((50, 24)) < 0.25, 1).astype(np.int32)
  rows[::3, 18:] = 0  # Padding at the end; some rows begin with 0, too.
  return rows


@pytest.mark.slow
@pytest.mark.parametrize('rows', [SEGMENTS, random_rows()], ids=['few', 'random'])
@pytest.mark.parametrize('spare', [0, 1, 40])
def test_the_sequences_are_the_runs_of_equal_ids(rows, spare):
  expected = runs_by_hand(rows.tolist())
  find = jax.jit(cudnn.sequences, static_argnums=1)
  starts, sizes = find(rows, len(expected) + spare)
  assert starts.dtype == sizes.dtype == np.int32
  assert [*zip(starts.tolist(), sizes.tolist())] == expected + [(rows.size, 0)] * spare


@pytest.mark.slow
def test_numbers_by_token_are_those_by_sequence():
  x_BTH = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, H)), jnp.float32)
  starts, _ = cudnn.sequences(jnp.asarray(SEGMENTS), B * ROOM)
  x_NHT = np.asarray(cudnn.by_sequence(x_BTH, starts))
  flat = np.asarray(x_BTH).reshape(-1, H)
  for number, (start, size) in enumerate(runs_by_hand(SEGMENTS.tolist())):
    np.testing.assert_array_equal(x_NHT[number, :, :size].T, flat[start : start + size])
  back = cudnn.by_token(jnp.asarray(x_NHT), jnp.asarray(SEGMENTS), starts)
  np.testing.assert_array_equal(back, x_BTH)


@pytest.mark.parametrize(
  ('rows', 'mean', 'most', 'room'),
  [
    (64, 2.5, 14, 4),  # 2.5 (1 + 4 / 8) = 3.75
    (4, 2.5, 14, 8),  # 2.5 (1 + 4 / 2) = 7.5
    (64, 2.5, 3, 3),  # No row has more.
    (64, 1.0, 9, 2),  # XLA takes fewer than two as whole rows.
    (64, 0.0, 14, 14),  # Unknown.
  ],
)
def test_the_room_is_for_a_usual_batch(rows, mean, most, room):
  assert cudnn.usual_room(rows, mean, most, cudnn.SAVED) == room


def test_there_is_room_for_all_documents_unless_that_takes_much_memory():
  each = 1024 * 8 * cudnn.bytes_of(64, 2)  # A row of experiments/sink, in bfloat16.
  assert each == 1024 * 8 * (64 * (4 + 2 + 2) + 4)
  assert cudnn.usual_room(32, 1.4, 6, each) == 6
  assert cudnn.usual_room(128, 1.4, 8, each) == 2


def drawn():
  rng = np.random.default_rng(1)
  shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def stand_in(name, arrays, likes, others, qkv, start_N, size_N, window):
  """cuDNN's call by the reference, row by row of its sequences; no more than fit."""
  del likes, others
  q, k, v = (x.reshape(-1, *x.shape[2:]) for x in qkv)
  B, T, H, _ = qkv[0].shape
  ids = jnp.searchsorted(start_N, jnp.arange(B * T), side='right')
  assert len(start_N) % B == 0 and len(start_N) == len(size_N)

  def attend(q, k, v):
    opts = dict(backend='reference', max_segments=2, window=window)
    return kernels.attend_lse(q[None], k[None], v[None], ids[None], **opts)

  with jax.disable_jit(False):  # One program compiles faster than its operations.
    (y, lse), back = jax.vjp(jax.jit(attend), q, k, v)
  if name == '__cudnn$fmhaSoftmax':
    lse_NHT = cudnn.by_sequence(lse.reshape(B, T, H), start_N)
    return [y.reshape(B, T, H, -1), lse_NHT]
  _, _, _, lse_NHT, dy, y_given = arrays
  np.testing.assert_allclose(y_given.reshape(y.shape), y, atol=1e-5)
  given = cudnn.by_token(lse_NHT, jnp.sort(ids).reshape(B, T), start_N)
  np.testing.assert_allclose(given.reshape(lse.shape), lse, atol=1e-5)
  with jax.disable_jit(False):
    grads = back((dy.reshape(y.shape), jnp.zeros_like(lse)))
  return [g.reshape(x.shape) for g, x in zip(grads, qkv)]


@pytest.mark.slow
@pytest.mark.parametrize(
  'rooms',
  [
    pytest.param((6, 6), id='most', marks=pytest.mark.full),
    pytest.param((4, 6), id='fits'),
    pytest.param((3, 6), id='full', marks=pytest.mark.full),
  ],
)
def test_a_batch_with_more_documents_than_room_is_computed_row_by_row(rooms, monkeypatch):
  """Ten documents: there is room for 18, 12 and 9."""
  q, k, v, dy = drawn()
  calls = []

  def call(*args):
    calls.append(args[5].shape[0])
    return stand_in(*args)

  monkeypatch.setattr(cudnn, '_call', call)

  def run(attend):
    y, back = jax.vjp(attend, q, k, v)
    return y, *back(dy)

  segments = jnp.asarray(SEGMENTS)
  # Without jit, so that the stand-in sees numbers.
  with jax.disable_jit():
    got = run(lambda *qkv: cudnn._ragged(*qkv, segments, rooms, 0)[0])
  opts = dict(backend='reference', max_segments=6)
  expected = run(jax.jit(lambda *qkv: kernels.attend(*qkv, segments, **opts)))
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, atol=1e-5)
  alone = rooms == (3, 6)
  assert calls == ([6] * B * 2 if alone else [B * rooms[0]] * 2)


@pytest.mark.accelerator
@pytest.mark.parametrize('mean', [0.0, 2.0, 0.5], ids=['most', 'fits', 'full'])
def test_on_a_gpu_the_results_do_not_depend_on_the_room(mean, monkeypatch):
  monkeypatch.setattr(cudnn, 'SAVED', 0)
  q, k, v, dy = (x.astype(jnp.bfloat16) for x in drawn())
  segments = jnp.asarray(SEGMENTS)

  def run(backend, **options):
    attend = functools.partial(
      kernels.attend_lse, backend=backend, max_segments=6, **options
    )
    total = lambda *qkv: sum(
      (x.astype(jnp.float32) * w).sum()
      for x, w in zip(attend(*qkv, segments), (dy, dy[..., 0]))
    )
    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

  (a, da), (b, db) = run('cudnn', mean_segments=mean), run('reference')
  np.testing.assert_allclose(a, b, rtol=0.05, atol=0.5)
  for x, y in zip(da, db):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, atol=0.06 * np.abs(y).max())


def lowered(f, *args):
  """The calls of cuDNN in a program's gradient for GPUs -> (text, its options)."""
  gradient = lambda q, k, v, *rest: jax.grad(
    lambda *qkv: f(*qkv, *rest).astype(jnp.float32).sum(), (0, 1, 2)
  )(q, k, v)
  module = jax.jit(gradient).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
  for line in module.splitlines():
    if '__cudnn' in line:
      options = re.search(r'backend_config = "(.*?)"[,}]', line)
      assert options
      text = re.sub(r'%\w+(#\d+)?(:\d+)?', '%', line.replace(options[1], '').strip())
      # These fields have the values that a missing field has.
      plain = json.loads(options[1].replace('\\22', '"'))['cudnn_fmha_backend_config']
      shape = plain['intermediate_tensor_shape']
      shape['layout'] = shape['layout']['minor_to_major']
      shape.pop('tuple_shapes', None)
      yield text, plain


@pytest.fixture
def hopper(monkeypatch):
  """JAX lowers its attention as on a GPU with cuDNN 9.19 -> its module."""
  from jax._src.cudnn import fused_attention_stablehlo as theirs

  monkeypatch.setattr(theirs, 'check_cudnn_version', lambda: 91900)
  monkeypatch.setattr(theirs, 'check_compute_capability', lambda *_: True)
  monkeypatch.setattr(theirs, 'is_cuda_compute_capability_equal', lambda *_: True)
  return theirs


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_gradients_say_if_they_are_deterministic(
  masked, deterministic, hopper, monkeypatch
):
  flags = '--xla_gpu_exclude_nondeterministic_ops=true' if deterministic else ''
  monkeypatch.setenv('XLA_FLAGS', flags)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = shape((B, T, H, K)), shape((B, T, G, K))
  mask = [jax.ShapeDtypeStruct((B, 1, T, T), bool)] * masked
  whole = lambda q, k, v, *mask: cudnn._whole(q, k, v, window=0, mask=(*mask, None)[0])
  forward, backward = (options for _, options in lowered(whole, q, k, k, *mask))
  assert 'force_deterministic' not in forward
  assert backward.get('force_deterministic', False) == deterministic


@pytest.mark.slow
@pytest.mark.parametrize('window', [0, 7])
def test_the_call_is_the_one_that_jax_makes(window, hopper):
  """Up to the offsets of keys, which old versions of JAX multiply by H for G."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = shape((B, T, H, K)), shape((B, T, G, K))
  ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

  def peer(q, k, v, size, offset):
    return hopper.dot_product_attention(
      q,
      k,
      v,
      q_seqlen=size,
      kv_seqlen=size,
      q_offsets=offset,
      kv_offsets=offset,
      scale=K**-0.5,
      mask_type=hopper.MaskType.PADDING_CAUSAL,
      sliding_window_length=window or None,
    )

  ours = lambda *args: cudnn._ragged(*args, (ROOM, ROOM), window)[0]
  expected = [*lowered(peer, q, k, k, ids((B, ROOM)), ids((B, ROOM + 1)))]
  assert len(expected) == 2
  assert [*lowered(ours, q, k, k, ids((B, T)))] == expected
