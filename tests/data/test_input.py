"""What prepare_data.py reads: compressed files, links, odd names, faults, nulls."""

import bz2
import collections
import gzip
import io
import json
import logging
import lzma
import os
import re

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from gated import data
from gated.data import (
  faults,
  mixture,
  pieces,
  prepare,
  shards,
  sources,
  table,
  tokenizer,
  units,
)
from scripts import prepare_data
from tests.data.test_prepare_data import decoded, options, rows

LINES = ''.join(json.dumps({'text': f'document {i}'}) + '\n' for i in range(30))
TEXTS = [f'document {i}' for i in range(30)]


def read(*paths, tally=None, field='text', suffixes=(), encoding='utf-8'):
  """-> the texts of paths, in order; faults go to the tally, or are raised."""
  report = faults.refuse if tally is None else tally.add
  reading = pieces.Reading(field, encoding)
  paths = [str(path) for path in paths]
  found = sources.survey(paths, reading, suffixes=suffixes, report=report)
  for unit in found:
    assert sources.digest(unit) == sources.digest(unit)
  return [text for unit in found for text in texts(unit, report)]


def texts(unit, report):
  """-> the texts of a unit; each is read as it is used."""
  for _, document in sources.documents(unit, report):
    try:
      yield ''.join(document.blocks)
    except faults.Fault as fault:
      report(fault)


def zstd(data):
  return zstandard.ZstdCompressor().compress(data)


def frames(data):
  """Three zstd frames, one of them empty, and a frame to skip before them."""
  skipped = b'\x50\x2a\x4d\x18' + (3).to_bytes(4, 'little') + b'abc'
  half = len(data) // 2
  return skipped + zstd(data[:half]) + zstd(b'') + zstd(data[half:])


def long_window(data):
  """As `zstd --long=31` writes it: the default reader refuses such a window."""
  settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
  writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
  return writer.compress(data) + writer.flush()


PACKINGS = {
  '.gz': gzip.compress,
  '.gz of two members': lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
  '.bz2': bz2.compress,
  '.bz2 of two streams': lambda data: bz2.compress(data[:99]) + bz2.compress(data[99:]),
  '.xz': lzma.compress,
  '.xz of two streams': lambda data: lzma.compress(data[:99]) + lzma.compress(data[99:]),
  '.zst': zstd,
  '.zst of frames': frames,
  '.zst of a long window': long_window,
}


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('base', ['.jsonl', '.ndjson', '.json', '.txt', '.md'])
def test_compressed_text_and_json_lines_are_read(base, packing, tmp_path):
  path = tmp_path / f'c4{base}{packing.partition(" ")[0]}'
  path.write_bytes(PACKINGS[packing](LINES.encode()))
  right = [LINES] if base in ('.txt', '.md') else TEXTS
  assert read(path) == read(tmp_path) == right
  # The content decides, not the name.
  renamed = path.rename(tmp_path / f'c4{base}')
  assert read(renamed) == right
  renamed.write_bytes(LINES.encode())
  assert read(renamed.rename(tmp_path / f'plain{base}.GZ')) == right


@pytest.mark.parametrize('packing', ['.gz', '.bz2', '.xz', '.zst'])
def test_a_cut_archive_is_a_fault_with_a_message(packing, tmp_path):
  path = tmp_path / f'cut.jsonl{packing}'
  path.write_bytes(PACKINGS[packing](LINES.encode())[:-9])
  with pytest.raises(ValueError, match=r'cut.jsonl\S* cannot be unpacked: .*\w'):
    read(path)
  tally = faults.Tally()
  texts = read(path, tally=tally)
  assert texts == TEXTS[: len(texts)]  # The lines before the cut are kept.
  assert tally.counts == {'damaged archive': 1}


def test_no_message_is_empty():
  assert faults.describe(io.UnsupportedOperation()) == 'UnsupportedOperation'


def test_json_files_of_a_folder_without_json_lines_are_passed_over(tmp_path, caplog):
  (tmp_path / 'pretty.json').write_text('{\n "text": "a"\n}')
  (tmp_path / 'other.json').write_text('{"name": "b"}')
  (tmp_path / 'list.json').write_text('[{"text": "c"}]')
  (tmp_path / 'lines.json').write_text('{"text": "d"}\n{"text": "e"}\n')
  with caplog.at_level(logging.INFO):
    assert read(tmp_path) == ['d', 'e']
  assert 'passed over 3 .json' in caplog.text
  assert len(read(tmp_path, suffixes=['.json'])) == 5  # Three texts and two lines.
  with pytest.raises(ValueError, match=r'pretty.json.*first line is no JSON object'):
    read(tmp_path / 'pretty.json')
  with pytest.raises(ValueError, match=r"other.json.*--field='text' is no text there"):
    read(tmp_path / 'other.json')


def test_manual_pages_are_read_by_their_suffix_in_any_case(tmp_path):
  (tmp_path / 'ls.1.gz').write_bytes(gzip.compress(b'list'))
  (tmp_path / 'CAT.1.GZ').write_bytes(gzip.compress(b'concatenate'))
  (tmp_path / 'README.TXT').write_text('read me')
  assert sorted(read(tmp_path, suffixes=['.gz'])) == ['concatenate', 'list']
  assert read(tmp_path) == ['read me']
  assert read(tmp_path / 'README.TXT') == ['read me']


def test_links_are_followed_once_each(tmp_path):
  home, other = tmp_path / 'in', tmp_path / 'other'
  home.mkdir()
  (other / 'deep').mkdir(parents=True)
  for i in range(20):
    (home / f'a{i}.txt').write_text(f'line {i}')
    (other / f'b{i}.txt').write_text(f'row {i}')
  (other / 'deep' / 'c.txt').write_text('deep')
  right = [f'line {i}' for i in range(20)] + [f'row {i}' for i in range(20)] + ['deep']
  (home / 'more').symlink_to(other)
  assert sorted(read(home)) == sorted(right)
  (home / 'again').symlink_to(other)
  (home / 'loop').symlink_to(tmp_path)
  (other / 'back').symlink_to(home)
  (home / '0.txt').symlink_to(home / 'a0.txt')
  (home / 'twice.txt').symlink_to(other / 'deep' / 'c.txt')
  (home / 'lost.txt').symlink_to(tmp_path / 'nowhere')
  assert sorted(read(home)) == sorted(right)
  assert sorted(read(home, other / 'deep')) == sorted(right)


def test_passed_over_files_are_counted_by_suffix(tmp_path, caplog):
  for i in range(3):
    (tmp_path / f'{i}.RST').write_text('x')
  (tmp_path / 'Makefile').write_text('x')
  (tmp_path / 'a.txt').write_text('a')
  (tmp_path / 'lost.txt').symlink_to(tmp_path / 'nowhere')
  with caplog.at_level(logging.INFO):
    assert read(tmp_path) == ['a']
  assert 'passed over 3 .rst, ' in caplog.text
  assert '1 without a suffix' in caplog.text and '1 links to nothing' in caplog.text
  (tmp_path / 'a.txt').unlink()
  with pytest.raises(ValueError, match=r'nothing to read; passed over 3 .rst'):
    read(tmp_path)


def test_a_folder_that_cannot_be_listed_is_a_fault(tmp_path, monkeypatch):
  (tmp_path / 'locked').mkdir()
  (tmp_path / 'a.txt').write_text('a')
  scan = os.scandir

  def refuse(path):
    if str(path).endswith('locked'):
      raise PermissionError(13, 'Permission denied', path)
    return scan(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(ValueError, match=r'locked: the folder cannot be listed.*denied'):
    read(tmp_path)
  tally = faults.Tally()
  assert read(tmp_path, tally=tally) == ['a'] and tally.counts == {'unreadable': 1}


def test_a_name_that_is_not_utf8_is_read(tmp_path):
  folder = os.fsencode(tmp_path) + b'/n'
  os.mkdir(folder)
  for name in (b'caf\xe9.txt', b'caf\xe9.jsonl'):
    with open(folder + b'/' + name, 'wb') as file:
      file.write(b'{"text": "fine text"}\n' * (99 if name.endswith(b'l') else 1))
  out = tmp_path / 'out'
  manifest = prepare.run(
    str(out), {'d': [str(tmp_path / 'n')]}, options(heldout=0), processes=1
  )
  assert manifest.splits['train']['d'].documents == 100
  os.rename(folder + b'/caf\xe9.txt', folder + b'/x.txt')
  with open(folder + b'/caf\xe9.txt', 'wb') as file:
    file.write(b'caf\xe9')
  with pytest.raises(ValueError, match=r'caf\\xe9.txt is not UTF-8'):
    prepare.run(
      str(tmp_path / 'other'), {'d': [str(tmp_path / 'n')]}, options(), processes=1
    )


def test_nulls_are_empty_texts(tmp_path):
  path = tmp_path / 'null.jsonl'
  path.write_text('{"text": null, "id": 3}\n{"text": "a"}\n{"text": {"body": null}}\n')
  assert read(path, field='text.body', tally=faults.Tally()) == ['', '']
  path.write_text('{"text": null, "id": 3}\n{"text": "a"}\n')
  assert read(path) == ['', 'a']
  parquet.write_table(pyarrow.table({'text': [None, 'a']}), tmp_path / 'null.parquet')
  assert read(tmp_path / 'null.parquet') == ['', 'a']


def test_json_lines_may_hold_the_text_in_a_nested_field(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"data": {"text": "a"}}\n{"data.text": "b"}\n{"data": null}\n')
  assert read(path, field='data.text') == ['a', 'b', '']
  with pytest.raises(ValueError, match=r"at byte 0: --field='data.body' is no text"):
    read(path, field='data.body')


KINDS = {
  'string': pyarrow.string(),
  'large string': pyarrow.large_string(),
  'string view': pyarrow.string_view(),
  'binary': pyarrow.binary(),
  'large binary': pyarrow.large_binary(),
  'dictionary': pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize('kind', KINDS)
def test_parquet_columns_of_all_kinds_of_text_are_read(kind, tmp_path):
  texts = ['a', 'é日', None, '', 'a']
  if 'binary' in kind:
    column = pyarrow.array([t if t is None else t.encode() for t in texts], KINDS[kind])
  elif kind == 'dictionary':
    column = pyarrow.array(texts).dictionary_encode()
  else:
    column = pyarrow.array(texts, KINDS[kind])
  nested = pyarrow.StructArray.from_arrays([column], ['text'])
  columns = pyarrow.table({'text': column, 'meta': nested})
  size = 5 if 'view' in kind else 2  # The library cannot write a part of a view.
  parquet.write_table(columns, tmp_path / 'a.parquet', row_group_size=size)
  for field in ('text', 'meta.text'):
    assert read(tmp_path / 'a.parquet', field=field) == ['a', 'é日', '', '', 'a']


def test_a_damaged_row_group_and_bad_text_are_faults(tmp_path):
  path = tmp_path / 'a.parquet'
  texts = pyarrow.array([f'{i}' * 50 for i in range(30)])
  settings = dict(row_group_size=10, compression='snappy', use_dictionary=False)
  parquet.write_table(pyarrow.table({'text': texts}), path, **settings)
  group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
  data = bytearray(path.read_bytes())
  data[group.data_page_offset : group.data_page_offset + 40] = bytes(40)
  damaged = tmp_path / 'damaged.parquet'
  damaged.write_bytes(data)
  with pytest.raises(ValueError, match=r'damaged.parquet: row group 1 is damaged'):
    read(damaged)
  tally = faults.Tally()
  assert read(damaged, tally=tally) == [f'{i}' * 50 for i in [*range(10), *range(20, 30)]]
  assert tally.counts == {'damaged Parquet': 1}
  bad = pyarrow.array([b'fine', b'caf\xe9', b'too']).view(pyarrow.binary())
  parquet.write_table(pyarrow.table({'text': bad}), tmp_path / 'bad.parquet')
  with pytest.raises(ValueError, match=r'bad.parquet: bad.parquet:0:1 is not UTF-8'):
    read(tmp_path / 'bad.parquet')
  assert read(tmp_path / 'bad.parquet', tally=faults.Tally()) == ['fine', 'too']


def test_rows_of_a_large_row_group_are_read_few_at_a_time(tmp_path, monkeypatch):
  texts = [f'{i}' * 999 for i in range(20)]
  column = pyarrow.array(texts)
  parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'a.parquet')
  sizes, read_batches = [], parquet.ParquetFile.iter_batches

  def iter_batches(file, size, **options):
    sizes.append(size)
    return read_batches(file, size, **options)

  monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', iter_batches)
  assert read(tmp_path / 'a.parquet') == texts
  monkeypatch.setattr(table, 'BATCH', 6000)
  assert read(tmp_path / 'a.parquet') == texts
  monkeypatch.setattr(table, 'BATCH', 1)
  assert read(tmp_path / 'a.parquet') == texts
  assert sizes[0] == table.ROWS and 2 < sizes[1] < 6 and sizes[2] == 1


def test_long_lines_are_read_once_and_skipped_in_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, 'UNIT', 40)
  monkeypatch.setattr(pieces, 'BLOCK', 7)
  texts = ['a' * 300, 'b', 'c' * 90, '', 'd' * 41]
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  (tmp_path / 'a.jsonl').write_text(lines + '\n \n')
  assert read(tmp_path / 'a.jsonl') == texts
  # Half of a character, in a later block.
  (tmp_path / 'a.jsonl').write_text('{"text": "abcdefghi \\ud800"}\n{"text": "b"}\n')
  with pytest.raises(ValueError, match=r'a.jsonl:0 is not UTF-8'):
    read(tmp_path / 'a.jsonl')
  assert read(tmp_path / 'a.jsonl', tally=faults.Tally()) == ['b']


def bad_folder(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  lines = LINES.splitlines(keepends=True)
  (folder / 'lines.jsonl').write_text(''.join([*lines[:5], '{"tex\n', *lines[5:]]))
  (folder / 'field.jsonl').write_text('{"text": "a"}\n{"text": 3}\n{"text": "b"}\n')
  (folder / 'latin.txt').write_bytes(b'caf\xe9')
  (folder / 'cut.jsonl.gz').write_bytes(gzip.compress(LINES.encode())[:-9])
  (folder / 'bad.parquet').write_bytes(b'PAR0')
  (folder / 'good.txt').write_text('good')
  return folder


REASONS = {
  'not a line of JSON': 1,
  'no text in the field': 1,
  'not UTF-8': 1,
  'damaged archive': 1,
  'damaged Parquet': 1,
}


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_skip_leaves_out_faults_and_counts_them(processes, tmp_path, caplog):
  folder, out = bad_folder(tmp_path), tmp_path / 'out'
  settings = options(heldout=0, on_error='skip')
  domains = {'d': [str(folder)]}
  manifest = prepare.run(str(out), domains, settings, processes=processes)
  assert manifest.made['counts'] == {'left_out': {'d': REASONS}}
  texts = decoded(rows(out, 'train', 'd'))
  whole = collections.Counter(text.encode() for text in TEXTS)
  left = collections.Counter(texts)
  left.subtract([b'a', b'b', b'good', *whole])
  # Beside these, lines of the cut archive before the cut.
  assert set(left.values()) <= {0, 1} and set(+left) <= set(whole)
  for name in ('lines.jsonl', 'field.jsonl', 'latin.txt', 'cut.jsonl.gz', 'bad.parquet'):
    assert name in caplog.text
  assert prepare.run(str(out), domains, settings, processes=1) == manifest
  with pytest.raises(ValueError, match=r"bad.parquet' is not a Parquet"):
    prepare.run(str(out), domains, options(heldout=0), processes=1)


def test_stop_names_the_faults_of_all_files(tmp_path):
  folder = bad_folder(tmp_path)
  (folder / 'bad.parquet').unlink()
  with pytest.raises(ValueError) as error:
    prepare.run(str(tmp_path / 'out'), {'d': [str(folder)]}, options(), processes=1)
  told = str(error.value)
  assert '4 faults' in told and '--on_error=skip' in told
  for name in ('lines.jsonl', 'field.jsonl', 'latin.txt', 'cut.jsonl.gz'):
    assert name in told
  (folder / 'lines.jsonl').write_text('bad\n' * 50)
  with pytest.raises(ValueError, match=r'53 faults.*the first 10') as error:
    prepare.run(str(tmp_path / 'out'), {'d': [str(folder)]}, options(), processes=1)
  assert len(str(error.value).splitlines()) == 1 + faults.NAMED + 1


def test_an_unreadable_file_is_a_fault(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  (tmp_path / 'b.txt').write_text('b')
  (unit,) = sources.survey([str(tmp_path)], pieces.Reading('text'))
  (tmp_path / 'a.txt').unlink()  # As a file that only its owner may read.
  tally = faults.Tally()
  assert sources.digest(unit)
  assert list(texts(unit, tally.add)) == ['b']
  assert tally.counts == {'unreadable': 1} and 'a.txt' in str(tally)


def test_other_encodings_are_read_when_named(tmp_path):
  (tmp_path / 'a.txt').write_bytes('café'.encode('latin-1'))
  (tmp_path / 'b.jsonl').write_bytes('{"text": "thé"}\n'.encode('latin-1'))
  parquet.write_table(pyarrow.table({'text': ['é']}), tmp_path / 'c.parquet')
  assert read(tmp_path, encoding='latin-1') == ['café', 'thé', 'é']
  (tmp_path / 'd.txt').write_bytes('日本'.encode('utf-16'))
  assert read(tmp_path / 'd.txt', encoding='utf-16') == ['日本']
  with pytest.raises(ValueError, match=r"--encoding='utf-16'.*JSON lines"):
    read(tmp_path / 'b.jsonl', encoding='utf-16')
  with pytest.raises(ValueError, match="--encoding='klingon'"):
    options(encoding='klingon')


def test_a_document_that_the_tokenizer_refuses_is_a_fault(tmp_path):
  path = tmp_path / 'a.json'
  vocab = {'a': 0, '</s>': 1, '[UNK]': 2}
  path.write_text(json.dumps(words_model(vocab)))
  (tmp_path / 'a.jsonl').write_text('{"text": "a a"}\n{"text": "a </s>"}\n')
  settings = options(tokenizer=str(path), heldout=0, on_error='skip', length=2)
  domains = {'d': [str(tmp_path / 'a.jsonl')]}
  manifest = prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)
  assert manifest.splits['train']['d'].documents == 1
  assert manifest.made['counts'] == {'left_out': {'d': {'refused by the tokenizer': 1}}}


def words_model(vocab):
  return {
    'version': '1.0',
    'added_tokens': [],
    'pre_tokenizer': {'type': 'WhitespaceSplit'},
    'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '[UNK]'},
  }


def test_the_share_of_unknown_tokens_is_logged(tmp_path, caplog):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps(words_model({'a': 0, '</s>': 1, '[UNK]': 2})))
  assert tokenizer.load(str(path)).unk == 2 and tokenizer.load('bytes').unk == -1
  (tmp_path / 'a.txt').write_text('a b a c a a a a')
  settings = options(tokenizer=str(path), heldout=0, length=2)
  with caplog.at_level(logging.INFO):
    prepare.run(
      str(tmp_path / 'out'), {'d': [str(tmp_path / 'a.txt')]}, settings, processes=1
    )
  assert 'd: 25% of the tokens are unknown' in caplog.text


def test_an_unusual_beginning_of_text_must_be_named(tmp_path):
  path = tmp_path / 'deepseek.json'
  vocab = {'<begin>': 0, '<end>': 1, 'a': 2, '[UNK]': 3}
  path.write_text(json.dumps(words_model(vocab)))
  (tmp_path / 'a.txt').write_text('a a a')
  domains, out = {'d': [str(tmp_path / 'a.txt')]}, tmp_path / 'out'
  settings = dict(tokenizer=str(path), eos='<end>', heldout=0, length=2)
  with pytest.raises(ValueError, match=r'--bos: .*deepseek.json.*--bos=TOKEN'):
    prepare.run(str(out), domains, options(**settings, bos=True), processes=1)
  with pytest.raises(ValueError, match="no beginning-of-text token '<start>'"):
    prepare.run(str(out), domains, options(**settings, bos='<start>'), processes=1)
  with pytest.raises(ValueError, match='--bos=<s>, but --tokenizer=bpe:300'):
    options(tokenizer='bpe:300', bos='<s>')
  settings = options(**settings, bos='<begin>')
  manifest = prepare.run(str(out), domains, settings, processes=1)
  assert rows(out, 'train', 'd')['tokens'].tolist() == [[0, 2, 2], [2, 2, 1]]
  assert manifest.made['bos'] == '<begin>'
  assert shards.open_tokenizer(str(out), manifest).bos == 0


def test_documents_all_in_one_half_are_an_error(tmp_path):
  names = (f'book{i}.txt' for i in range(99))
  name = next(name for name in names if units.is_heldout(name, 0.5))
  (tmp_path / name).write_text('A real book.\n' * 50)
  domains = {'d': [str(tmp_path / name)]}

  def run(**changes):
    return prepare.run(str(tmp_path / 'out'), domains, options(**changes), processes=1)

  with pytest.raises(
    ValueError, match=r'--heldout=0.5: the only document is held out; --heldout=0 '
  ):
    run(heldout=0.5)
  with pytest.raises(ValueError, match=r'--heldout=1e-09 holds out none of 1 documents'):
    run(heldout=1e-9)
  assert run(heldout=0).splits['train']['d'].documents == 1


def test_the_current_folder_has_its_own_name(tmp_path, monkeypatch):
  (tmp_path / 'in' / 'sub').mkdir(parents=True)
  for i in range(9):
    (tmp_path / 'in' / 'sub' / f'{i}.txt').write_text(f'text {i}')
  digests = []
  for i, (folder, path) in enumerate([('.', 'in'), ('in', '.'), ('in/sub', '..')]):
    monkeypatch.chdir(tmp_path / folder)
    out = str(tmp_path / f'out{i}')
    digests.append(prepare.run(out, {'d': [path]}, options(), processes=1).digest)
  assert len(set(digests)) == 1


def test_paths_are_quoted_in_mixtures_and_domains(tmp_path):
  terms = mixture.terms('"runs/lr=3,b@2"@code=2, \'a"b\' ,c@d=0.5,e')
  assert [(t.directory, t.domain, float(t.weight)) for t in terms] == [
    ('runs/lr=3,b@2', 'code', 2), ('a"b', '', 1), ('c', 'd', 0.5), ('e', '', 1)
  ]  # fmt: skip
  for text in ('runs/lr=x', 'a,', ',a', '"a', '"a"b', 'a=0', 'a=1=2', ''):
    with pytest.raises(ValueError, match=re.escape(f'config.data.mixture={text!r}')):
      mixture.terms(text)
  home = os.path.expanduser('~')
  assert [t.directory for t in mixture.terms('~/a,"~/b,c"=2,./~')] == [
    f'{home}/a', f'{home}/b,c', './~'
  ]  # fmt: skip
  (tmp_path / 'a,b=c').mkdir()
  for i in range(9):
    (tmp_path / 'a,b=c' / f'{i}.txt').write_text(f'some text {i}')
  out = tmp_path / 'out'
  prepare_data.main(
    [f'--out={out}', '--length=8', '--tokenizer=bytes', '--heldout=0', '--processes=1',
     f'--domain=d="{tmp_path}/a,b=c"']
  )  # fmt: skip
  assert shards.read_manifest(str(out)).splits['train']['d'].documents == 9


def test_dedup_keeps_one_copy_and_splits_by_content(tmp_path):
  folder = tmp_path / 'D'
  (folder / 'sub').mkdir(parents=True)
  for i in range(60):
    (folder / 'sub' / f'{i}.txt').write_text(f'text  {i}')
    (folder / f'{i}.txt').write_text(f'text {i}\n')
  (folder / 'a.jsonl').write_text('{"text": "text 1"}\n{"text": "text 99"}\n' * 3)
  domains = {'a': [str(folder)], 'b': [str(folder / 'sub')]}
  out = tmp_path / 'out'
  settings = options(dedup='exact', heldout=0.4)
  manifest = prepare.run(str(out), domains, settings, processes=1)
  halves = {
    split: [
      b' '.join(text.split())
      for domain in domains
      for text in decoded(rows(out, split, domain))
    ]
    for split in shards.SPLITS
  }
  assert not set(halves['train']) & set(halves['heldout'])
  right = [f'text {i}'.encode() for i in [*range(60), 99]]
  assert sorted(halves['train'] + halves['heldout']) == sorted(right)
  assert 10 < len(halves['heldout']) < 40
  assert manifest.made['counts'] == {'duplicates': {'a': 65, 'b': 60}}
  # Another dataset with the same text has it in the same half.
  lines = ''.join(json.dumps({'text': f'text {i}'}) + '\n' for i in range(60))
  (tmp_path / 'other.jsonl').write_text(lines)
  paths = {'c': [str(tmp_path / 'other.jsonl')]}
  prepare.run(str(tmp_path / 'more'), paths, settings, processes=1)
  assert set(decoded(rows(tmp_path / 'more', 'heldout', 'c'))) <= set(halves['heldout'])


def test_default_options_are_not_in_the_manifest():
  """So the digest of a dataset stays what it was before these options existed."""
  assert options().recorded == {
    'length': 16, 'tokenizer': 'bytes', 'eos': '', 'heldout': 0.2, 'shard_rows': 50,
    'seed': 0, 'bos': False, 'field': 'text', 'suffixes': [],
  }  # fmt: skip
  assert options(on_error='skip').recorded['on_error'] == 'skip'


def test_a_copy_of_a_dataset_is_not_mixed_with_it(tmp_path):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text(f'some text {i}')
  domains = {'d': [str(tmp_path)]}
  prepare.run(str(tmp_path / 'A'), domains, options(heldout=0), processes=1)
  (tmp_path / 'B').symlink_to(tmp_path / 'A')
  cfg = data.Config(
    mixture=f'{tmp_path}/A,{tmp_path}/B=2',
    length=16,
    tokenizer='bytes',
    cache=str(tmp_path / 'cache'),
    verify='size',
    workers=0,
    prefetch=2,
  )
  with pytest.raises(ValueError, match=r'mixture=.*A and .*B are the same dataset'):
    data.open(cfg, vocab=257, batch=2, seed=0, max_segments=0)
