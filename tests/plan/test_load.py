"""gated.load: a checkpoint as an object, on eight devices."""

import re
import shutil

import jax
import numpy as np
import pytest
import small

import gated
from gated import config, probes, storage
from gated.data import tokenizer
from gated.devices import mesh
from gated.plan import Config, Plan, evaluation
from gated.plan import load as loading
from gated.run import checkpoint, weights

TEXT = 'def f(x):\n  return x\n'
GATES = {
  'headwise': dict(granularity='headwise'),
  'elementwise': {},
  'shared': dict(granularity='headwise', heads='shared'),
  'out': dict(position='out'),
  'value': dict(position='value', source='value'),
  'parameter': dict(source='parameter'),
}


def saved(folder, tokenizer_digest=None, matmul='compute', **gate):
  """A workdir with the steps 1 and 2 of a run that was never trained."""
  knobs = {f'model__attn__gate__{k}': v for k, v in gate.items()}
  c = small.recipe(model__vocab=264, model__numerics__matmul=matmul, **knobs)
  plan = Plan(config.build(Config, c, 'config'))
  digest = tokenizer_digest or tokenizer.load('bytes').fingerprint
  about = {
    'config': c,
    'data': {'sha256': '0', 'tokenizer': digest},
    'stability': {'rollbacks': 0},
  }
  state = plan.init()
  with checkpoint.Checkpoints(folder / 'checkpoints', keep=9, keep_every=0) as saves:
    for step, loss in ((1, 2.0), (2, 3.0)):
      saves.save(step, state, about | {'heldout_loss': loss})
  return folder, jax.device_get(state.model)


@pytest.fixture(scope='module')
def headwise(tmp_path_factory):
  folder = tmp_path_factory.mktemp('headwise')
  return saved(folder, position='sdpa', granularity='headwise')


def test_a_model_in_fp8_generates_and_is_compared_without_it(tmp_path):
  rounded = gated.load(saved(tmp_path, matmul='fp8')[0])
  assert rounded.cfg.numerics.matmul == 'fp8'
  assert rounded.dropless().cfg.numerics.matmul == 'compute'
  prompts = ['def f(', 'class A:\n']
  together = rounded.generate(prompts, max_tokens=8, temperature=0)
  alone = [rounded.dropless().generate([p], max_tokens=8, temperature=0) for p in prompts]
  assert together == [text for (text,) in alone]
  assert rounded.loss(TEXT) != rounded.dropless().loss(TEXT)


def test_a_workdir_gives_model_tokenizer_config_and_step(headwise):
  folder, _ = headwise
  run = gated.load(folder)
  assert run.step == 2 and run.config['model']['width'] == 16
  assert run.tokenizer.name == 'bytes'
  assert gated.load(f'{folder}:best').step == gated.load(f'{folder}:1').step == 1
  assert gated.load(folder, step='1').step == gated.load(folder, step=1).step == 1


@pytest.mark.slow
def test_logits_are_those_of_the_model_and_the_loss_is_theirs(headwise):
  folder, net = headwise
  run = gated.load(folder)
  ids_N = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
  logit_NV = np.asarray(jax.jit(lambda m, x: m(x))(net, ids_N[None]))[0]
  np.testing.assert_allclose(run.logits(TEXT), logit_NV, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(run.logits(ids_N.tolist()), run.logits(TEXT))
  p_NV = jax.nn.log_softmax(logit_NV[:-1])
  loss = -np.asarray(p_NV)[np.arange(len(ids_N) - 1), ids_N[1:]].mean()
  assert run.loss(TEXT) == pytest.approx(loss, rel=1e-5)
  assert run.loss(ids_N) == run.loss(TEXT)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [g if g == 'headwise' else pytest.param(g, marks=pytest.mark.full) for g in GATES],
)
def test_gate_scores_are_the_formula(name, tmp_path):
  folder, net = saved(tmp_path, **dict(position='sdpa') | GATES[name])
  score = gated.load(folder).gates(TEXT)
  count = len(TEXT)
  shape = {
    'headwise': (2, 4, count),
    'elementwise': (2, 4, count, 8),
    'shared': (2, 1, count),
    'out': (2, 1, count, 16),
    'value': (2, 2, count, 8),
    'parameter': (2, 4, count, 8),
  }
  assert score.shape == shape[name] and score.dtype == np.float32
  # The first layer reads the normalised embedding.
  x_ND = net.embed.table[...][np.frombuffer(TEXT.encode(), np.uint8)]
  h_ND = x_ND / np.sqrt(np.square(x_ND).mean(-1, keepdims=True) + 1e-6)
  w, v = net.blocks.attn.gate.weight[...][0], net.blocks.attn.value.weight[...][0]
  logit = {
    'headwise': lambda: np.einsum('nd,dh->hn', h_ND, w),
    'elementwise': lambda: np.einsum('nd,dhk->hnk', h_ND, w),
    'shared': lambda: np.einsum('nd,dh->hn', h_ND, w),
    'out': lambda: np.einsum('nd,de->ne', h_ND, w)[None],
    'value': lambda: np.einsum('nhk,hkl->hnl', np.einsum('nd,dhk->nhk', h_ND, v), w),
    'parameter': lambda: np.broadcast_to(w[:, None], (4, count, 8)),
  }[name]()
  expected = 1 / (1 + np.exp(-logit))
  if name == 'shared':
    expected = expected.mean(0, keepdims=True)
  np.testing.assert_allclose(score[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_hugging_face_folder_is_loaded_too():
  run = gated.load('tests/golden/hf_authors_headwise')
  assert run.step is None and run.config['model']['attn']['gate']['position'] == 'sdpa'
  ids = list(range(12))
  assert run.logits(ids).shape == (12, run.cfg.vocab) and np.isfinite(run.loss(ids))
  assert run.gates(ids).shape == (run.cfg.depth, run.cfg.attn.heads, 12)
  with pytest.raises(ValueError, match=r'no tokenizer\.json: pass token ids'):
    run.loss('text')


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('{}/none', 'found neither checkpoints'),
    ('{}:7', r"step='7': .*has the steps 1, 2"),
    ('tests/golden/hf_qwen3:3', "no step '3'"),
  ],
)
def test_what_cannot_be_loaded_is_refused_with_its_path(headwise, path, message):
  path = path.format(headwise[0])
  with pytest.raises(ValueError, match=message) as error:
    gated.load(path)
  assert path.partition(':')[0] in str(error.value)


@pytest.mark.slow
def test_texts_that_cannot_be_measured_are_refused(headwise, tmp_path):
  run = gated.load(headwise[0])
  with pytest.raises(ValueError, match='at least 2 tokens, but the text has 1'):
    run.loss('a')
  for text in ('', [], [[1, 2]], [0.5]):
    with pytest.raises(ValueError, match='neither a text with tokens nor'):
      run.logits(text)
  with pytest.raises(ValueError, match=re.escape('must be in [0, 264)')):
    run.logits([264])
  folder, _ = saved(tmp_path / 'ungated', tokenizer_digest='other')
  with pytest.raises(ValueError, match=r"the model has no gate: .*position='none'"):
    gated.load(folder).gates([1, 2])
  with pytest.raises(ValueError, match='another tokenizer than'):
    gated.load(folder).loss(TEXT)


@pytest.mark.full
def test_a_step_that_its_run_removes_meanwhile_is_chosen_again(
  tmp_path, monkeypatch, caplog
):
  """Step 3 is saved after the choice of step 2, which retention then removes."""
  folder, _ = saved(tmp_path)
  choose, chosen = loading.load, []

  def overtaken(*args, **options):
    run = choose(*args, **options)
    chosen.append(run.step)
    if len(chosen) == 1:
      state = Plan(config.build(Config, run.config, 'config')).init()
      path = folder / 'checkpoints'
      with checkpoint.Checkpoints(path, keep=1, keep_every=0) as saves:
        saves.save(3, state, {**run.about, 'heldout_loss': 9.0})
    return run

  monkeypatch.setattr(loading, 'load', overtaken)
  assert loading.take(folder).step == 3 and chosen == [2, 3]
  assert 'has removed step 2 meanwhile' in caplog.text
  # Another view of a model has its weights, also when their step is gone.
  run = loading.take(folder, step='best')
  shutil.rmtree(folder / 'checkpoints')
  assert run.step == 1 and run.fit(5).cfg.attn.max_segments >= 5
  jax.tree.map(np.testing.assert_array_equal, run.fit(5).leaves, run.leaves)
  assert run.fit(5).model.cfg == run.fit(5).cfg


@pytest.mark.slow
def test_a_step_that_is_removed_is_not_replaced_if_it_was_given_by_number(
  tmp_path, monkeypatch
):
  folder, _ = saved(tmp_path)
  choose = loading.load

  def overtaken(*args, **options):
    run = choose(*args, **options)
    shutil.rmtree(folder / 'checkpoints/1')
    return run

  monkeypatch.setattr(loading, 'load', overtaken)
  with pytest.raises(weights.Removed, match='has removed step 1 meanwhile'):
    loading.take(f'{folder}:1')


@pytest.mark.slow
def test_a_workdir_in_a_store_is_loaded(remote):
  folder, _ = saved(storage.path(remote), position='sdpa')
  assert gated.load(f'{folder}:1').gates([1, 2, 3]).shape == (2, 4, 3, 8)


LONG = TEXT * 20


@pytest.mark.full
def test_a_run_is_probed_on_a_text(headwise):
  run = gated.load(headwise[0])
  report = run.probe(LONG, length=64, rows=3)
  assert (report['step'], report['tokens'], report['rows']) == (2, 192, 3)
  assert report['documents_masked'] and report['row_length'] == 64
  score_LHT = np.concatenate(
    [run.gates(LONG[64 * i : 64 * (i + 1)]) for i in range(3)], -1
  )
  assert report['gate_mean']['value'] == pytest.approx(score_LHT.mean(), rel=1e-5)
  numbers = {k: v for k, v in report.items() if isinstance(v, dict) and 'value' in v}
  assert len(numbers) > 40
  for name, number in numbers.items():
    assert name in report['conventions'], name
    if number['layers'] is not None:
      assert len(number['layers']) == run.cfg.depth, name
  table = probes.table(report).splitlines()
  assert len(table) == run.cfg.depth + 2 and '-' not in table[1].split()


@pytest.mark.full
def test_attention_is_that_of_the_text_alone(headwise):
  run = gated.load(headwise[0])
  map_LHTT = run.attention(TEXT)
  assert map_LHTT.shape == (2, 4, len(TEXT), len(TEXT))
  np.testing.assert_allclose(map_LHTT.sum(-1), 1, rtol=1e-5)
  assert not np.triu(map_LHTT, 1).any()
  np.testing.assert_allclose(run.attention(TEXT[:8]), map_LHTT[:, :, :8, :8], rtol=1e-4)
  report = run.probe(LONG, length=64, rows=1)
  first_LH = run.attention(LONG[:64])[..., 0].mean(-1)
  numbers = report['first_token_attention']
  np.testing.assert_allclose(numbers['heads'], first_LH, rtol=1e-5)
  with pytest.raises(ValueError, match=r'1024 tokens.* at most 512'):
    run.attention('x' * 513)


@pytest.mark.full
def test_a_run_with_forced_gates_is_measured_like_any_other(headwise):
  run = gated.load(headwise[0])
  shut = run.force('mean', layers=[1], text=LONG[:64]).force('closed', layers=[0])
  score, before = shut.gates(TEXT), run.gates(LONG[:64])
  assert (score[0] == 0).all()
  np.testing.assert_allclose(score[1, :, 0], before[1].mean(-1), rtol=1e-5)
  np.testing.assert_array_equal(score[1], score[1, :, :1] * np.ones(len(TEXT)))
  assert run.gates(TEXT)[0].min() > 0 and shut.loss(TEXT) != run.loss(TEXT)
  assert shut.fit(9).loss(TEXT) == pytest.approx(shut.loss(TEXT), rel=1e-6)
  report = shut.probe(LONG, length=64)
  assert report['gate_mean']['layers'][0] == 0
  assert report['output_below_1e-3']['layers'][0] == 1
  [text] = shut.generate(['def'], max_tokens=4, temperature=0)
  assert shut.generate(['def'], max_tokens=4, temperature=0) == [text]
  with pytest.raises(ValueError, match='forced gates cannot draw figures'):
    shut.draw(report, LONG)
  with pytest.raises(
    ValueError, match=r'layers=\[7\], but the model has the layers 0 to 1'
  ):
    run.force('open', layers=[7])


@pytest.mark.full
@pytest.mark.parametrize('gate', ['headwise', 'none'])
def test_a_report_is_drawn_into_its_workdir(headwise, tmp_path, gate):
  pytest.importorskip('matplotlib')
  folder = tmp_path / 'run'
  if gate == 'none':
    saved(folder)
  else:
    shutil.copytree(headwise[0], folder)
  run = gated.load(folder)
  run.draw(run.probe(LONG, length=64), LONG)
  names = {'sinks', 'sparsity', 'attention', 'attention-heads', 'attention-long'}
  names |= {'gates', 'gates-by-layer'} if gate == 'headwise' else set()
  files = {f'2-{name}.{kind}' for name in names for kind in ('svg', 'png')}
  files |= {'2-gates.html'} if gate == 'headwise' else set()
  assert {path.name for path in (folder / 'probes').iterdir()} == files
  if gate == 'headwise':
    assert 'return' in ''.join(
      re.findall(
        r'<span style="[^"]*">(.)</span>', (folder / 'probes/2-gates.html').read_text()
      )
    )


@pytest.mark.full
def test_documents_are_masked_or_not_by_a_flag(headwise):
  rows = small.batch(8, 64)
  masked, whole = (
    gated.load(headwise[0]).probe(rows, mask_documents=flag) for flag in (True, False)
  )
  assert masked['documents_masked'] and not whole['documents_masked']
  for report, allowed in ((masked, 0), (whole, 1)):
    # After the first document, only whole rows see the row's first token.
    uniform = report['first_token_uniform']['value']
    assert (uniform > whole['first_token_uniform']['value'] * 0.999) == allowed


@pytest.mark.full
def test_runs_and_forced_gates_stand_beside_a_run(headwise):
  """Their losses and probes are those of each alone; gates have their mean over rows."""
  run, rows = gated.load(headwise[0]), small.batch(8, 64)
  options = dict(segments=1, forced='mean@1', others=[f'{headwise[0]}:1'])
  runs = evaluation.runs(run, lambda: rows, **options)
  forced, other = f'gates {options["forced"]}', f'{run.path}:1'
  assert [*runs] == [run.path.name, forced, other] and runs[other].step == 1
  ids = rows.tokens[rows.segments > 0]
  reports = evaluation.probes(runs, rows, mask_documents=None)
  first = reports[run.path.name]
  # Of one gate a head, all scores are now the mean over the rows' tokens.
  means = first['gate_heads']['layers']
  np.testing.assert_allclose(reports[forced]['gate_heads']['layers'], means, rtol=1e-4)
  assert reports[forced]['gate_std']['layers'][1] < first['gate_std']['layers'][1] / 2
  assert first['tokens'] == len(ids)
  table = probes.table(evaluation.joined(reports)).splitlines()
  assert [line.split()[0] for line in table[1:]] == ['0'] * 3 + ['1'] * 3 + ['all'] * 3
  assert table[2].endswith(forced) and table[1].endswith('this run')
  loss = first['loss']['value']
  assert loss != reports[forced]['loss']['value'] and table[7].split()[1] == f'{loss:.4f}'
  assert reports[other]['loss']['value'] == pytest.approx(loss, rel=1e-6)
  nats_B, weight_B = run.evaluate(mesh.place(rows, run.mesh, 8))
  assert loss == pytest.approx(float(nats_B.sum() / weight_B.sum()), rel=1e-6)


@pytest.mark.parametrize(
  ('forced', 'beside', 'message'),
  [
    ('mean@2', '', r"--force_gates='mean@2': layers='2', but the model has the layers 0"),
    ('ajar', '', r"--force_gates='ajar': gates='ajar', but allowed are"),
    ('', '/nowhere', r'--beside=/nowhere: /nowhere: found neither'),
    ('', '{}', r'--beside=.*: it is measured already'),
    ('', 'tests/golden/hf_qwen3', r'--beside=tests/golden/hf_qwen3: .*no tokenizer'),
  ],
)
def test_gates_and_runs_that_cannot_stand_beside_are_refused(
  headwise, forced, beside, message
):
  others = [beside.format(headwise[0])] * 2 if beside else []
  with pytest.raises(ValueError, match=message):
    evaluation.runs(
      gated.load(headwise[0]), pytest.fail, segments=1, forced=forced, others=others
    )


def test_forced_gates_of_a_model_without_gates_are_refused_by_their_flag():
  run = gated.load('tests/golden/hf_qwen3')
  with pytest.raises(ValueError, match=r"--force_gates='open': the model has no gate"):
    evaluation.runs(run, pytest.fail, segments=1, forced='open', others=[])


def test_the_rows_of_a_text_have_the_next_tokens_as_targets(headwise):
  ids = np.arange(100) % 90
  rows = gated.load(headwise[0]).rows(ids, length=40, limit=0)
  np.testing.assert_array_equal(rows.tokens.ravel(), ids[:80])
  np.testing.assert_array_equal(rows.targets.ravel(), ids[1:81])
  assert rows.weights.all()
  whole = gated.load(headwise[0]).rows(ids, length=100, limit=0)
  assert whole.weights.sum() == 99 and whole.weights[0, -1] == 0


def test_a_text_that_is_too_short_to_probe_is_refused(headwise):
  with pytest.raises(ValueError, match='63 tokens is too short: probes need at least 64'):
    gated.load(headwise[0]).probe('x' * 63)
