"""Tokenizers: exact texts and bytes per token, and no control token from a text."""

import random
import subprocess
import sys

import numpy as np
import pytest

from gated.data import tokenizer

ALPHABET = 'abc xyz\n\t  0123éß日本語😀\u0301\u200b\x00\x7f\u2028<|>'


def texts(seed, count=200):
  """Random texts, and some that are known to cause trouble."""
  dice = random.Random(seed)
  yield from ['a', ' ', '\n\n', '日', '😀', 'a\r\nb', 'x' * 300, tokenizer.END, '</s><s>']
  for _ in range(count):
    yield ''.join(dice.choices(ALPHABET, k=dice.randrange(1, 60)))


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  words = ['the cat sat on the mat', 'def f(x):\n  return x', '日本語のテキスト']
  return tokenizer.train_bpe(words * 3 + list(texts(1)), 320, str(path))


@pytest.fixture(scope='module')
def piece(tmp_path_factory):
  sentencepiece = pytest.importorskip('sentencepiece')
  path = tmp_path_factory.mktemp('sp') / 'words.model'
  with open(path, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['the cat sat on the mat', 'wörter und 日本語'] * 50),
      model_writer=file,
      vocab_size=300,
      model_type='bpe',
      byte_fallback=True,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  return tokenizer.load(str(path))


@pytest.fixture(params=['bytes', 'bpe', 'piece'])
def token(request):
  if request.param == 'bytes':
    return tokenizer.load('bytes')
  return request.getfixturevalue(request.param)


def test_the_bytes_of_tokens_sum_to_the_bytes_of_the_text(token):
  for text in texts(2):
    ids_N, bytes_N = token.encode(text)
    assert ids_N.dtype == bytes_N.dtype == np.int32 and ids_N.shape == bytes_N.shape
    assert (bytes_N >= 0).all() and (ids_N >= 0).all() and (ids_N < token.vocab).all()
    # A vocabulary may have no token for spaces alone.
    assert bytes_N.sum() == (len(text.encode()) if len(ids_N) else 0)
    assert len(ids_N) or not text.strip()


def test_many_texts_have_the_ids_of_each(token):
  many = [*texts(4), '', 'of two <|endoftext|> texts']
  for text, ids_N in zip(many, token.ids(many), strict=True):
    np.testing.assert_array_equal(ids_N, token.encode(text)[0])
  assert token.ids([]) == []


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_bytes_and_byte_level_bpe_decode_to_the_exact_text(kind, request):
  token = tokenizer.load('bytes') if kind == 'bytes' else request.getfixturevalue(kind)
  for text in texts(3):
    ids_N, _ = token.encode(text)
    assert token.decode(ids_N) == text.encode()
    assert token.decode([*ids_N, token.eos]) == text.encode()
    # Decoded parts join to the whole.
    cut = len(ids_N) // 2
    assert token.decode(ids_N[:cut]) + token.decode(ids_N[cut:]) == text.encode()


def test_sentencepiece_decodes_a_text_of_its_training(piece):
  ids_N, bytes_N = piece.encode('the cat wörter 日本語')
  assert piece.decode(ids_N) == 'the cat wörter 日本語'.encode()
  for i in range(1, len(ids_N)):
    assert len(piece.decode(ids_N[:i])) == bytes_N[:i].sum()


def test_no_text_produces_a_control_token(token):
  for text in [f'a{tokenizer.END}b', '<s>a</s>', tokenizer.END * 3]:
    ids_N, bytes_N = token.encode(text)
    assert token.eos not in ids_N and token.bos not in ids_N
    assert bytes_N.sum() == len(text.encode())


def test_an_end_of_text_that_a_text_can_produce_is_refused(bpe, tmp_path):
  import tokenizers

  model = tokenizers.Tokenizer.from_file(bpe.path)
  model.add_tokens([tokenizers.AddedToken('STOP', special=False, normalized=False)])
  model.save(str(tmp_path / 'tokenizer.json'))
  token = tokenizer.load(str(tmp_path / 'tokenizer.json'), eos='STOP')
  assert token.eos == 320 and token.vocab == 321
  with pytest.raises(ValueError, match='STOP'):
    token.encode('do not STOP here')


def test_training_twice_gives_the_same_file(bpe, tmp_path):
  again = tmp_path / 'again.json'
  words = ['the cat sat on the mat', 'def f(x):\n  return x', '日本語のテキスト']
  token = tokenizer.train_bpe(words * 3 + list(texts(1)), 320, str(again))
  with open(bpe.path) as file:
    assert again.read_text() == file.read()
  assert token.fingerprint == bpe.fingerprint and token.vocab == 320
  assert [p.name for p in tmp_path.iterdir()] == ['again.json']


def test_fingerprints_differ_by_vocabulary_and_end_of_text(bpe, piece):
  other = tokenizer.load(bpe.path, eos='a')
  prints = [t.fingerprint for t in (tokenizer.load('bytes'), bpe, piece, other)]
  assert len(set(prints)) == 4
  assert tokenizer.load(bpe.path, eos=bpe.eos_token).fingerprint == bpe.fingerprint


@pytest.mark.parametrize('suffix', ['.json', '.model'])
@pytest.mark.parametrize('content', [b'', b'{', b'{}', b'[1]', b'\xff\x00junk'])
def test_a_malformed_file_is_refused_by_path(suffix, content, tmp_path):
  path = tmp_path / f'odd{suffix}'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'odd{suffix}'):
    tokenizer.load(str(path))


def test_an_unusable_tokenizer_is_refused(tmp_path, bpe, monkeypatch):
  with pytest.raises(ValueError, match="allowed are 'bytes'"):
    tokenizer.load('words')
  with pytest.raises(ValueError, match='no such file'):
    tokenizer.load(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match=r'no end-of-text token .*nothing'):
    tokenizer.load(bpe.path, eos='<nothing>')
  monkeypatch.setattr(tokenizer, 'MAX_FILE', 10)
  with pytest.raises(ValueError, match='1 to 10 are allowed'):
    tokenizer.load(bpe.path)


def test_an_impossible_size_of_a_bpe_is_refused(tmp_path):
  path = str(tmp_path / 'tokenizer.json')
  with pytest.raises(ValueError, match='256 tokens, but 257 to'):
    tokenizer.train_bpe(['text'], 256, path)
  with pytest.raises(ValueError, match='yields only'):
    tokenizer.train_bpe(['text'], 1000, path)


def test_a_missing_package_is_named(bpe, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ValueError, match='pip install tokenizers'):
    tokenizer.load(bpe.path)


def test_bytes_need_no_package():
  code = (
    "import sys; from gated.data import tokenizer; tokenizer.load('bytes').encode('a'); "
    "sys.exit(bool({'jax', 'tokenizers', 'sentencepiece'} & set(sys.modules)))"
  )
  assert subprocess.run([sys.executable, '-c', code], cwd='.').returncode == 0
