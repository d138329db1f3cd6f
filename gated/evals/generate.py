"""Continues texts: all rows of a batch in lockstep, with a cache of keys and values.

Row b holds a prompt and its continuation from slot 0 on, so a token's slot is its
position, in the row and in the cache. Prompts may differ in length: prefill fills the
cache in chunks of tokens up to the longest prompt, and a slot beyond a row's own tokens
holds garbage that the causal mask hides until the row's own token replaces it. A step
of the loop feeds each row's last token and appends the next one.

Experts with a capacity have no cache: later tokens decide which earlier ones an expert
drops. Each step of the same loop then runs the model on the whole rows.

B batch  N tokens of a row  S cached tokens (= N)  T tokens of a call  V vocabulary
L layers  G KV heads  K head width
"""

import bisect
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gated import model
from gated.data.tokenizer import Tokenizer
from gated.devices import mesh
from gated.evals import sampling
from gated.evals.sampling import Sampling
from gated.model import attention

log = logging.getLogger('gated')

CHUNK = 256  # Tokens of a row that prefill takes at a time.
SHORTEST = 16  # Minimum slots of a row.
STOP_EVERY = 32  # Tokens between two searches for stop strings.

AXES = ('layers', 'batch', None, 'kv_heads', None)  # Of the cache, (L, B, S, G, K).


class Rows(NamedTuple):
  """The state of the loop."""

  token_BN: Any
  count_B: Any  # tokens so far, the prompt's included
  done_B: Any
  cache: tuple[jax.Array, ...]  # keys and values, (L, B, S, G, K) each; () for no cache


class Knobs(NamedTuple):
  """Options that do not change the program."""

  limit_B: Any  # maximum tokens of a row, the prompt's included
  end: Any  # the token that ends a text; -1 for none
  vocab: Any  # all drawn ids are below this
  temperature: Any
  top_p: Any
  seed: Any


def texts(
  prompts: Sequence[Any],
  options: Sampling,
  *,
  cfg: model.Config,
  read_model: Callable[[], model.Transformer],
  on: Mesh,
  read_tokenizer: Callable[[], Tokenizer],
  context: int,
) -> list[Any]:
  """Prompts -> their continuations, without the stop string or the end-of-text token.

  A string prompt gives a string, token ids give an int32 array. The tokenizer is read
  only if a prompt or a stop string needs it; its end-of-text token then ends a
  continuation too. Among token ids, the token that completes a stop string is dropped. A
  warning is logged if rows may exceed the `context` that the model was trained on (0:
  unknown). ValueError names a prompt that is empty or outside the vocabulary.
  """
  if isinstance(prompts, (str, bytes)) or not len(prompts):
    raise ValueError(f'prompts={prompts!r:.100}, but a list of texts is expected')
  needed = options.stop or any(isinstance(prompt, str) for prompt in prompts)
  tokenizer = read_tokenizer() if needed else None
  ids = [
    _encode(prompt, f'prompts[{i}]', cfg.vocab, tokenizer)
    for i, prompt in enumerate(prompts)
  ]
  warn(cfg, max(map(len, ids)), options.max_tokens, context)
  new = run(read_model(), ids, options, on=on, tokenizer=tokenizer, context=context)
  if tokenizer is None:
    return new
  stops = [Stop(tokenizer, tokens, options.stop) for tokens in ids]
  return [
    stop.text(tokens)[0] if isinstance(prompt, str) else stop.before(tokens)
    for prompt, stop, tokens in zip(prompts, stops, new)
  ]


def run(
  net: model.Transformer,
  prompts: Sequence[np.ndarray],
  options: Sampling,
  *,
  on: Mesh,
  tokenizer: Tokenizer | None,
  context: int,
) -> list[np.ndarray]:
  """Token ids of prompts -> the ids that continue them; all processes must call it.

  As `texts`, without the checks. Some tokens may follow a stop string. Stop strings need
  a tokenizer.
  """
  cfg, on = net.cfg, _joined(on)
  cached, longest = _has_cache(cfg), max(map(len, prompts))
  chunk = min(CHUNK, _rounded(longest))
  # The loop itself feeds the last token of each prompt.
  chunks = -(-(longest - 1) // chunk)
  slots = _rounded(max(longest + options.max_tokens, chunks * chunk))
  # The experts' capacity is proportional to the length of a row.
  slots = slots if cached else max(slots, context)
  every = STOP_EVERY if options.stop else options.max_tokens
  filters = dict(top_k=1 if options.greedy else options.top_k, with_p=options.top_p < 1)
  fill, decode = (model.exact(cfg.numerics, run) for run in (prefill, _decode))
  with jax.set_mesh(on):
    put = functools.partial(jax.device_put, device=NamedSharding(on, P()))
    net = jax.device_put(net, mesh.shardings(net, on))
    rows, knobs = put(_start(prompts, options, slots, mesh.ways('batch', on), tokenizer))
    if cached:
      cache = fill(net, rows.token_BN, put(np.int32(chunks)), chunk=chunk)
      rows = rows._replace(cache=cache)
    for start in range(0, options.max_tokens, every):
      steps = min(every, options.max_tokens - start)
      rows = decode(net, rows, knobs, put(np.int32(steps)), **filters)
      token_BN, count_B, done_B = (np.array(x) for x in rows[:3])
      new = [row[len(a) : n] for a, row, n in zip(prompts, token_BN, count_B)]
      for i in range(len(prompts) if options.stop else 0):
        assert tokenizer
        done_B[i] |= Stop(tokenizer, prompts[i], options.stop).text(new[i])[1]
      if done_B.all():
        break
      rows = rows._replace(done_B=put(done_B))
  return new


class Stop(NamedTuple):
  """The stop strings of one prompt's continuation."""

  tokenizer: Tokenizer
  prompt: np.ndarray
  strings: tuple[str, ...]

  def text(self, new: np.ndarray) -> tuple[str, bool]:
    """A continuation -> (its text before the first stop string, whether it has one)."""
    decode = self.tokenizer.decode
    whole, head = decode([*self.prompt, *new]), decode(self.prompt)
    # A tokenizer may drop a space from the start of a text.
    text = whole[len(head) :] if whole.startswith(head) else decode(new)
    places = [text.find(string.encode()) for string in self.strings]
    ends = [place for place in places if place >= 0]
    return text[: min(ends, default=None)].decode(errors='replace'), bool(ends)

  def before(self, new: np.ndarray) -> np.ndarray:
    """A continuation -> its tokens before the one that completes a stop string."""
    stopped = lambda count: self.text(new[:count])[1]
    return new[: max(bisect.bisect_left(range(len(new) + 1), True, key=stopped) - 1, 0)]


def _encode(
  prompt: Any, name: str, vocab: int, tokenizer: Tokenizer | None
) -> np.ndarray:
  """A text or ids -> checked ids."""
  if isinstance(prompt, str):
    assert tokenizer
    ids = tokenizer.encode(prompt)[0]
  else:
    ids = np.asarray(prompt)
  if not ids.size:
    raise ValueError(f'{name}={prompt!r} has no tokens, but at least one is needed')
  if ids.ndim != 1 or ids.dtype.kind not in 'iu':
    raise ValueError(f'{name}={prompt!r:.100}, but a text or a list of ids is expected')
  if ids.min() < 0 or ids.max() >= vocab:
    worst = ids.min() if ids.min() < 0 else ids.max()
    raise ValueError(f'{name} has the token id {worst}, but ids must be in [0, {vocab})')
  return ids.astype(np.int32)


def warn(cfg: model.Config, longest: int, more: int, context: int) -> None:
  """Warns if a prompt and `more` tokens exceed the context, and if there is no cache."""
  yarn = cfg.attn.yarn
  if yarn.factor > 1:
    context = max(context, int(yarn.factor * yarn.original))
  if 0 < context < longest + more:
    log.warning(
      f'a prompt of {longest} tokens and max_tokens={more} exceed the {context} tokens '
      'that the model was trained on'
    )
  if not _has_cache(cfg):
    log.warning(
      "config.model.moe.dispatch='capacity' allows no cache of keys and values: each "
      'token runs the model on the whole row'
    )


def _has_cache(cfg: model.Config) -> bool:
  return not (cfg.moe.experts and cfg.moe.dispatch == 'capacity')


def _rounded(count: int) -> int:
  """A number of tokens -> a power of two up to CHUNK, then a multiple of it."""
  if count > CHUNK:
    return -(-count // CHUNK) * CHUNK
  return max(SHORTEST, 1 << (count - 1).bit_length())


def _joined(on: Mesh) -> Mesh:
  """The same devices, with the context axis merged into `data`.

  A step has one token per row, which the context axis cannot split.
  """
  if on.shape['context'] == 1:
    return on
  at = dict(zip(on.axis_names, range(on.devices.ndim)))
  devices = np.moveaxis(on.devices, at['context'], at['data'] + 1)
  sizes = dict(on.shape) | {'data': on.shape['data'] * on.shape['context'], 'context': 1}
  return Mesh(devices.reshape(*sizes.values()), on.axis_names, axis_types=on.axis_types)


def _start(
  prompts: Sequence[np.ndarray],
  options: Sampling,
  slots: int,
  ways: int,
  tokenizer: Tokenizer | None,
) -> tuple[Rows, Knobs]:
  """The rows before the first step, padded with rows that are done for `ways` shards."""
  count = len(prompts)
  total = -(-count // ways) * ways
  token_BN = np.zeros((total, slots), np.int32)
  count_B = np.ones(total, np.int32)
  for i, prompt in enumerate(prompts):
    token_BN[i, : len(prompt)], count_B[i] = prompt, len(prompt)
  rows = Rows(token_BN, count_B, np.arange(total) >= count, ())
  knobs = Knobs(
    limit_B=count_B + np.int32(options.max_tokens),
    end=np.int32(tokenizer.eos if tokenizer else -1),
    vocab=np.int32(tokenizer.vocab if tokenizer else np.iinfo(np.int32).max),
    temperature=np.float32(1 if options.greedy else options.temperature),
    top_p=np.float32(options.top_p),
    seed=np.uint32(options.seed),
  )
  return rows, knobs


@functools.partial(jax.jit, static_argnames='chunk')
def prefill(net: model.Transformer, token_BN, chunks, *, chunk: int):
  """The keys and values of the first `chunks` chunks of all rows -> a cache."""
  cfg, (B, N) = net.cfg, token_BN.shape
  shape = cfg.depth, B, N, cfg.attn.kv_heads, cfg.attn.head_dim
  empty = mesh.constrain(jnp.zeros(shape, cfg.numerics.compute), *AXES)

  def take(i, cache):
    token_BT = jax.lax.dynamic_slice_in_dim(token_BN, i * chunk, chunk, 1)
    start_B = jnp.full(B, i * chunk, jnp.int32)
    return extend(net, token_BT, start_B, cache)[1]

  return jax.lax.fori_loop(0, chunks, take, (empty, empty))


@functools.partial(jax.jit, static_argnames=('top_k', 'with_p'), donate_argnames='rows')
def _decode(net, rows: Rows, knobs: Knobs, steps, *, top_k: int, with_p: bool):
  """Appends up to `steps` tokens to each row, until all rows are done."""
  row_B = jnp.arange(len(rows.count_B))

  def step(carry):
    i, rows = carry
    logit_BV, cache = _next(net, rows)
    logit_BV = mesh.constrain(logit_BV, 'batch', None)
    beyond = jnp.arange(logit_BV.shape[1]) >= knobs.vocab
    logit_BV = jnp.where(beyond[None], -jnp.inf, logit_BV)
    key_B = sampling.keys(knobs.seed, row_B, rows.count_B)
    top_p = knobs.top_p if with_p else None
    score_BV = (logit_BV - logit_BV.max(-1, keepdims=True)) / knobs.temperature
    token_B = sampling.draw(score_BV, key_B, top_k=top_k, top_p=top_p)
    going_B = ~rows.done_B & (token_B != knobs.end)
    # Rows that are done write to a slot outside of the row, which drops the token.
    slot_B = jnp.where(going_B, rows.count_B, rows.token_BN.shape[1])
    token_BN = rows.token_BN.at[row_B, slot_B].set(token_B, mode='drop')
    count_B = rows.count_B + going_B
    done_B = ~going_B | (count_B >= knobs.limit_B)
    state = [mesh.constrain(x) for x in (token_BN, count_B, done_B)]
    return i + 1, Rows(*state, cache)

  going = lambda carry: (carry[0] < steps) & ~carry[1].done_B.all()
  rows = jax.lax.while_loop(going, step, (jnp.int32(0), rows))[1]
  # Each process reads the results, so each must hold them whole.
  return Rows(*map(mesh.constrain, rows[:3]), rows.cache)


def _next(net: model.Transformer, rows: Rows) -> tuple[jax.Array, tuple]:
  """-> the logits of each row's next token (B, V), and the cache after its last token."""
  last_B = rows.count_B - 1
  if rows.cache:
    token_B1 = jnp.take_along_axis(rows.token_BN, last_B[:, None], 1)
    x_B1D, cache = extend(net, token_B1, last_B, rows.cache)
    return net.logits(x_B1D)[:, 0], cache
  live_BN = jnp.arange(rows.token_BN.shape[1])[None] < rows.count_B[:, None]
  token_BN = mesh.constrain(rows.token_BN, 'batch', 'tokens')
  x_BND, _ = net.hidden(token_BN, live_BN.astype(jnp.int32))
  x_B1D = jnp.take_along_axis(x_BND, last_B[:, None, None], 1)
  return net.logits(x_B1D)[:, 0], ()


def extend(
  net: model.Transformer, token_BT: jax.Array, start_B: jax.Array, cache: tuple
) -> tuple[jax.Array, tuple]:
  """T tokens from positions start_B on -> (their hidden states, the cache with them)."""

  def through(block, x_BTD, angle_BTk, segment_BT, live_BT, layer):
    earlier = attention.Cache(*layer, start_B)
    trace = block.trace(x_BTD, angle_BTk, segment_BT, live_BT, earlier)
    return trace.output, (trace.attn.key, trace.attn.value)

  position_BT = start_B[:, None] + jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None]
  token_BT = mesh.constrain(token_BT, 'batch', 'tokens')
  x_BTD, new = net.hidden(token_BT, None, position_BT, through=through, cache=cache)
  write = jax.vmap(attention.put, (0, 0, None))
  store = lambda old, x: mesh.constrain(write(old, x, start_B), *AXES)
  return x_BTD, tuple(map(store, cache, new))
