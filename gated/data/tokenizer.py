"""Text -> token ids and back: bytes, Hugging Face `tokenizers`, SentencePiece.

Every kind has the same verbs. `encode` also says how many bytes of the text each token
covers, so that bits per byte is exact whatever the vocabulary.

No text can forge a control token. A document that happens to contain '<|endoftext|>' is
spelled out in ordinary tokens, and a tokenizer that cannot do that is refused when it
meets such a document.

A tokenizer's file is a stranger's: what it may ask for is bounded, and whatever its
library makes of it, panics of Rust included, is a ValueError here.

N tokens of one text.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

END = '<|endoftext|>'
# Looked for in this order when the caller names no end-of-text token.
ENDS = (END, '</s>', '<|end_of_text|>', '<eos>', '<|im_end|>', '[SEP]')
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<bos>', '[CLS]')
MAX_FILE = 1 << 26  # Bytes; the largest published vocabularies take about 30 MB.
MAX_VOCAB = 1 << 22  # An array is as long as the largest id.
MAX_GROWTH = 64  # By which the rules of a tokenizer.json may lengthen a text.

Encoded = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A vocabulary and its two verbs.

  encode(text) -> (ids_N, bytes_N), both int32; the bytes sum to len(text.encode()), and
  neither beginning nor end of text is added (a text may have no token at all: spaces, in
  some vocabularies). decode(ids) -> bytes, control tokens left out.
  """

  name: str  # 'bytes', or the name of the file it came from.
  vocab: int
  eos: int  # Ends every document.
  bos: int  # The tokenizer's own beginning of text, or eos where it has none.
  eos_token: str  # Given to load(), it makes the same tokenizer again.
  path: str  # '' for bytes.
  fingerprint: str  # Hexadecimal SHA-256 of all that defines it.
  encode: Callable[[str], Encoded]
  decode: Callable[[Sequence[int] | np.ndarray], bytes]


def load(spec: str, *, eos: str = '') -> Tokenizer:
  """'bytes', the path of a tokenizer.json or of a SentencePiece *.model -> Tokenizer.

  eos='' takes the tokenizer's own end of text. ValueError names the path and the fault.
  """
  if spec == 'bytes':
    return _bytes()
  path = pathlib.Path(spec)
  kinds = [kind for suffix, kind in KINDS.items() if path.name.endswith(suffix)]
  if not kinds:
    allowed = "'bytes', a path that ends in " + ' or '.join(KINDS)
    raise ValueError(f'tokenizer {spec!r}, but allowed are {allowed}')
  if not path.is_file():
    raise ValueError(f'tokenizer {spec!r}: no such file')
  if not 0 < path.stat().st_size <= MAX_FILE:
    size = path.stat().st_size
    raise ValueError(
      f'tokenizer {spec!r} has {size} bytes, but 1 to {MAX_FILE} are allowed'
    )
  return kinds[0](str(path), path.read_bytes(), eos)


def train_bpe(texts: Iterable[str], vocab: int, path: str) -> Tokenizer:
  """Texts -> a byte-level BPE of exactly `vocab` tokens, written to `path`, and loaded.

  Token 0 ends a text and the 256 bytes follow, so no text is out of vocabulary. The same
  texts in the same order give the same file.
  """
  tokenizers = _need('tokenizers')
  if not 257 <= vocab <= MAX_VOCAB:
    least, most = '257 are the least', f'{MAX_VOCAB} are the most'
    raise ValueError(
      f'a byte-level BPE of {vocab} tokens, but {least if vocab < 257 else most}'
    )
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = byte_level(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=[END],
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  if bpe.get_vocab_size() != vocab:
    size = bpe.get_vocab_size()
    raise ValueError(
      f'a BPE of {vocab} tokens was asked for, the text yields only {size}'
    )
  draft = f'{path}.{os.getpid()}'
  pathlib.Path(draft).write_text(bpe.to_str(pretty=True), encoding='utf-8')
  os.replace(draft, path)
  return load(path, eos=END)


def _bytes() -> Tokenizer:
  def encode(text):
    ids_N = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return ids_N, np.ones_like(ids_N)

  def decode(ids):
    ids_N = np.asarray(ids)
    return ids_N[ids_N < 256].astype(np.uint8).tobytes()

  return Tokenizer(
    name='bytes',
    vocab=257,
    eos=256,
    bos=256,
    eos_token='',
    path='',
    fingerprint=hashlib.sha256(b'bytes: 0 to 255, end of text 256').hexdigest(),
    encode=encode,
    decode=decode,
  )


def _hugging_face(path: str, content: bytes, eos: str) -> Tokenizer:
  tokenizers = _need('tokenizers')
  with _faults(path, 'is not a tokenizer.json'):
    model = tokenizers.Tokenizer.from_buffer(content)
    said = json.loads(content)
    kind = (said.get('decoder') or {}).get('type')
  with _faults(path, 'is refused'):
    _check_rules(said)
    _check_ids(model.get_vocab(with_added_tokens=True))
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True  # Control tokens in a text are spelled out.
  vocab = model.get_vocab(with_added_tokens=True)
  eos_token, eos_id = _control(vocab.get, eos, path)
  begins = [vocab[token] for token in BEGINNINGS if token in vocab]
  spelled = _spellings(model) if kind == 'ByteLevel' else {}
  bytes_V = np.zeros(max(vocab.values()) + 1, np.int32)
  bytes_V[list(spelled)] = [len(spelling) for spelling in spelled.values()]

  def encode(text):
    with _faults(path, 'cannot encode a text'):
      pieces = model.encode(text, add_special_tokens=False)
    ids_N = np.array(pieces.ids, np.int32)
    bytes_N = bytes_V[ids_N]
    # A byte-level vocabulary says itself what a token covers, inside characters too,
    # unless it rewrites the text first.
    if eos_id not in ids_N and bytes_N.sum() == len(text.encode()):
      return ids_N, bytes_N
    return _covered(pieces.ids, pieces.offsets, text, eos=eos_token, eos_id=eos_id)

  def decode(ids):
    return b''.join(spelled.get(int(i), b'') for i in ids)

  return Tokenizer(
    name=os.path.basename(path),
    vocab=len(bytes_V),
    eos=eos_id,
    bos=begins[0] if begins else eos_id,
    eos_token=eos_token,
    path=path,
    fingerprint=_digest(content, eos_token),
    encode=encode,
    decode=decode if spelled else _decode(model.decode, path),
  )


def _sentencepiece(path: str, content: bytes, eos: str) -> Tokenizer:
  sentencepiece = _need('sentencepiece')
  model = sentencepiece.SentencePieceProcessor()
  with _faults(path, 'is not a SentencePiece model'):
    model.LoadFromSerializedProto(content)
  if not eos and model.eos_id() >= 0:
    eos = model.id_to_piece(model.eos_id())
  known = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
  eos_token, eos_id = _control(known.get, eos, path)

  def encode(text):
    with _faults(path, 'cannot encode a text'):
      pieces = model.encode(text, return_type='offset_mapping')
    return _covered(pieces['ids'], pieces['offsets'], text, eos=eos_token, eos_id=eos_id)

  return Tokenizer(
    name=os.path.basename(path),
    vocab=model.get_piece_size(),
    eos=eos_id,
    bos=model.bos_id() if model.bos_id() >= 0 else eos_id,
    eos_token=eos_token,
    path=path,
    fingerprint=_digest(content, eos_token),
    encode=encode,
    decode=_decode(model.decode, path),
  )


KINDS = {'.json': _hugging_face, '.model': _sentencepiece}


def _covered(ids: list, spans: list, text: str, *, eos: str, eos_id: int) -> Encoded:
  """Token ids and their spans of characters -> ids and the bytes that each covers.

  What lies between two tokens counts for the later one, a character split over several
  tokens for the one that its span ends first, and what follows the last for the last.
  """
  ids_N = np.array(ids, np.int32)
  if (ids_N == eos_id).any():
    raise ValueError(
      f'a document holds {eos!r}, which the tokenizer takes for its end of text'
    )
  if not len(ids_N):
    return ids_N, ids_N
  ends_N = np.array([end for _, end in spans], np.int64)
  if not text.isascii():
    points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    ends_N = np.concatenate([[0], np.cumsum(widths)])[ends_N]
  ends_N = np.maximum.accumulate(ends_N)
  ends_N[-1] = len(text.encode())
  return ids_N, np.diff(ends_N, prepend=0).astype(np.int32)


def _control(find: Callable[[str], int | None], eos: str, path: str) -> tuple[str, int]:
  """The end-of-text token's spelling and id."""
  for token in (eos,) if eos else ENDS:
    found = find(token)
    if found is not None:
      return token, found
  wanted = repr(eos) if eos else f'any of {", ".join(ENDS)}; name one with --eos'
  raise ValueError(f'tokenizer {path!r} has no end-of-text token {wanted}')


def _decode(decode: Callable[[list[int]], str], path: str) -> Callable[..., bytes]:
  def run(ids):
    with _faults(path, 'cannot decode'):
      return decode([int(i) for i in ids]).encode()

  return run


@contextlib.contextmanager
def _faults(path: str, fault: str) -> Generator[None, None, None]:
  """Turns what a library raises into ValueError; a panic of Rust is no Exception."""
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise ValueError(f'tokenizer {path!r} {fault}: {error}'[:500]) from error


def _check_ids(vocab: dict[str, int]) -> None:
  """Raises ValueError for an id that is too large, or that two tokens share."""
  if max(vocab.values(), default=0) >= MAX_VOCAB:
    raise ValueError(f'the id {max(vocab.values())}, but {MAX_VOCAB - 1} is the largest')
  if len(set(vocab.values())) < len(vocab):
    raise ValueError('two of its tokens have the same id')


def _check_rules(said: dict[str, Any]) -> None:
  """Raises ValueError for rules that blow a text up, or that throw dice."""
  for group in ('normalizer', 'pre_tokenizer', 'decoder'):
    if (times := _growth(said.get(group))) > MAX_GROWTH:
      raise ValueError(
        f'its {group} may make a text {times} times as long, but {MAX_GROWTH} is allowed'
      )
  if said['model'].get('dropout'):
    raise ValueError('its BPE leaves merges out at random (dropout)')


def _growth(rule: Any) -> int:
  """How many times as long the replacements in a rule and those within it make a text."""
  inner = rule.values() if isinstance(rule, dict) else rule
  if not isinstance(rule, (dict, list)):
    return 1
  own = 1
  if isinstance(rule, dict) and rule.get('type') in ('Replace', 'Prepend'):
    # A regular expression may match between all characters, and a part may be short.
    own = max(1, len(rule.get('content', '')) + ('Regex' in rule.get('pattern', {})))
    own += len(rule.get('prepend', ''))
  return own * math.prod(map(_growth, inner))


def _spellings(model: Any) -> dict[int, bytes]:
  """The exact bytes of each token of a byte-level vocabulary, control tokens left out."""
  # GPT-2's table: printable Latin-1 stands for itself, the other bytes follow from 256.
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in plain]
  byte_of = {chr(byte): byte for byte in plain}
  byte_of |= {chr(256 + i): byte for i, byte in enumerate(rest)}
  added = model.get_added_tokens_decoder()
  table = {i: token.content.encode() for i, token in added.items() if not token.special}
  for token, i in model.get_vocab(with_added_tokens=False).items():
    if i not in added and all(char in byte_of for char in token):
      table[i] = bytes(byte_of[char] for char in token)
  return table


def _digest(content: bytes, eos_token: str) -> str:
  return hashlib.sha256(content + b'\0' + eos_token.encode()).hexdigest()


def _need(package: str) -> Any:
  """An optional package, imported only when a tokenizer asks for it."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ValueError(f'this tokenizer needs a package: pip install {package}') from error
