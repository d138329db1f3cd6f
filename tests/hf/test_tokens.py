"""Exported tokenizers: the same ids in transformers (golden/make_tokens.py) and here."""

import hashlib
import json
import types

import pytest
from golden import make_tokens

from gated.data import corpus, tokenizer
from gated.hf import tokens

GOLDEN = json.loads((make_tokens.HERE / 'tokens.json').read_text())
CASES = {name: rest for name, *rest in make_tokens.cases()}


@pytest.mark.parametrize('name', CASES)
def test_transformers_4_and_5_give_the_same_ids_for_200_texts(name, tmp_path):
  path, begins = CASES[name]
  token = tokenizer.load(str(path))
  assert not tokens.write(token, tmp_path, begins=begins)
  files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
  ours = [[token.bos] * begins + token.encode(t)[0].tolist() for t in make_tokens.TEXTS]
  assert len(ours) == 200
  versions = GOLDEN[name]
  assert sorted(version[0] for version in versions) == ['4', '5']
  for made in versions.values():
    assert made == files | {'ids': make_tokens.digest(ours)}


def test_an_export_has_the_tokenizer_of_the_data_whatever_it_puts_around_a_text(tmp_path):
  path, _ = CASES['llama']
  data = types.SimpleNamespace(tokenizer=tokenizer.load(str(path)))
  check = lambda file: corpus.Corpus.check_tokenizer(data, file)
  tokens.write(data.tokenizer, tmp_path, begins=False)
  assert (tmp_path / tokens.FILE).read_bytes() != path.read_bytes()
  check(tmp_path / tokens.FILE)
  with pytest.raises(ValueError, match='the data has the tokenizer'):
    check(CASES['mistral'][0])
  data.tokenizer = tokenizer.load(str(CASES['bpe'][0]))
  with pytest.raises(ValueError, match='the data has the tokenizer'):
    check(tmp_path / tokens.FILE)
  tokens.write(data.tokenizer, tmp_path, begins=False)
  check(tmp_path / tokens.FILE)


def test_a_model_that_cannot_be_converted_is_copied_with_a_warning(tmp_path, monkeypatch):
  path, _ = CASES['bpe']
  monkeypatch.setattr(tokens, '_normalizer', lambda spec: None)
  [warning] = tokens.write(tokenizer.load(str(path)), tmp_path, begins=False)
  assert 'transformers may read it in another way' in warning
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['tokenizer.model', tokens.SETTINGS]
  settings = json.loads((tmp_path / tokens.SETTINGS).read_text())
  assert settings['tokenizer_class'] == 'LlamaTokenizer'
