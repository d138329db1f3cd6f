"""Text -> token ids and back: bytes, Hugging Face `tokenizers`, SentencePiece.

All kinds have the same methods. `encode` also returns the bytes of text per token, so
that bits per byte are exact for every vocabulary.

No text can produce a control token. '<|endoftext|>' in a document becomes ordinary
tokens; a tokenizer that cannot do that raises ValueError at such a document.

The files of tokenizers are untrusted: their sizes are limited, and all errors of their
libraries, panics of Rust included, become ValueError.

N tokens of one text.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from gated import storage
from gated.data import cuts, rules

END = '<|endoftext|>'
# Usual names of the end-of-text token, in order of preference.
ENDS = (END, '</s>', '<|end_of_text|>', '<eos>', '<|im_end|>', '[SEP]')
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<bos>', '[CLS]')
BYTE = re.compile(r'<0x[0-9A-F]{2}>')  # Spelling of a single byte in many vocabularies.
MAX_FILE = 1 << 26  # Bytes; the largest published vocabularies take about 30 MB.

Encoded = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A vocabulary and its two functions.

  encode(text) -> (ids_N, bytes_N), both int32, without beginning and end of text. The
  bytes sum to len(text.encode()) unless the text has no token: some vocabularies drop
  spaces. decode(ids) -> bytes, without control tokens. head(text) -> the characters of
  the first part of a text, and its `encode` as a part of the whole; 0 if there is no cut.
  sizes(ids_N) -> bytes_N, of ids without their text. many(texts) -> the ids of each text,
  on all cores.
  """

  name: str = 'bytes'  # Or the name of its file.
  vocab: int
  eos: int  # Ends every document.
  bos: int  # The beginning of text, or eos for a vocabulary without one.
  bos_token: str = ''  # '' for a vocabulary without one.
  unk: int = -1  # Stands for unknown text; -1 for a vocabulary without one.
  eos_token: str = ''  # load(path, eos=eos_token) gives the same tokenizer.
  path: str = ''  # '' for bytes.
  fingerprint: str  # Hexadecimal SHA-256 of the complete definition.
  encode: Callable[[str], Encoded]
  decode: Callable[[Sequence[int] | np.ndarray], bytes]
  sizes: Callable[[np.ndarray], np.ndarray]
  head: Callable[[str], tuple[int, Any]] | None = None  # None: a text is never cut.
  many: Callable[[list[str]], list[np.ndarray]] | None = None  # None: one by one.

  def ids(self, texts: Iterable[str]) -> list[np.ndarray]:
    """Texts -> the ids of each, as `encode` returns them."""
    texts = list(texts)
    return self.many(texts) if self.many else [self.encode(text)[0] for text in texts]


def load(spec: str, *, eos: str = '', bos: str = '') -> Tokenizer:
  """'bytes', the path of a tokenizer.json or of a SentencePiece *.model -> Tokenizer.

  eos='' and bos='' select the usual tokens. ValueError names the path and the fault.
  """
  if spec == 'bytes':
    if bos:
      raise ValueError(f"tokenizer 'bytes' has no beginning-of-text token {bos!r}")
    return _bytes()
  path = pathlib.Path(spec)
  if path.suffix not in KINDS:
    raise ValueError(
      f"tokenizer {spec!r}, but allowed are 'bytes', a path that ends in "
      + ' or '.join(KINDS)
    )
  if not path.is_file():
    raise ValueError(f'tokenizer {spec!r}: no such file')
  if not 0 < (size := path.stat().st_size) <= MAX_FILE:
    raise ValueError(
      f'tokenizer {spec!r} has {size} bytes, but 1 to {MAX_FILE} are allowed'
    )
  content = path.read_bytes()
  fields = KINDS[path.suffix](spec, content, eos, bos)
  digest = hashlib.sha256(content + b'\0' + fields['eos_token'].encode()).hexdigest()
  return Tokenizer(name=path.name, path=spec, fingerprint=digest, **fields)


def train_bpe(texts: Iterable[str], vocab: int, path: str) -> Tokenizer:
  """Texts -> a byte-level BPE of exactly `vocab` tokens, written to `path`, and loaded.

  Token 0 ends a text and the 256 bytes follow, so the vocabulary covers every text. The
  same texts in the same order give the same file.
  """
  tokenizers = optional('tokenizers')
  if not 257 <= vocab <= rules.MAX_VOCAB:
    raise ValueError(
      f'a byte-level BPE of {vocab} tokens, but 257 to {rules.MAX_VOCAB} are allowed'
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
  if (size := bpe.get_vocab_size()) != vocab:
    raise ValueError(f'a BPE of {vocab} tokens, but the text yields only {size}')
  storage.write(path, bpe.to_str(pretty=True).encode())
  return load(path, eos=END)


def optional(package: str) -> Any:
  """Imports an optional package; ValueError says how to install it."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    name = package.partition('.')[0]
    raise ValueError(f'this file needs a package: pip install {name}') from error


def _bytes() -> Tokenizer:
  def encode(text):
    ids_N = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return ids_N, np.ones_like(ids_N)

  def decode(ids):
    ids_N = np.asarray(ids)
    return ids_N[ids_N < 256].astype(np.uint8).tobytes()

  digest = hashlib.sha256(b'bytes: 0 to 255, end of text 256').hexdigest()
  return Tokenizer(
    vocab=257,
    eos=256,
    bos=256,
    fingerprint=digest,
    encode=encode,
    decode=decode,
    sizes=lambda ids_N: (ids_N < 256).astype(np.int32),
    head=lambda text: (len(text), encode(text)),
  )


def _hugging_face(path: str, content: bytes, eos: str, bos: str) -> dict[str, Any]:
  tokenizers = optional('tokenizers')
  with _faults(path, 'is not a tokenizer.json'):
    model = tokenizers.Tokenizer.from_buffer(content)
    settings = json.loads(content)
    decoder = settings.get('decoder') or {}
  with _faults(path, 'is refused'):
    vocab = model.get_vocab(with_added_tokens=True)
    rules.check(settings, vocab)
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True  # Control tokens in a text become ordinary tokens.
  eos_token, eos_id = _find_eos(vocab.get, eos, path)
  bos_token = _find_bos(vocab, bos, BEGINNINGS, path)
  unk = settings['model'].get('unk_id', vocab.get(settings['model'].get('unk_token'), -1))
  spellings = rules.spellings(model) if decoder.get('type') == 'ByteLevel' else {}
  bytes_V = np.zeros(max(vocab.values()) + 1, np.int32)
  bytes_V[list(spellings)] = [len(spelling) for spelling in spellings.values()]

  def split(text):
    with _faults(path, 'cannot encode a text'):
      return model.encode(text, add_special_tokens=False)

  def measured(pieces, count, text):
    ids_N = np.array(pieces.ids[:count], np.int32)
    bytes_N = bytes_V[ids_N]
    # The sizes of byte-level tokens are exact, even for parts of a character, unless the
    # tokenizer rewrites the text first.
    if eos_id not in ids_N and bytes_N.sum() == len(text.encode()):
      return ids_N, bytes_N
    spans = pieces.offsets[:count]
    return _covered(ids_N, spans, text, eos=eos_token, eos_id=eos_id)

  def encode(text):
    return measured(split(text), None, text)

  def many(texts):
    with _faults(path, 'cannot encode a text'):
      found = model.encode_batch_fast(texts, add_special_tokens=False)
    # A text with the end of text is refused, unless the tokenizer reads it as a text.
    return [
      encode(text)[0] if eos_id in pieces.ids else np.array(pieces.ids, np.int32)
      for text, pieces in zip(texts, found, strict=True)
    ]

  def head(text):
    pieces = split(text)
    count, length = cuts.find(split, pieces, text)
    return length, measured(pieces, count, text[:length]) if length else None

  def spell(ids):
    return b''.join(spellings.get(int(i), b'') for i in ids)

  decode = spell if spellings else _decoder(model.decode, path)
  sizes = bytes_V.__getitem__ if spellings else _sizes(encode, decode, model.id_to_token)
  return {
    'vocab': len(bytes_V),
    'eos': eos_id,
    'bos': vocab.get(bos_token, eos_id),
    'bos_token': bos_token,
    'unk': unk if isinstance(unk, int) else -1,
    'eos_token': eos_token,
    'encode': encode,
    'head': head,
    'decode': decode,
    'sizes': sizes,
    'many': many,
  }


def _sentencepiece(path: str, content: bytes, eos: str, bos: str) -> dict[str, Any]:
  model = optional('sentencepiece').SentencePieceProcessor()
  with _faults(path, 'is not a SentencePiece model'):
    model.LoadFromSerializedProto(content)
  if not eos and model.eos_id() >= 0:
    eos = model.id_to_piece(model.eos_id())
  vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
  eos_token, eos_id = _find_eos(vocab.get, eos, path)
  usual = [model.id_to_piece(model.bos_id())] if model.bos_id() >= 0 else []
  bos_token = _find_bos(vocab, bos, usual, path)

  def encode(text):
    with _faults(path, 'cannot encode a text'):
      pieces = model.encode(text, return_type='offset_mapping')
    return _covered(pieces['ids'], pieces['offsets'], text, eos=eos_token, eos_id=eos_id)

  decode = _decoder(model.decode, path)
  return {
    'vocab': model.get_piece_size(),
    'eos': eos_id,
    'bos': vocab.get(bos_token, eos_id),
    'bos_token': bos_token,
    'unk': model.unk_id(),
    'eos_token': eos_token,
    'encode': encode,
    'decode': decode,
    'sizes': _sizes(encode, decode, model.id_to_piece),
  }


KINDS = {'.json': _hugging_face, '.model': _sentencepiece}


def _covered(
  ids: Sequence[int] | np.ndarray, spans: list, text: str, *, eos: str, eos_id: int
) -> Encoded:
  """Token ids and their spans of characters -> ids and the bytes that each covers.

  Text between two tokens counts for the later token, and text after the last token counts
  for the last one. A character that spans several tokens counts for the first token whose
  span ends after it.
  """
  ids_N = np.array(ids, np.int32)
  if (ids_N == eos_id).any():
    raise ValueError(
      f'a document contains {eos!r}, which the tokenizer encodes as its end of text'
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


def _find_eos(find: Callable[[str], int | None], eos: str, path: str) -> tuple[str, int]:
  """The end-of-text token and its id."""
  for token in (eos,) if eos else ENDS:
    if (number := find(token)) is not None:
      return token, number
  names = repr(eos) if eos else f'any of {", ".join(ENDS)}; name one with --eos'
  raise ValueError(f'tokenizer {path!r} has no end-of-text token {names}')


def _find_bos(vocab: dict[str, int], bos: str, usual: Sequence[str], path: str) -> str:
  """The beginning-of-text token, or '' for a vocabulary without a usual one."""
  if bos and bos not in vocab:
    raise ValueError(f'tokenizer {path!r} has no beginning-of-text token {bos!r}')
  return bos or next((token for token in usual if token in vocab), '')


def _decoder(decode: Callable[[list[int]], str], path: str) -> Callable[..., bytes]:
  def run(ids):
    with _faults(path, 'cannot decode'):
      return decode([int(i) for i in ids]).encode()

  return run


def _sizes(
  encode: Callable[[str], Encoded],
  decode: Callable[..., bytes],
  spelling: Callable[[int], str],
) -> Callable[[np.ndarray], np.ndarray]:
  """-> the bytes of text per token of a vocabulary that is not byte-level.

  Some libraries drop the space of the first token, so each is measured behind a letter.
  """

  @functools.cache
  def size(i: int) -> int:
    if BYTE.fullmatch(spelling(i) or ''):
      return 1
    before = encode('a')[0]
    return max(0, len(decode([*before, i])) - len(decode(before)))

  return lambda ids_N: np.array([size(int(i)) for i in ids_N], np.int32)


@contextlib.contextmanager
def _faults(path: str, fault: str) -> Generator[None, None, None]:
  """Turns the errors of a library, and Rust panics (BaseException), into ValueError."""
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise ValueError(f'tokenizer {path!r} {fault}: {error}'[:500]) from error
