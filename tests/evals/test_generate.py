"""Generation against the plain model, run on the whole row for each token."""

import dataclasses
import logging
import re
import types

import absl.flags
import jax
import numpy as np
import pytest
import small

import gated
from gated import config, plan
from gated.data import tokenizer
from gated.evals import generate, sampling
from gated.evals.sampling import Sampling
from gated.run import checkpoint

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 40, n, np.int32) for n in (19, 1, 8)]
GREEDY = Sampling(max_tokens=9, temperature=0)
SLOTS = 32  # of the rows that these need
GATED = dict(attn__gate__position='sdpa')
EXPERTS = dict(moe__experts=4, moe__top_k=2)
SWITCH = dict(attn__switch__experts=3, attn__switch__top_k=2)

FAST = {
  'sdpa_gate': GATED,
  'sinks_and_yarn': dict(
    attn__sink_tokens=2,
    attn__normalizer='sink_logit',
    attn__yarn__factor=4.0,
    attn__yarn__original=8,
  ),
  'window_and_differential': dict(
    attn__window=5, attn__global_layers='last:1', attn__differential=True, norm='dyt'
  ),
  'capacity': EXPERTS | dict(moe__dispatch='capacity', moe__capacity=1.0),
}
FULL = {
  'dropless': EXPERTS | dict(moe__shared=1),
  'sigmoid': dict(attn__normalizer='sigmoid'),
  'softpick': dict(attn__normalizer='softpick'),
  'clipped': dict(attn__normalizer='clipped', attn__window=3),
  'elastic_and_v_scale': dict(
    attn__normalizer='elastic',
    norm='pre_affine',
    attn__window=3,
    attn__value_scale='learned',
  ),
  'rounding': dict(attn__rounding='repaired'),
  'softpick_above': dict(attn__normalizer='softpick', attn__normalizer_layers='last:1'),
  'switch_key_value': SWITCH | dict(attn__switch__where='key_value'),
  'key_gate': dict(attn__gate__position='key', attn__gate__place='after'),
  'value_state_gate': dict(attn__gate__position='value', attn__gate__source='value'),
  'out_gate': dict(attn__gate__position='out'),
  'untied_and_unrolled': dict(
    tied=False, layers='unroll', remat='full', attn__kv_heads=4, attn__logit_cap=2.0
  ),
  'one_kv_head_and_biases': dict(
    attn__kv_heads=1,
    attn__bias=True,
    attn__out_bias=True,
    attn__output='rms_norm',
    logit_cap=3.0,
  ),
  'zero_sinks_and_no_qk_norm': dict(
    attn__sink_tokens=2, attn__sink_values='zero', attn__qk_norm=False
  ),
  'output_silu': dict(attn__output='silu', attn__normalizer='off_by_one'),
  'switch_value': SWITCH | dict(attn__switch__where='value'),
  'query_gate': dict(attn__gate__position='query'),
  'value_gate': dict(attn__gate__position='value'),
  'parameter_gate': GATED | dict(attn__gate__source='parameter'),
  'shared_headwise_gate': GATED
  | dict(attn__gate__granularity='headwise', attn__gate__heads='shared'),
  'gated_norm_and_sandwich': dict(norm='gated', branch_norm='rms', branch_clip=2.0),
  'rows_of_one_document': dict(mask_documents=False),
}
VARIANTS = FAST | FULL


def full(names):
  """Names for a parametrized test, marked."""
  return [pytest.param(name, marks=pytest.mark.full) for name in names]


FORWARD = jax.jit(lambda net, *batch: net(*batch))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Prefill takes two chunks of the longest prompt, and all rows have SLOTS slots."""
  monkeypatch.setattr(generate, 'CHUNK', 16)
  monkeypatch.setattr(generate, 'SHORTEST', SLOTS)


def by_rerunning(net, prompts, count):
  """Greedy continuations by the whole model on the whole rows, a token at a time."""
  token_BN = np.zeros((len(prompts), SLOTS), np.int32)
  for row, prompt in zip(token_BN, prompts):
    row[: len(prompt)] = prompt
  count_B = np.array([len(prompt) for prompt in prompts])
  for _ in range(count):
    live_BN = (np.arange(SLOTS)[None] < count_B[:, None]).astype(np.int32)
    logit_BNV = np.asarray(FORWARD(net, token_BN, live_BN))
    for b, n in enumerate(count_B):
      token_BN[b, n] = logit_BNV[b, n - 1].argmax()
    count_B += 1
  return [row[len(prompt) :][:count] for row, prompt in zip(token_BN, prompts)]


def run(net, prompts=PROMPTS, options=GREEDY, on=None, context=SLOTS, token=None):
  on = on or small.mesh_of()
  return generate.run(net, prompts, options, on=on, tokenizer=token, context=context)


def texts(prompts, token=None, net=None, context=0, **options):
  """`generate.texts` on one device, of a small model of bytes."""
  net = net or small.model_of(vocab=264, **GATED)
  return generate.texts(
    prompts,
    Sampling(**options),
    cfg=net.cfg,
    read_model=lambda: net,
    on=small.mesh_of(),
    read_tokenizer=lambda: token or tokenizer.load('bytes'),
    context=context,
  )


def equal(ours, expected):
  assert [x.tolist() for x in ours] == [x.tolist() for x in expected]


@pytest.mark.slow
@pytest.mark.parametrize('name', [*FAST, *full(FULL)])
def test_greedy_tokens_are_those_of_the_model_run_on_whole_rows(name):
  net = small.model_of(**VARIANTS[name])
  ours = run(net)
  equal(ours, by_rerunning(net, PROMPTS, GREEDY.max_tokens))
  assert len(np.unique(np.concatenate(ours))) > 3  # Not one token again and again.


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sdpa_gate', 'capacity', *full(['dropless'])])
def test_a_batch_of_unequal_prompts_gives_what_each_prompt_alone_gives(name):
  net = small.model_of(**VARIANTS[name])
  equal(run(net), [run(net, [prompt])[0] for prompt in PROMPTS])


@pytest.mark.slow
def test_a_draw_depends_on_seed_row_and_position_only():
  net = small.model_of(**GATED)
  options = Sampling(max_tokens=9, top_p=0.9, seed=3)
  first = run(net, options=options)
  equal(run(net, options=options), first)
  equal(run(net, PROMPTS[:1], options), first[:1])
  longer = [np.concatenate([p, new[:4]]) for p, new in zip(PROMPTS, first)]
  shorter = dataclasses.replace(options, max_tokens=5)
  equal(run(net, longer, shorter), [new[4:] for new in first])
  other = run(net, options=dataclasses.replace(options, seed=4))
  assert all((a != b).any() for a, b in zip(other, first))
  twins = run(net, PROMPTS[:1] * 3, options)
  assert (twins[0] != twins[1]).any() and (twins[1] != twins[2]).any()


def test_low_temperature_top_k_and_top_p_are_greedy_in_the_limit():
  net = small.model_of(**GATED)
  for limit in (dict(temperature=1e-38), dict(top_k=1), dict(top_p=1e-9)):
    equal(run(net, options=Sampling(max_tokens=9, **limit)), run(net))


def kept_by_hand(logit_V, top_k, top_p):
  """The ids that the filters keep, most probable first, in float64."""
  order = np.argsort(-logit_V, kind='stable')[: top_k or None]
  p = np.exp(logit_V[order].astype(float))
  total = np.cumsum(p / p.sum())
  return order[: np.searchsorted(total, top_p) + 1]


@pytest.mark.slow
@pytest.mark.parametrize('top_k', [0, 1, 5, 99])
@pytest.mark.parametrize('top_p', [1e-6, 0.31, 0.79, 0.999])
def test_filters_keep_what_numpy_keeps(top_k, top_p):
  logit_BV = np.random.default_rng(top_k).normal(size=(6, 40)).astype(np.float32) * 3
  logit_BV[0, :20] = logit_BV[0].max() + 1  # Equals: the smaller id comes first.
  kept_Bk, id_Bk = sampling.keep(logit_BV, top_k, np.float32(top_p))
  for logit_V, kept_k, id_k in zip(logit_BV, np.asarray(kept_Bk), np.asarray(id_Bk)):
    expected = kept_by_hand(logit_V, top_k, top_p)
    assert id_k[np.isfinite(kept_k)].tolist() == expected.tolist()
    np.testing.assert_array_equal(kept_k[: len(expected)], logit_V[expected])


@pytest.mark.slow
@pytest.mark.parametrize(('top_k', 'top_p'), [(0, None), (0, 0.8), (4, None), (6, 0.7)])
def test_draws_have_the_probabilities_of_the_kept_tokens(top_k, top_p):
  draws = 20_000
  logit_V = np.random.default_rng(1).normal(size=12).astype(np.float32)
  rows = np.arange(draws, dtype=np.int32)
  keys = sampling.keys(np.uint32(7), rows, np.zeros_like(rows))
  logit_BV = np.broadcast_to(logit_V, (draws, 12))
  token_B = sampling.draw(logit_BV, keys, top_k=top_k, top_p=top_p)
  kept = kept_by_hand(logit_V, top_k, top_p or 1 - 1e-12)
  p_V = np.zeros(12)
  p_V[kept] = np.exp(logit_V[kept]) / np.exp(logit_V[kept]).sum()
  frequency_V = np.bincount(np.asarray(token_B), minlength=12) / draws
  np.testing.assert_allclose(frequency_V, p_V, atol=4 * np.sqrt(0.25 / draws))
  assert not frequency_V[p_V == 0].any()


@pytest.mark.full
def test_a_text_ends_before_a_stop_string_and_no_further_tokens_are_computed(monkeypatch):
  monkeypatch.setattr(generate, 'STOP_EVERY', 4)
  calls, decode = [], generate._decode
  monkeypatch.setattr(
    generate, '_decode', lambda *a, **o: calls.append(1) or decode(*a, **o)
  )
  prompts, options = ['def f(x):', 'import'], dict(max_tokens=64, temperature=0.7)
  whole = texts(prompts, **options)
  assert len(calls) == 1
  stop = next(c for c in whole[0][6:] if c.isascii() and c not in whole[0][:6])
  assert texts(prompts, **options, stop=(stop, 'never')) == [
    text.partition(stop)[0] for text in whole
  ]
  calls.clear()
  assert texts(prompts[:1], **options, stop=(stop,)) == [whole[0].partition(stop)[0]]
  assert len(calls) < 64 // 4


@pytest.mark.slow
def test_ids_end_before_the_token_that_completes_a_stop_string():
  ids = [np.frombuffer(b'def f(x):', np.uint8)]
  options = dict(max_tokens=40, temperature=0.7)
  (whole,) = texts(
    ids, token=dataclasses.replace(tokenizer.load('bytes'), eos=-1), **options
  )
  pair = next(i for i in range(5, 39) if (whole[i : i + 2] < 128).all())
  stop = whole[pair : pair + 2].astype(np.uint8).tobytes().decode()
  found = bytes(whole.astype(np.uint8)).find(stop.encode())
  (ours,) = texts(ids, stop=(stop,), **options)
  assert ours.tolist() == whole[: found + 1].tolist()


@pytest.mark.slow
def test_the_end_of_text_ends_a_row_and_no_id_beyond_the_tokenizer_is_drawn():
  net = small.model_of(**GATED)
  token = dataclasses.replace(tokenizer.load('bytes'), vocab=40, eos=-1)
  free = run(net, token=token)
  end = int(free[0][3])
  cut = [row[: (row.tolist() + [end]).index(end)] for row in free]
  equal(run(net, token=dataclasses.replace(token, eos=end)), cut)
  few = dataclasses.replace(token, vocab=5)
  assert max(map(max, run(net, options=Sampling(max_tokens=20), token=few))) < 5


def test_prompts_beyond_the_trained_context_and_uncached_models_are_logged(caplog):
  with caplog.at_level(logging.WARNING, 'gated'):
    options = dict(max_tokens=9, temperature=0)
    texts(PROMPTS, net=small.model_of(**GATED), context=28, **options)
    assert not caplog.records
    texts(PROMPTS, net=small.model_of(**GATED), context=27, **options)
    assert re.search('prompt of 19 tokens and max_tokens=9 exceed the 27', caplog.text)
    caplog.clear()
    texts(PROMPTS, net=small.model_of(**VARIANTS['capacity']), **options)
    assert "config.model.moe.dispatch='capacity' allows no cache" in caplog.text


MESHES = {
  'fsdp2': (dict(fsdp=2), 'sdpa_gate'),
  'tensor2': (dict(tensor=2), 'sinks_and_yarn'),
  'context2': (dict(context=2), 'sdpa_gate'),
  'all': (dict(fsdp=2, tensor=2, context=2), 'sdpa_gate'),
  'expert2': (dict(fsdp=2, expert=2, tensor=2), 'dropless'),
  'capacity': (dict(expert=2, context=2), 'capacity'),
}


@pytest.mark.parametrize('name', full(MESHES))
def test_every_mesh_gives_the_tokens_of_one_device(name):
  sizes, variant = MESHES[name]
  net, on = small.model_of(**VARIANTS[variant]), small.mesh_of(**sizes)
  placed = jax.device_put(net, generate.mesh.shardings(net, on))
  equal(run(placed, on=on), run(net))
  drawn = Sampling(max_tokens=9, top_k=8)
  equal(run(placed, options=drawn, on=on), run(net, options=drawn))


@pytest.mark.full
def test_the_cache_is_sharded_by_rows_and_heads_and_never_gathered():
  net, on = small.model_of(**GATED), small.mesh_of(fsdp=2, tensor=2)
  net = jax.device_put(net, generate.mesh.shardings(net, on))
  prompts = PROMPTS + PROMPTS[:1]
  rows, knobs = generate._start(prompts, GREEDY, SLOTS, 2, None)
  with jax.set_mesh(on):
    cache = generate.prefill(net, rows.token_BN, 1, chunk=8)
    rows = rows._replace(cache=cache)
    step = generate._decode.lower(net, rows, knobs, 9, top_k=1, with_p=False).compile()
  # Layers, rows, slots, KV heads, head width.
  assert [x.addressable_shards[0].data.shape for x in cache] == 2 * [(2, 2, SLOTS, 1, 8)]
  largest = max(2 * 2 * SLOTS * 8, *(leaf.size // 2 for leaf in jax.tree.leaves(net)))
  assert small.largest_array(step) <= largest


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(max_tokens=0), 'max_tokens=0, but it must be at least 1'),
    (dict(max_tokens=1.5), 'max_tokens=1.5, but an int'),
    (dict(temperature=-0.1), 'temperature=-0.1, but it must be at least 0'),
    (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(temperature=float('inf')), 'temperature=inf, but it must be finite'),
    (dict(top_k=-1), 'top_k=-1, but it must be at least 0'),
    (dict(top_p=0.0), 'top_p=0.0, but it must be in (0, 1]'),
    (dict(top_p=1.1), 'top_p=1.1, but it must be in (0, 1]'),
    (dict(seed=-1), 'seed=-1, but it must be at least 0'),
    (dict(stop='x'), "stop='x', but a sequence of strings"),
    (dict(stop=(3,)), 'stop=(3,), but a sequence of strings'),
    (dict(stop=('',)), "stop=('',), but a sequence of strings"),
  ],
)
def test_an_option_out_of_range_is_refused_with_its_name(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    Sampling(**options)


@pytest.mark.parametrize(
  ('prompts', 'message'),
  [
    ('text', "prompts='text', but a list of texts is expected"),
    ([], 'prompts=[], but a list of texts is expected'),
    (['a', ''], "prompts[1]='' has no tokens, but at least one is needed"),
    ([[]], 'prompts[0]=[] has no tokens'),
    ([[0.5]], 'prompts[0]=[0.5], but a text or a list of ids is expected'),
    ([[[1]]], 'prompts[0]=[[1]], but a text or a list of ids is expected'),
    ([[1, 264]], 'prompts[0] has the token id 264, but ids must be in [0, 264)'),
    ([[-1]], 'prompts[0] has the token id -1, but ids must be in [0, 264)'),
  ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    texts(prompts)


def read_flags(*argv):
  """The flags of generation, and one more that --prompt excludes, read from argv."""
  values = absl.flags.FlagValues()
  flags = types.SimpleNamespace(FLAGS=values)
  for kind in ('integer', 'float', 'multi_string'):
    define = getattr(absl.flags, f'DEFINE_{kind}')
    wrapped = lambda *args, define=define: define(*args, flag_values=values)
    setattr(flags, f'DEFINE_{kind}', wrapped)
  flags.DEFINE_integer('rows', 0, '')
  read = sampling.define(flags, excludes=['rows'])
  values(['eval.py', *argv])
  return read()


def test_flags_are_the_options_of_the_same_name():
  assert read_flags() == ([], dataclasses.asdict(Sampling()))
  prompts, options = read_flags(
    '--prompt=a', '--prompt=b', '--top_k=3', '--stop=x', '--temperature=0'
  )
  assert prompts == ['a', 'b']
  assert Sampling(**options) == Sampling(top_k=3, stop=('x',), temperature=0)
  # As an ASCII locale reads the command line.
  escaped = 'é'.encode().decode('ascii', 'surrogateescape')
  prompts, options = read_flags(f'--prompt={escaped}', f'--stop={escaped}', '--prompt=é')
  assert (prompts, options['stop']) == (['é', 'é'], ('é',))


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--prompt=a', '--top_p=2'], '--top_p=2.0, but it must be in (0, 1]'),
    (['--prompt=a', '--prompt='], "--prompt='' has no tokens"),
    (['--prompt=caf\udce9'], r"--prompt='caf\udce9' is not UTF-8"),
    (['--top_k=3'], '--top_k=3 is not allowed without --prompt'),
    (['--prompt=a', '--rows=0'], '--rows=0 is not allowed with --prompt'),
  ],
)
def test_a_wrong_flag_is_refused_with_its_name(argv, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    read_flags(*argv)


@pytest.mark.slow
def test_a_loaded_model_continues_ids():
  run = gated.load('tests/golden/hf_authors_headwise')
  prompts = [[5, 3, 8, 1, 9], [7]]
  ours = run.generate(prompts, max_tokens=3, temperature=0)
  for prompt, new in zip(prompts, ours):
    for i, token in enumerate(new):
      assert token == run.logits([*prompt, *new[:i]])[-1].argmax()
  with pytest.raises(ValueError, match=r'no tokenizer\.json: pass token ids'):
    run.generate(['text'])
  with pytest.raises(ValueError, match='top_k=-2'):
    run.generate(prompts, top_k=-2)


@pytest.mark.full
def test_eval_prints_prompts_and_their_continuations(run_python, tmp_path):
  c = small.recipe(model__vocab=264)
  state = plan.Plan(config.build(plan.Config, c, 'config')).init()
  digest = tokenizer.load('bytes').fingerprint
  about = dict(config=c, data=dict(sha256='0', tokenizer=digest))
  about |= dict(stability=dict(rollbacks=0), heldout_loss=1.0)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=1, keep_every=0) as saves:
    saves.save(1, state, about)
  options = dict(max_tokens=5, temperature=0, stop=('\n',))
  texts = gated.load(tmp_path).generate(['def f', 'é'], **options)
  flags = '--prompt=def f', '--prompt=é', '--max_tokens=5', '--temperature=0', '--stop=\n'
  done = run_python(['eval.py', f'--workdir={tmp_path}', *flags])
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'def f{texts[0]}\n\né{texts[1]}\n'
  refused = run_python(['eval.py', f'--workdir={tmp_path}', *flags, '--top_p=0'])
  assert refused.returncode == 2
  assert refused.stderr.endswith('eval.py: --top_p=0.0, but it must be in (0, 1]\n')
