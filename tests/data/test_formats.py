"""Every row of the tables in docs/data.md: what is read, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import re
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from gated.data import cuts, ids, pieces, prepare
from tests.data.test_prepare_data import decoded, options, rows

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs/data.md'
TEXTS = ['one text', 'zwei Wörter', '三', 'four, the last']
LINES = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS)
EOS = 256  # Of the tokenizer 'bytes'.
LISTS = [list(text.encode()) for text in TEXTS]
STREAM = [token for ids in LISTS for token in (*ids, EOS)]


def table(title):
  """The first column of the table under a heading of the page."""
  section = PAGE.read_text().partition(f'### {title}\n')[2].partition('\n### ')[0]
  names = re.findall(r'^\| (.+?) \|', section, re.M)
  return names[2:] if names[1].startswith('---') else names[1:]


def file(name, content):
  """-> a maker of a file with this name and content, alone in its folder."""

  def make(folder):
    (folder / name).write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    return folder / name

  return make


def texts(folder):
  for i, text in enumerate(TEXTS):
    (folder / f'{i}.{"txt" if i % 2 else "md"}').write_text(text)
  return folder


def folders(folder):
  (folder / 'deep/er').mkdir(parents=True)
  (folder / 'a.jsonl').write_text(LINES.partition('\n')[0])
  for i, text in enumerate(TEXTS[1:]):
    (folder / 'deep/er' / f'{i}.txt').write_text(text)
  return folder


def links(folder):
  (folder / 'in').mkdir()
  (folder / 'other').mkdir()
  texts(folder / 'other')
  (folder / 'in/part').symlink_to('../other')
  (folder / 'in/again').symlink_to('../other')
  (folder / 'in/twice.txt').symlink_to('../other/1.txt')
  return folder / 'in'


def columns(**columns):
  def make(folder):
    parquet.write_table(pyarrow.table(columns), folder / 'a.parquet', row_group_size=3)
    return folder / 'a.parquet'

  return make


def hub(folder):
  (folder / 'data').mkdir()
  (folder / 'data/train-0.jsonl').write_text(LINES)
  return f'hf:{folder}'


def llm_c(folder):
  """As dev/data/data_common.py of llm.c: an end of text before each document."""
  header = np.zeros(256, '<i4')
  header[:3] = 20240520, 1, len(STREAM)
  stream = np.array([EOS, *STREAM[:-1]], '<u2')
  (folder / 'a.bin').write_bytes(header.tobytes() + stream.tobytes())
  return folder / 'a.bin'


def megatron(folder):
  """As IndexedDatasetBuilder: the last document has two sequences."""
  sequences = [*LISTS[:3], LISTS[3][:5], LISTS[3][5:]]
  sizes = np.array([len(ids) for ids in sequences], '<i4')
  places = 2 * np.append(0, np.cumsum(sizes)[:-1]).astype('<i8')
  documents = np.array([0, 1, 2, 3, 5], '<i8')
  counts = np.array([len(sizes), len(documents)], '<u8')
  index = ids.MEGATRON + np.array(1, '<u8').tobytes() + bytes([8]) + counts.tobytes()
  index += sizes.tobytes() + places.tobytes() + documents.tobytes()
  (folder / 'a.idx').write_bytes(index)
  (folder / 'a.bin').write_bytes(np.concatenate(sequences).astype('<u2').tobytes())
  return folder / 'a.bin'


# Row of the table -> what makes it, and the options.
READ = {
  'text': (texts, {}),
  'JSON lines': (file('a.ndjson', LINES), {}),
  'JSON lines called .json': (file('c4.json', LINES), {}),
  'gzip': (file('a.jsonl.gz', gzip.compress(LINES.encode())), {}),
  'zstd': (file('a.json.zst', zstandard.ZstdCompressor().compress(LINES.encode())), {}),
  'bzip2': (file('a.ndjson.bz2', bz2.compress(LINES.encode())), {}),
  'xz': (file('a.jsonl.xz', lzma.compress(LINES.encode())), {}),
  'Parquet': (columns(text=pyarrow.array(TEXTS).dictionary_encode()), {}),
  'folder': (folders, {}),
  'link': (links, {}),
  'hub': (hub, {}),
  'nanoGPT ids': (file('a.bin', np.array(STREAM, '<u2').tobytes()), {'ids': 'auto'}),
  'llm.c ids': (llm_c, {'ids': 'auto'}),
  'Megatron ids': (megatron, {'ids': 'auto'}),
  'Parquet ids': (columns(text=LISTS), {'ids': 'auto'}),
  'JSON ids': (
    file('a.jsonl', ''.join(json.dumps({'text': ids}) + '\n' for ids in LISTS)),
    {'ids': 'auto'},
  ),
}


def run(path, out, **changes):
  settings = options(**{'heldout': 0, 'dedup': 'exact'} | changes)
  return prepare.run(str(out), {'d': [str(path)]}, settings, processes=1)


def test_the_tables_have_these_rows():
  assert table('What is read') == [*READ]
  assert table('What is not read') == [*REFUSED]


@pytest.mark.parametrize(
  'row',
  # The package of the hub takes seconds to import.
  [pytest.param(row, marks=[pytest.mark.slow] if row == 'hub' else []) for row in READ],
)
def test_what_is_read_has_its_documents(row, tmp_path, monkeypatch):
  if row == 'hub':
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  make, changes = READ[row]
  (tmp_path / 'in').mkdir()
  manifest = run(make(tmp_path / 'in'), tmp_path / 'out', **changes)
  texts = decoded(rows(tmp_path / 'out', 'train', 'd'))
  assert texts == sorted(text.encode() for text in TEXTS)
  portion = manifest.splits['train']['d']
  # The first token of a document is no target.
  assert portion.bytes == sum(len(text.encode()) for text in TEXTS) - len(TEXTS)


def archive(folder):
  with zipfile.ZipFile(folder / 'a.zip', 'w') as writer:
    writer.writestr('a.txt', 'text')
  return folder / 'a.zip'


def tar(folder):
  with tarfile.open(folder / 'a.tar', 'w') as writer:
    writer.addfile(tarfile.TarInfo('a.txt'), io.BytesIO())
  return folder / 'a.tar'


def words(folder):
  """A vocabulary without a pre-tokenizer."""
  settings = {
    'version': '1.0',
    'added_tokens': [],
    'model': {'type': 'BPE', 'vocab': {'a': 0, '</s>': 1}, 'merges': []},
  }
  (folder / 'tokenizer.json').write_text(json.dumps(settings))
  (folder / 'a.txt').write_text('a' * 5000)
  return folder / 'a.txt'


REFUSED = {
  'JSON array': (file('a.json', json.dumps(TEXTS)), {}, 'first line is no JSON object'),
  'indented JSON': (file('a.json', '{\n "text": ""}'), {}, 'first line is no JSON'),
  'zip': (archive, {}, r'a.zip.*unknown suffix'),
  'tar': (tar, {}, r'a.tar.*unknown suffix'),
  'UTF-16 JSON lines': (
    file('a.jsonl', LINES.encode('utf-16')),
    {'encoding': 'utf-16'},
    "--encoding='utf-16' is for text",
  ),
  'line of more than 1 GiB': (file('a.jsonl', LINES * 9), {}, 'a line of more than 20 '),
  'document without a cut': (
    words,
    {'tokenizer': 'in/tokenizer.json'},
    'cannot cut a text of more than 2,000 characters',
  ),
  '.bin without --ids': (file('a.bin', b'abcd'), {}, r'a.bin.*--ids reads .bin'),
  'other ids': (
    file('a.bin', np.array([5, 300], '<u2').tobytes()),
    {'ids': 'uint16'},
    r'a.bin from id 0: the id 300, but --tokenizer has 257 tokens',
  ),
  'hub without a network': (
    lambda folder: 'hf:nobody/nothing', {}, 'cannot be opened.*network'
  ),
}  # fmt: skip


@pytest.mark.parametrize('row', REFUSED)
def test_what_is_not_read_is_refused(row, tmp_path, monkeypatch):
  make, changes, message = REFUSED[row]
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'in').mkdir()
  path = make(tmp_path / 'in')
  if row.startswith('line of'):
    monkeypatch.setattr(pieces, 'MAX_DOCUMENT', 20)
  if row.startswith('document'):
    monkeypatch.setattr(cuts, 'WINDOW', 1000)
    monkeypatch.setattr(cuts, 'MAX_WHOLE', 2000)
  if row.startswith('hub'):
    library = pytest.importorskip('huggingface_hub')
    pytest.importorskip('datasets')

    def refuse(*args, **kwargs):
      raise ConnectionError('no route to host')

    monkeypatch.setattr(library.HfApi, 'dataset_info', refuse)
  with pytest.raises(ValueError, match=message):
    run(path, tmp_path / 'out', **changes)
  assert not (tmp_path / 'out/manifest.json').exists()
