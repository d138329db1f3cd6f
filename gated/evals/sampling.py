"""The choice of the next token: options, top-k and top-p filters, the draw.

B batch  V vocabulary  k kept tokens
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated import config

LARGEST = 1 << 24  # Upper limit of max_tokens, far above any use.


@dataclass(frozen=True, kw_only=True)
class Sampling:
  """Options of a continuation. ValueError for an option out of range."""

  max_tokens: int = 128  # maximum new tokens of a row
  temperature: float = 1.0  # divides the logits; 0: the most probable token
  top_k: int = 0  # keeps the k most probable tokens; 0: all
  top_p: float = 1.0  # keeps the fewest tokens whose probabilities sum to this
  stop: tuple[str, ...] = ()  # a continuation ends before any of these strings
  seed: int = 0

  def __post_init__(self):
    for name in ('max_tokens', 'top_k', 'seed'):
      value = getattr(self, name)
      if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f'{name}={value!r}, but an int is expected')
    config.within('max_tokens', self.max_tokens, 1, LARGEST)
    config.at_least('temperature', self.temperature, 0.0)
    if not math.isfinite(self.temperature):
      raise ValueError(f'temperature={self.temperature!r}, but it must be finite')
    config.at_least('top_k', self.top_k, 0)
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p!r}, but it must be in (0, 1]')
    config.within('seed', self.seed, 0, 2**32 - 1)
    strings = isinstance(self.stop, (list, tuple)) and all(
      isinstance(string, str) and string for string in self.stop
    )
    if not strings:
      raise ValueError(
        f'stop={self.stop!r}, but a sequence of strings that are not empty is expected'
      )

  @property
  def greedy(self) -> bool:
    """Whether the temperature is 0, or below the smallest normal float32."""
    return bool(np.float32(self.temperature) < np.finfo(np.float32).tiny)


def define(
  flags: Any, *, excludes: Sequence[str]
) -> Callable[[], tuple[list[str], dict[str, Any]]]:
  """Defines --prompt and a flag for each option -> a function that reads them.

  The function returns the prompts and the options of `Sampling`. ValueError names a flag
  with a wrong value, an option without --prompt, or a flag of `excludes` with --prompt.
  `flags` is absl's module.
  """
  prompt = flags.DEFINE_multi_string(
    'prompt', [], 'Continues this text instead of measuring; may be repeated.'
  )
  makers = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
  helps = {
    'max_tokens': 'With --prompt: new tokens, at most.',
    'temperature': 'With --prompt: divides the logits; 0 takes the most probable token.',
    'top_k': 'With --prompt: draws from the k most probable tokens; 0 from all.',
    'top_p': 'With --prompt: draws from the fewest tokens of this probability.',
    'stop': 'With --prompt: a continuation ends before this string; may be repeated.',
    'seed': 'With --prompt: the seed of the draws.',
  }
  options = {
    field.name: makers.get(type(field.default), flags.DEFINE_multi_string)(
      field.name, field.default, helps[field.name]
    )
    for field in fields(Sampling)
  }

  def read():
    values = {name: flag.value for name, flag in options.items()}
    values['stop'] = tuple(_text('stop', text) for text in values['stop'])
    prompts = [_text('prompt', text) for text in prompt.value]
    for name in excludes if prompt.value else options:
      if flags.FLAGS[name].present:
        side = 'with' if prompt.value else 'without'
        value = flags.FLAGS[name].value
        raise ValueError(f'--{name}={value!r} is not allowed {side} --prompt')
    if not all(prompt.value):
      raise ValueError("--prompt='' has no tokens, but at least one is needed")
    try:
      Sampling(**values)
    except ValueError as error:
      raise ValueError(f'--{error}') from error
    return prompts, values

  return read


def _text(flag: str, value: str) -> str:
  """A value from the command line -> its text, read as UTF-8 in any locale."""
  try:
    return value.encode('utf-8', 'surrogateescape').decode()
  except UnicodeError as error:
    raise ValueError(f'--{flag}={value!r} is not UTF-8') from error


def keep(
  logit_BV: jax.Array, top_k: int, top_p: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Logits -> the logits of the kept tokens (B, k) and their ids (B, k), by rank.

  First keeps the `top_k` largest logits (0: all); among equals the smaller id comes
  first. Of these keeps the fewest whose probabilities sum to at least `top_p`, and sets
  the logits of the others to -inf. None skips the second filter.
  """
  V = logit_BV.shape[-1]
  logit_Bk, id_Bk = jax.lax.top_k(logit_BV, min(top_k or V, V))
  if top_p is not None:
    p_Bk = jax.nn.softmax(logit_Bk, -1)
    before_Bk = jnp.cumsum(p_Bk, -1) - p_Bk
    # Rounding must not drop the first token.
    first_k = jnp.arange(logit_Bk.shape[-1]) == 0
    logit_Bk = jnp.where((before_Bk < top_p) | first_k[None], logit_Bk, -jnp.inf)
  return logit_Bk, id_Bk


def draw(
  logit_BV: jax.Array, key_B: jax.Array, *, top_k: int, top_p: jax.Array | None
) -> jax.Array:
  """Logits and a key for each row -> (B,): for each row, a token that `keep` keeps."""
  draw_rows = jax.vmap(jax.random.categorical)
  if not top_k and top_p is None:
    return draw_rows(key_B, logit_BV)
  logit_Bk, id_Bk = keep(logit_BV, top_k, top_p)
  rank_B1 = draw_rows(key_B, logit_Bk)[:, None]
  return jnp.take_along_axis(id_Bk, rank_B1, 1)[:, 0]


def keys(seed: jax.Array, row_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """A key for each row, from the seed, the row, and the position of the drawn token."""
  of_seed = jax.random.key(seed)
  fold = lambda row, position: jax.random.fold_in(
    jax.random.fold_in(of_seed, row), position
  )
  return jax.vmap(fold)(row_B, position_B)
