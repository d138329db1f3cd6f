"""A tokenizer -> the files with which transformers gives the same ids.

A SentencePiece model is also written as a tokenizer.json, because transformers 5 reads
the model itself in another way: it drops a leading space.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gated import storage
from gated.data import tokenizer

FILE, SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
# Texts that tell two readings of a SentencePiece model apart.
PROBES = (
  'two words',
  ' led by a space',
  '  two  spaces  ',
  'a\tb\r\n\n c',
  '1,234.5',
  'na\u00efve \u00c9\u00e9 e\u0301',
  '\u0421\u044a\u0435\u0448\u044c \u0436\u0435',
  '\u6211\u80fd\u541e\u4e0b',
  '\U0001f600',
  '\u2581x \u2581',
)
# Kinds of pieces in a SentencePiece model.
NORMAL, UNKNOWN, CONTROL, DEFINED, _, BYTE = range(1, 7)


def write(token: tokenizer.Tokenizer, folder: Path, *, begins: bool) -> list[str]:
  """Writes a tokenizer's files -> warnings: in what transformers may tokenize otherwise.

  `begins`: documents begin with the beginning-of-text token, and so do texts there.
  """
  source, warnings = Path(token.path), []
  copy = folder / f'tokenizer{source.suffix}'
  shutil.copyfile(source, copy)
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': token.eos_token,
    # transformers pads with the end of text, as the rows of the data do.
    'pad_token': token.eos_token,
    'clean_up_tokenization_spaces': False,
  }
  if token.bos_token:
    settings['bos_token'] = token.bos_token
  if copy.name == FILE:
    content = copy.read_bytes()
  elif (content := converted(source, token)) is None:
    settings['tokenizer_class'] = 'LlamaTokenizer'
    warnings.append(f'{source} is copied, but transformers may read it in another way')
  if content is not None and (changed := _with_ends(content, token, begins)) is not None:
    storage.write(folder / FILE, changed)
  storage.write_json(folder / SETTINGS, settings)
  return warnings


def _with_ends(content: bytes, token: tokenizer.Tokenizer, begins: bool) -> bytes | None:
  """A tokenizer.json -> the same, adding to a text what documents have; None if it is.

  Published files often add a beginning of text, which the documents of a run may lack.
  """
  import tokenizers

  model = tokenizers.Tokenizer.from_buffer(content)
  added = [token.bos] if begins else []
  if model.encode('x').ids == added + model.encode('x', add_special_tokens=False).ids:
    return None if content == Path(token.path).read_bytes() else content
  settings = json.loads(content)
  settings['post_processor'] = _beginning(token) if begins else None
  return json.dumps(settings, ensure_ascii=False).encode()


def _beginning(token: tokenizer.Tokenizer) -> dict[str, Any]:
  """The post-processor that puts the beginning of text before a text."""
  name = token.bos_token or token.eos_token
  piece = lambda kind, name, i: {kind: {'id': name, 'type_id': i}}
  single = [piece('SpecialToken', name, 0), piece('Sequence', 'A', 0)]
  special = {name: {'id': name, 'ids': [token.bos], 'tokens': [name]}}
  pair = [*single, piece('SpecialToken', name, 1), piece('Sequence', 'B', 1)]
  kind = {'type': 'TemplateProcessing'}
  return kind | {'single': single, 'pair': pair, 'special_tokens': special}


def converted(path: Path, token: tokenizer.Tokenizer) -> bytes | None:
  """A SentencePiece model -> a tokenizer.json; None if its ids differ on PROBES."""
  import tokenizers
  from sentencepiece import sentencepiece_model_pb2

  generated: Any = sentencepiece_model_pb2  # Its classes are made at run time.
  proto = generated.ModelProto.FromString(path.read_bytes())
  pieces = proto.pieces
  model = tokenizers.Tokenizer(_model(proto))
  model.normalizer = _normalizer(proto.normalizer_spec)
  space = tokenizers.decoders.Replace('\u2581', ' ')
  ends = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  if proto.normalizer_spec.add_dummy_prefix:
    ends.append(tokenizers.decoders.Strip(' ', 1, 0))
  model.decoder = tokenizers.decoders.Sequence([space, *ends])
  whole = lambda piece, special: tokenizers.AddedToken(
    piece.piece, special=special, normalized=False
  )
  model.add_special_tokens([whole(p, True) for p in pieces if p.type in (2, CONTROL)])
  model.add_tokens([whole(p, False) for p in pieces if p.type == DEFINED])
  for text in PROBES:
    ours = token.encode(text)[0]
    if not np.array_equal(model.encode(text, add_special_tokens=False).ids, ours):
      return None
  return model.to_str().encode()


def _model(proto: Any) -> Any:
  import tokenizers

  pieces, unknown = proto.pieces, proto.trainer_spec.unk_id
  falls_back = any(piece.type == BYTE for piece in pieces)
  if proto.trainer_spec.model_type == 1:
    scores = [(piece.piece, piece.score) for piece in pieces]
    return tokenizers.models.Unigram(scores, unknown, falls_back)
  ids = {piece.piece: i for i, piece in enumerate(pieces)}
  merges = []
  for piece in pieces:
    if piece.type == NORMAL:
      halves = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
      split = [(ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
      merges += [(-piece.score, *pair) for pair in sorted(split)]
  # The sort is stable: of two ways to one piece, that of the lower ids comes first.
  pairs = [(a, b) for *_, a, b in sorted(merges, key=lambda merge: merge[0])]
  return tokenizers.models.BPE(
    ids, pairs, unk_token=pieces[unknown].piece, fuse_unk=True, byte_fallback=falls_back
  )


def _normalizer(spec: Any) -> Any:
  from tokenizers import Regex, normalizers

  steps: list[Any] = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend('\u2581'))
  return normalizers.Sequence([*steps, normalizers.Replace(' ', '\u2581')])
