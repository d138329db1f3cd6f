"""The rules in a tokenizer.json, checked before use; the bytes of its tokens."""

import itertools
import math
from typing import Any

MAX_VOCAB = 1 << 22  # Limits an array with one entry per id.
MAX_GROWTH = 64  # Factor by which the rules of a tokenizer.json may lengthen a text.


def check(settings: dict[str, Any], vocab: dict[str, int]) -> None:
  """Raises ValueError for bad ids, random rules, and rules that lengthen a text a lot."""
  if max(vocab.values(), default=0) >= MAX_VOCAB:
    raise ValueError(f'the id {max(vocab.values())}, but {MAX_VOCAB - 1} is the largest')
  if len(set(vocab.values())) < len(vocab):
    raise ValueError('two of its tokens have the same id')
  for group in ('normalizer', 'pre_tokenizer', 'decoder'):
    if (factor := _growth(settings.get(group))) > MAX_GROWTH:
      raise ValueError(
        f'its {group} may make a text {factor} times as long, but {MAX_GROWTH} is allowed'
      )
  if settings['model'].get('dropout'):
    raise ValueError('its BPE omits merges at random (dropout)')


def _growth(rule: Any) -> int:
  """The factor by which a rule, with the rules in it, may lengthen a text."""
  if isinstance(rule, list):
    return math.prod(map(_growth, rule))
  if not isinstance(rule, dict):
    return 1
  factor = math.prod(map(_growth, rule.values()))
  if rule.get('type') == 'Replace':
    # A regular expression may match between all characters, and a match may be short.
    factor *= max(1, len(rule['content']) + ('Regex' in rule['pattern']))
  if rule.get('type') == 'Prepend':
    factor *= 1 + len(rule['prepend'])
  return factor


def spellings(model: Any) -> dict[int, bytes]:
  """The exact bytes of each token of a byte-level vocabulary, without control tokens."""
  # In GPT-2's table printable Latin-1 represents itself; other bytes follow from 256.
  plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = itertools.count(256)
  byte_of = {chr(i if i in plain else next(others)): i for i in range(256)}
  added = model.get_added_tokens_decoder()
  table = {i: token.content.encode() for i, token in added.items() if not token.special}
  for token, i in model.get_vocab(with_added_tokens=False).items():
    if i not in added and all(char in byte_of for char in token):
      table[i] = bytes(byte_of[char] for char in token)
  return table
