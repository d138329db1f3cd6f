"""Makes tests/golden/tokens.json: the ids of transformers for our exported tokenizers.

  python tests/golden/make_tokens.py write FOLDER           # exports of tokenizers/
  OTHER/bin/python tests/golden/make_tokens.py read FOLDER  # each version of transformers

tokenizers/ has vocabularies like those of Llama, Mistral and Qwen, two of SentencePiece
and our own byte-level BPE. Tests need no transformers: they compare our ids with these.
"""

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
SENTENCES = (
  'The quick brown fox jumps over the lazy dog.',
  'def f(x):\n\treturn {"a": [1, 2.5e-3], \'b\': x**2}  # done\r\n',
  'Ça va? Où est l’élève — naïve cœur; façade…',
  'Съешь же ещё этих мягких французских булок',
  'Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία',
  'الثعلب البني السريع يقفز فوق الكلب',
  'דג סקרן שט בים מאוכזב ולפתע מצא חברה',
  'ऋषियों को सताने वाले दुष्ट राक्षसों',
  '我能吞下玻璃而不伤身体。',
  'いろはにほへと ちりぬるを',
  '키스의 고유조건은 입술끼리',
  'เป็นมนุษย์สุดประเสริฐเลิศคุณค่า',
  '👩‍👩‍👧‍👦 🇺🇳 😀😃 ✈️',
  'e\u0301 and é, ﬁ ligature, Å Å',
  '    indented\n\n\n  twice',
  'a\tb\t\tc  d   e    f',
  '1234567890 3.14159 1,000,000',
  '<div class="x">&amp;</div>',
  'İstanbul’da ığdır şöyle',
  'Zażółć gęślą jaźń',
  'ẞtraße GROẞ',
  'ಕನ್ನಡ ಭಾಷೆ',
  'ታሪክ ማንም',
  'Ṭ\u0323\u0307 \u200b zero\u200dwidth',
  'x',
)
CHANGES = (
  lambda s: s,
  lambda s: f' {s}',
  lambda s: f'{s}\n',
  str.upper,
  lambda s: f'{s} {s}',
  lambda s: f'  {s}  ',
  lambda s: s[::-1],
  lambda s: s[:7],
)
TEXTS = [change(sentence) for sentence in SENTENCES for change in CHANGES]
BEGINS = 'llama', 'mistral'  # Also with documents that begin with <s>.


def digest(ids) -> str:
  return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def cases():
  """-> (name, file of the vocabulary, whether documents begin with the beginning)."""
  for path in sorted((HERE / 'tokenizers').iterdir()):
    yield path.stem, path, False
    if path.stem in BEGINS:
      yield f'{path.stem}_begins', path, True


def write(folder: Path) -> None:
  from gated.data import tokenizer
  from gated.hf import tokens

  for name, path, begins in cases():
    (folder / name).mkdir(parents=True)
    assert not tokens.write(tokenizer.load(str(path)), folder / name, begins=begins)
    (folder / name / 'config.json').write_text('{"model_type": "qwen3"}')


def read(folder: Path) -> None:
  import transformers

  file = HERE / 'tokens.json'
  content = json.loads(file.read_text()) if file.exists() else {}
  for name, *_ in cases():
    token = transformers.AutoTokenizer.from_pretrained(folder / name)
    files = sorted(p for p in (folder / name).iterdir() if p.stem != 'config')
    entry = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    entry |= {'ids': digest([token(text).input_ids for text in TEXTS])}
    content.setdefault(name, {})[transformers.__version__] = entry
  file.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n')


if __name__ == '__main__':
  {'write': write, 'read': read}[sys.argv[1]](Path(sys.argv[2]))
