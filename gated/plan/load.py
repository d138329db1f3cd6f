"""A checkpoint as an object: `gated.load(path)` -> model, tokenizer, config, measures.

T tokens  V vocabulary  L layers  H heads  K head width
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gated import config, data, evals, hf, model, storage
from gated.data import tokenizer
from gated.devices import mesh
from gated.plan import probing
from gated.plan.plan import evaluate_step, exact, reading
from gated.probes import attention, gates
from gated.run import checkpoint, workdir

# Required entries in a checkpoint's metadata.
NEEDED = (
  'config.model',
  'config.data',
  'config.loss.chunk',
  'config.seed',
  'config.batch',
  'data.sha256',
  'data.tokenizer',
  'stability.rollbacks',
)
SHORTEST = 16  # Texts are padded to a power of two; this is the smallest.
CHUNK = 1024  # Tokens per device whose logits are in memory at a time, for imports.

_log = logging.getLogger('gated')

Text = str | Sequence[int] | np.ndarray


class Loaded:
  """A trained model, made by `load`. The weights are read when `model` is first used.

  They are split over all devices. A text is a single document: a string, or a sequence of
  token ids.
  """

  def __init__(
    self,
    path: storage.Path,
    cfg: model.Config,
    *,
    step: int | None,
    about: dict[str, Any] | None,
    cache: str,
  ):
    self.path = path  # the workdir, or the Hugging Face folder
    self.cfg = cfg
    self.step = step  # None for imported weights
    self.about = about  # metadata of the step's checkpoint; None for imported weights
    self.cache = cache  # folder of the embedded corpus and of copied datasets
    self.changes: tuple[Any, ...] = ()  # applied to the model after reading its weights

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The resolved recipe of the run; for imported weights, only its group `model`."""
    return self.about['config'] if self.about else {'model': dataclasses.asdict(self.cfg)}

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices; the weights are split over them."""
    return reading(self.cfg)[0]

  @functools.cached_property
  def model(self) -> model.Transformer:
    """The model: `model(tokens) -> logits`, with its weights."""
    _, like = reading(self.cfg)
    if self.step is None:
      net = hf.read(Path(self.path), like)
    else:
      with checkpoint.Reader(self.path / 'checkpoints') as saves:
        net = saves.restore_model(self.step, like)
    for change in self.changes:
      net = change(net)
    return net

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The tokenizer that the model was trained with.

    ValueError if the dataset or the Hugging Face folder no longer holds it.
    """
    if self.about is None:
      file = Path(self.path) / 'tokenizer.json'
      if not file.is_file():
        raise ValueError(f'{self.path} has no tokenizer.json: pass token ids, not text')
      return tokenizer.load(str(file))
    knobs = self.config['data'] | {'cache': self.cache}
    opened = data.open_tokenizer(config.build(data.Config, knobs, 'config.data'))
    if opened.fingerprint != self.about['data']['tokenizer']:
      raise ValueError(
        f'config.data.mixture={knobs["mixture"]!r} now has another tokenizer than '
        f'{self.path} was trained with: pass token ids, not text'
      )
    return opened

  def corpus(
    self, mixture: str = '', *, knobs: dict[str, Any] | None = None, seed: int = 0
  ) -> data.Corpus:
    """The data that the run was trained on, or another mixture, as rows of tokens.

    `knobs` (as config.data) and `seed` are for imported weights, which have no data of
    their own. With a batch of one row, row i is the run's i-th row. ValueError if the
    run's data has changed or the mixture has another tokenizer.
    """
    c = self.config if self.about else {'data': knobs, 'seed': seed}
    if c['data'] is None:
      raise ValueError(f'{self.path} has no data of its own: pass `knobs`')
    # The cache folder belongs to this machine, not to the checkpoint.
    data_knobs = c['data'] | {'cache': self.cache}
    data_knobs |= {'mixture': mixture} if mixture else {}
    cfg = config.build(data.Config, data_knobs, 'config.data')
    corpus = data.open(cfg, vocab=self.cfg.vocab, batch=1, seed=c['seed'], max_segments=0)
    if self.about:
      self._check_data(corpus, mixture)
    elif (file := Path(self.path) / 'tokenizer.json').is_file():
      corpus.check_tokenizer(file)
    else:
      _log.warning('no %s: the tokenizer of the data is not checked', file)
    return corpus

  def _check_data(self, corpus: data.Corpus, mixture: str) -> None:
    """ValueError if the run's data has changed, or if a mixture has another tokenizer."""
    assert self.about is not None
    fingerprint = self.about['data']
    if not mixture and corpus.fingerprint['sha256'] != fingerprint['sha256']:
      raise ValueError(
        f'config.data.mixture={self.config["data"]["mixture"]!r} is no longer the data '
        'of the run (another Python version, or another dataset in that place): name a '
        'mixture with --data'
      )
    if corpus.fingerprint['tokenizer'] != fingerprint['tokenizer']:
      raise ValueError(f'--data={mixture!r} has another tokenizer than the run')

  def fit(self, segments: int) -> 'Loaded':
    """The same model for rows of up to `segments` documents; more slow a fused kernel."""
    attn = self.cfg.attn
    most = max(attn.max_segments, segments)
    attn = dataclasses.replace(attn, max_segments=most)
    cfg = dataclasses.replace(self.cfg, attn=attn)
    same: dict[str, Any] = dict(step=self.step, about=self.about, cache=self.cache)
    fitted = Loaded(self.path, cfg, **same)
    fitted.changes = self.changes
    return fitted

  def evaluate(self, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    """A placed batch (B, T) -> each row's sum of nats and sum of weights: (B,), (B,)."""
    return self._evaluate(self.model, batch)

  def logits(self, text: Text) -> np.ndarray:
    """A text -> the logits of each next token, (T, V) in float32."""
    batch, count = self._batch(self._tokens(text))
    logit_BTV = self.compiled(_logits)(self.model, batch)
    return np.asarray(logit_BTV[0, :count])

  def loss(self, text: Text) -> float:
    """A text of at least two tokens -> its mean loss, in nats per predicted token."""
    tokens = self._tokens(text)
    if len(tokens) < 2:
      raise ValueError(f'a loss needs at least 2 tokens, but the text has {len(tokens)}')
    batch, _ = self._batch(tokens[:-1], tokens[1:])
    nats_B, weight_B = self.evaluate(batch)
    return float(nats_B[0] / weight_B[0])

  def gates(self, text: Text) -> np.ndarray:
    """A text -> its gates' scores: (L, H, T) headwise, (L, H, T, K) elementwise.

    As `probes.gates.scores`, for one text. ValueError for a model without a gate.
    """
    batch, count = self._batch(self._tokens(text))
    score = self.compiled(gates.scores)(self.model, batch)
    return np.moveaxis(np.asarray(score[:, 0, :count]), 1, 2)

  def attention(self, text: Text) -> np.ndarray:
    """A text -> its attention weights before any gate: (L, H, T, T).

    As `probes.attention.maps`, for one text. ValueError for more than 512 tokens.
    """
    batch, count = self._batch(self._tokens(text))
    weight = self.compiled(attention.maps)(self.model, batch)
    return np.asarray(weight[..., :count, :count])

  def force(
    self,
    gates: str | float,
    *,
    layers: Sequence[int] | None = None,
    text: Text | None = None,
  ) -> 'Loaded':
    """The same model with its gates' scores replaced, in all layers or in those given.

    `gates` is 'open' (1), 'closed' (0), a number, or 'mean': each head's (and channel's)
    mean over the tokens of `text`. ValueError for a model without a gate.
    """
    score = None if text is None else self.gates(text)
    change = probing.forcing(self, gates, layers, score)
    run = self.fit(0)
    run.changes = (*self.changes, change)
    run.model = change(self.model)  # The weights are not read again.
    return run

  def generate(self, prompts: Sequence[Text], **options: Any) -> list[Any]:
    """Prompts -> continuations: a string for a string, an int32 array for token ids.

    The options are the fields of `evals.Sampling`: max_tokens, temperature, top_k, top_p,
    stop, seed. ValueError names a prompt or an option that is wrong.
    """
    return evals.generate.texts(
      prompts,
      evals.Sampling(**options),
      cfg=self.cfg,
      read_model=lambda: self.model,
      on=self.mesh,
      read_tokenizer=lambda: self.tokenizer,
      context=self.config['data']['length'] if self.about else 0,
    )

  @functools.cached_property
  def _evaluate(self) -> Any:
    chunk = self.config['loss']['chunk'] if self.about else CHUNK
    return evaluate_step(self.cfg, self.mesh, chunk)

  def probe(
    self,
    text: Text | data.Batch,
    *,
    length: int = 0,
    rows: int = 0,
    mask_documents: bool | None = None,
  ) -> dict[str, Any]:
    """A text -> the report of all probes on it, as in `eval.py --probe`.

    The text is cut into rows of `length` tokens (0: the training length, or one row for
    imported weights). The first `rows` rows are read (0: all); each is one document.
    `text` may also be packed rows (R, T) on the host. `mask_documents` replaces the
    model's own setting. ValueError for a text shorter than the probes need. The entry
    'conventions' of the report explains its numbers.
    """
    if not isinstance(text, data.Batch):
      trained = self.config['data']['length'] if self.about else 0
      ids = self._tokens(text)
      text = probing.rows_of(ids, length=length or trained, limit=rows)
    return probing.probe(self, text, mask_documents=mask_documents)

  def draw(self, report: dict[str, Any], text: Text | data.Batch) -> None:
    """Draws a report of `probe`, and maps and gates of its text, into WORKDIR/probes/.

    The files are STEP-NAME.svg and .png, and STEP-gates.html. For packed rows, the text
    is the longest document of the first row. ValueError without matplotlib, for a model
    with forced gates, and for imported weights, whose folder does not change.
    """
    if self.changes:
      raise ValueError(f'a model with forced gates cannot draw figures into {self.path}')
    rows = isinstance(text, data.Batch)
    ids = probing.longest_document(text) if rows else self._tokens(text)
    probing.draw(self, report, ids)

  @functools.cache  # noqa: B019
  def compiled(self, function: Any) -> Any:
    """A function of the model and arrays, compiled for all devices."""
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(exact(self.cfg, function), out_shardings=replicated)

    def run(net, *arrays):
      with jax.set_mesh(self.mesh):
        return compiled(net, *arrays)

    return run

  def _tokens(self, text: Text) -> np.ndarray:
    """A text -> its token ids; ValueError for an id outside of the vocabulary."""
    ids = self.tokenizer.encode(text)[0] if isinstance(text, str) else np.asarray(text)
    if not ids.size or ids.ndim != 1 or ids.dtype.kind not in 'iu':
      raise ValueError(f'{text!r:.100} is neither a text with tokens nor a list of ids')
    if ids.min() < 0 or ids.max() >= self.cfg.vocab:
      raise ValueError(f'token ids must be in [0, {self.cfg.vocab})')
    return ids.astype(np.int32)

  def _batch(self, tokens: np.ndarray, targets: Any = None) -> tuple[data.Batch, int]:
    """One text -> (a placed batch whose rows all hold it, its number of tokens).

    The batch has one row for each shard of a batch on the mesh.
    """
    count = len(tokens)
    length = max(SHORTEST, 1 << (count - 1).bit_length())
    pad = lambda x: np.pad(np.asarray(x), (0, length - count))
    live = pad(np.ones(count, np.int32))
    row = data.Batch(
      tokens=pad(tokens),
      targets=pad(tokens if targets is None else targets),
      weights=live.astype(np.float32),
      segments=live,
      positions=np.arange(length, dtype=np.int32),
    )
    rows = mesh.ways('batch', self.mesh)
    held = len(mesh.rows(self.mesh, rows))
    local = jax.tree.map(lambda x: np.broadcast_to(x, (held, length)), row)
    return mesh.place(local, self.mesh, rows), count


def load(path: storage.PathLike, *, step: str = '', cache: str = '') -> Loaded:
  """A workdir, WORKDIR:STEP or a Hugging Face folder -> Loaded.

  STEP is a number, 'latest' (the default) or 'best', the step with the lowest held-out
  loss; `step` may give it instead. A workdir may be in an object store (gs://,
  s3://). Every byte of the step is verified first. `cache` is the folder of the embedded
  corpus, '' for the platform's. Raises ValueError, with the path, if loading fails.
  """
  place, step = (str(path), step) if step else workdir.split_step(str(path))
  folder = storage.path(place)
  if not storage.is_remote(folder) and hf.is_checkpoint(place):
    if step:
      raise ValueError(f'{path}: a Hugging Face folder has no step {step!r}')
    return Loaded(folder, hf.config(place), step=None, about=None, cache=cache)
  saves = folder / 'checkpoints'
  if not storage.names(saves):
    raise ValueError(
      f'{path}: found neither checkpoints, nor config.json with *.safetensors'
    )
  with checkpoint.Reader(saves) as reader:
    number = reader.pick(step or 'latest', f'{place}: step')
    about = reader.about(number)
  try:
    for knob in NEEDED:
      config.dig(about, knob)
    cfg = config.build(model.Config, about['config']['model'], 'config.model')
  except ValueError as error:
    raise ValueError(f'{saves / str(number)}: {error}') from error
  return Loaded(folder, cfg, step=number, about=about, cache=cache)


def _logits(net: model.Transformer, batch: data.Batch) -> jax.Array:
  return net(batch.tokens, batch.segments, batch.positions)
