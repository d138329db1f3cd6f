"""scripts/prepare_data.py: all kinds of input, the same bytes for all process counts."""

import contextlib
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gated.data import packing, pieces, prepare, shards, sources, tokenizer, units

ROOT = pathlib.Path(__file__).resolve().parents[2]


def options(**changes):
  settings = dict(
    length=16,
    tokenizer='bytes',
    eos='',
    heldout=0.2,
    shard_rows=50,
    seed=0,
    bos=False,
    field='text',
    suffixes=(),
  )
  return prepare.Options(**settings | changes)


def words(dice, low=0, high=40):
  return ''.join(dice.choices('ab cé日\n', k=dice.randrange(low, high)))


def write_lines(path, texts, field='text'):
  lines = ''.join(
    json.dumps({field: text, 'n': 1}, ensure_ascii=False) + '\n' for text in texts
  )
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines, encoding='utf-8')


def rows(out, split, domain):
  """The stored rows of a dataset, in order."""
  from array_record.python import array_record_module

  manifest = shards.read_manifest(str(out))
  records = []
  for shard in manifest.splits[split][domain].shards:
    reader = array_record_module.ArrayRecordReader(str(out / shard.file))
    assert reader.num_records() == shard.rows
    records += reader.read_all() if shard.rows else []
    reader.close()
  return shards.parse(records, manifest.row)


def content(out):
  return {path.name: path.read_bytes() for path in out.iterdir()}


def decoded(rows_R):
  """Rows of the tokenizer 'bytes' -> the documents in their stream, sorted."""
  stream = [int(rows_R[0]['tokens'][0])] if len(rows_R) else []
  for row in rows_R:
    stream += [int(t) for t, s in zip(row['tokens'][1:], row['segments'][1:]) if s]
  text = bytes(min(t, 255) if t != 256 else 0 for t in stream)
  return sorted(text.split(b'\0')[:-1])


def test_rows_have_every_token_as_a_target_once():
  """Against a plain loop over the stream, for random documents and lengths."""
  dice = np.random.default_rng(0)
  for _ in range(60):
    length = int(dice.integers(1, 12))
    sizes = dice.integers(2, 15, size=dice.integers(1, 12))
    first_N = np.concatenate([np.arange(n) == 0 for n in sizes])
    pieces_N = np.zeros(len(first_N), units.TOKEN)
    pieces_N['token'] = dice.integers(0, 500, len(first_N))
    pieces_N['bytes'] = dice.integers(0, 5, len(first_N))
    count = -(-(len(first_N) - 1) // length)
    rows_R = packing.cut(
      pieces_N, first_N, count, row=shards.layout(length, 1000), pad=999
    )
    weighted = []
    for r, row in enumerate(rows_R):
      segment, position = 0, 0
      for c in range(length + 1):
        at = r * length + c
        if at >= len(first_N):
          assert row['tokens'][c] == 999
          assert row['segments'][c] == row['positions'][c] == row['weights'][c] == 0
          continue
        starts = c == 0 or first_N[at]
        segment, position = segment + starts, 0 if starts else position + 1
        assert row['tokens'][c] == pieces_N['token'][at]
        assert (row['segments'][c], row['positions'][c]) == (segment, position)
        assert row['weights'][c] == (c > 0 and not first_N[at])
        weighted += [at] * int(row['weights'][c])
    assert weighted == [at for at in range(len(first_N)) if not first_N[at]]
    assert rows_R['bytes'].sum() == pieces_N['bytes'][~first_N].sum()


def test_batches_mask_targets_in_another_document():
  dice = np.random.default_rng(1)
  pieces_N = np.zeros(50, units.TOKEN)
  pieces_N['token'] = np.arange(50)
  first_N = dice.random(50) < 0.2
  first_N[0] = True
  rows_R = packing.cut(pieces_N, first_N, 7, row=shards.layout(8, 100), pad=99)
  rows_R['weights'] = 1.0  # The segments alone must mask.
  batch = shards.batch(rows_R)
  assert [(a.shape, str(a.dtype)) for a in batch] == [
    ((7, 8), dtype) for dtype in ['int32', 'int32', 'float32', 'int32', 'int32']
  ]
  for r in range(7):
    for t in range(8):
      at = r * 8 + t
      real = at + 1 < 50
      assert batch.weights[r, t] == (real and not first_N[at + 1])
      assert batch.targets[r, t] == (at + 1 if real else 99)


def test_all_kinds_of_input_are_read_completely(tmp_path):
  dice = random.Random(3)
  texts = {
    kind: [words(dice, 1) for _ in range(12)] for kind in ('txt', 'c', 'l', 'z', 'q')
  }
  folder = tmp_path / 'in'
  (folder / 'deep').mkdir(parents=True)
  for i, (text, code) in enumerate(zip(texts['txt'], texts['c'])):
    (folder / 'deep' / f'{i}.txt').write_bytes(text.encode())
    (folder / f'{i}.c').write_bytes(code.encode())
  write_lines(tmp_path / 'l.jsonl', texts['l'])
  write_lines(tmp_path / 'z.jsonl.gz', texts['z'])
  domains = {
    'folder': [str(folder)],
    'lines': [str(tmp_path / 'l.jsonl'), str(tmp_path / 'z.jsonl.gz')],
  }
  expected = {'folder': texts['txt'] + texts['c'], 'lines': texts['l'] + texts['z']}
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  table = pyarrow.table({'id': range(13), 'text': [*texts['q'], None]})
  parquet.write_table(table, tmp_path / 'q.parquet', row_group_size=5)
  domains['table'], expected['table'] = [str(tmp_path / 'q.parquet')], texts['q']

  out = tmp_path / 'out'
  manifest = prepare.run(str(out), domains, options(suffixes=('.c', '.txt')), processes=1)
  for domain, written in expected.items():
    read = []
    for split in shards.SPLITS:
      portion = manifest.splits[split][domain]
      rows_R = rows(out, split, domain)
      assert len(rows_R) == portion.rows
      assert (rows_R['weights'] > 0).sum() == portion.tokens
      assert rows_R['bytes'].sum() == portion.bytes
      read += decoded(rows_R)
      assert portion.documents == len(decoded(rows_R))
    assert sorted(read) == sorted(text.encode() for text in written)
  assert not (out / prepare.WORK).exists()


def test_a_large_file_is_split_without_losing_a_line(tmp_path, monkeypatch):
  dice = random.Random(4)
  texts = [words(dice, 0, 60) for _ in range(300)]
  path = tmp_path / 'l.jsonl'
  write_lines(path, texts)
  reading = pieces.Reading('text')

  def read(unit):
    return [(name, ''.join(text.blocks)) for name, text in sources.documents(unit)]

  whole = read(sources.survey([str(path)], reading)[0])
  assert [text for _, text in whole] == texts
  for size in (1, 7, 100, 1000):
    monkeypatch.setattr(pieces, 'UNIT', size)
    found = sources.survey([str(path)], reading)
    assert len(found) > 1 or size == 1000
    assert [d for unit in found for d in read(unit)] == whole
    if size > 50:
      assert len({sources.digest(unit) for unit in found}) == len(found)


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
  dice = random.Random(5)
  write_lines(tmp_path / 'l.jsonl', [words(dice, 1, 80) for _ in range(400)])
  domains = {'d': [str(tmp_path / 'l.jsonl')]}
  settings = options(tokenizer='bpe:270')
  prepare.run(str(tmp_path / 'one'), domains, settings, processes=1)
  prepare.run(str(tmp_path / 'two'), domains, settings, processes=2)
  # The bytes do not depend on the units either.
  monkeypatch.setattr(pieces, 'UNIT', 3000)
  prepare.run(str(tmp_path / 'cut'), domains, options(tokenizer='bytes'), processes=1)
  monkeypatch.undo()
  prepare.run(str(tmp_path / 'whole'), domains, options(tokenizer='bytes'), processes=1)
  assert content(tmp_path / 'one') == content(tmp_path / 'two')
  cut, whole = content(tmp_path / 'cut'), content(tmp_path / 'whole')
  assert cut.pop('manifest.json') and whole.pop('manifest.json') and cut == whole


@pytest.mark.parametrize('dedup', ['none', 'near'])
def test_a_restarted_call_reuses_intact_files_alone(dedup, tmp_path, monkeypatch):
  dice = random.Random(6)
  write_lines(tmp_path / 'l.jsonl', [words(dice, 1, 80) for _ in range(200)])
  domains = {'d': [str(tmp_path / 'l.jsonl')]}
  monkeypatch.setattr(pieces, 'UNIT', 2000)
  prepare.run(str(tmp_path / 'straight'), domains, options(dedup=dedup), processes=1)

  out = tmp_path / 'out'

  def run(*, unit_files, shard_files):
    """Prepares until so many files are written -> the written units and shards."""
    written = {'write_unit': [], 'write_shard': []}
    limits = {'write_unit': unit_files, 'write_shard': shard_files}

    def dying(name, function):
      def wrapped(path, *args, **kwargs):
        if len(written[name]) == limits[name]:
          raise KeyboardInterrupt
        written[name].append(pathlib.Path(path))
        return function(path, *args, **kwargs)

      return wrapped

    with monkeypatch.context() as patch:
      patch.setattr(units, 'write_unit', dying('write_unit', units.write_unit))
      patch.setattr(shards, 'write_shard', dying('write_shard', shards.write_shard))
      with contextlib.suppress(KeyboardInterrupt):
        prepare.run(str(out), domains, options(dedup=dedup), processes=1)
    return written.values()

  def damage(path):
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])

  (first, second), no_shards = run(unit_files=2, shard_files=0)
  assert not no_shards
  damage(first)
  written, (shard, another) = run(unit_files=99, shard_files=2)
  assert first in written and second not in written
  assert not (out / 'manifest.json').exists()
  damage(shard)
  (out / 'd-train-00000-of-00099.array_record').write_bytes(b'other options')
  (out / '.manifest.json.0a1b2c3d.partial').write_bytes(b'a killed call')
  written, rest = run(unit_files=99, shard_files=99)
  assert not written and shard in rest and another not in rest
  assert content(out) == content(tmp_path / 'straight')


@pytest.mark.full
def test_sigkill_leaves_no_worker_and_a_rerun_gives_the_same_bytes(tmp_path):
  dice = random.Random(7)
  write_lines(tmp_path / 'l.jsonl', [words(dice, 100, 3000) for _ in range(4000)])

  def command(out):
    return [
      sys.executable, 'scripts/prepare_data.py', f'--out={tmp_path / out}', '--length=64',
      '--tokenizer=bytes', f'--domain=d={tmp_path / "l.jsonl"}', '--shard_rows=5000',
      '--processes=2',
    ]  # fmt: skip

  subprocess.run(command('straight'), cwd=ROOT, check=True, capture_output=True)
  child = subprocess.Popen(
    command('out'),
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob('out/*.array_record')) and time.monotonic() < deadline:
    time.sleep(0.01)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  assert not (tmp_path / 'out/manifest.json').exists()
  while time.monotonic() < deadline:
    try:
      os.killpg(child.pid, 0)
    except ProcessLookupError:
      break
    time.sleep(0.05)
  else:
    os.killpg(child.pid, signal.SIGKILL)
    pytest.fail('workers outlived their parent')
  subprocess.run(command('out'), cwd=ROOT, check=True, capture_output=True)
  assert content(tmp_path / 'out') == content(tmp_path / 'straight')


def test_a_complete_dataset_is_never_overwritten(tmp_path):
  (tmp_path / 'a.txt').write_text('some words ' * 50)
  (tmp_path / 'b.txt').write_text('other words ' * 50)
  out = str(tmp_path / 'out')
  domains = {'d': [str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')]}
  prepare.run(out, domains, options(heldout=0), processes=1)
  before = content(tmp_path / 'out')
  prepare.run(out, domains, options(heldout=0), processes=1)
  assert content(tmp_path / 'out') == before
  with pytest.raises(
    ValueError, match=r'--out=.*--length was 16, is 8.*--seed was 0, is 1'
  ):
    prepare.run(out, domains, options(heldout=0, length=8, seed=1), processes=1)
  with pytest.raises(ValueError, match='--tokenizer was'):
    prepare.run(out, domains, options(heldout=0, tokenizer='bpe:300'), processes=1)
  (tmp_path / 'b.txt').write_text('changed words ' * 50)
  with pytest.raises(ValueError, match='--domain=d was'):
    prepare.run(out, domains, options(heldout=0), processes=1)
  assert content(tmp_path / 'out') == before


def test_the_seed_moves_documents_within_their_split(tmp_path):
  dice = random.Random(8)
  write_lines(tmp_path / 'l.jsonl', [words(dice, 5, 30) for _ in range(100)])
  domains = {'d': [str(tmp_path / 'l.jsonl')]}
  splits = []
  for seed in (0, 1):
    out = tmp_path / str(seed)
    manifest = prepare.run(str(out), domains, options(seed=seed), processes=1)
    assert 5 < manifest.splits['heldout']['d'].documents < 40
    splits.append([rows(out, split, 'd') for split in shards.SPLITS])
  for a, b in zip(*splits):
    assert decoded(a) == decoded(b) and a.tobytes() != b.tobytes()


def test_bos_makes_the_first_token_a_target(tmp_path):
  (tmp_path / 'a.txt').write_text('abc')
  (tmp_path / 'b.txt').write_text('def')
  counts = {}
  for bos in (False, True):
    manifest = prepare.run(
      str(tmp_path / f'out{bos}'),
      {'d': [str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')]},
      options(heldout=0, bos=bos),
      processes=1,
    )
    portion = manifest.splits['train']['d']
    counts[bos] = portion.tokens, portion.bytes
  # Two documents of three bytes and an end of text each.
  assert counts == {False: (2 * 3, 2 * 2), True: (2 * 4, 2 * 3)}


def test_a_dataset_includes_its_tokenizer(tmp_path):
  path = tmp_path / 'mine.json'
  token = tokenizer.train_bpe(['some words to learn'] * 3, 262, str(path))
  (tmp_path / 'a.txt').write_text('some words to read')
  out = str(tmp_path / 'out')
  settings = options(tokenizer=str(path), heldout=0, length=4)
  manifest = prepare.run(out, {'d': [str(tmp_path / 'a.txt')]}, settings, processes=1)
  path.unlink()
  assert shards.open_tokenizer(out, manifest).fingerprint == token.fingerprint


@pytest.mark.parametrize(
  ('domains', 'changes', 'message'),
  [
    ({}, {}, '--domain=NAME=PATH'),
    ({'d': ['nowhere']}, {}, "--domain=d=nowhere: 'nowhere': no such file"),
    ({'a b': ['good.txt']}, {}, '--domain=a b'),
    ({'d': ['good.txt'], 'D': ['good.txt']}, {}, '--domain=D=good.txt: d differs only'),
    ({'d': ['odd.bin']}, {}, r"odd.bin'.*unknown suffix.*\.txt.*--suffixes"),
    ({'d': ['empty']}, {}, '--domain=d=empty.*nothing to read'),
    ({'d': ['void.txt']}, {}, 'nothing to read'),
    ({'d': ['blank.jsonl']}, {}, 'too little text'),
    ({'d': ['lines.jsonl']}, {'field': 'body'}, r"--field='body'.*\['n', 'text'\]"),
    ({'d': ['broken.jsonl']}, {}, 'broken.jsonl at byte 0: not a line of JSON'),
    ({'d': ['latin.txt']}, {}, 'latin.txt.*not UTF-8'),
    ({'d': ['lone.jsonl']}, {}, 'lone.jsonl.*not UTF-8'),
    ({'d': ['cut.jsonl.gz']}, {}, 'cut.jsonl.gz cannot be unpacked'),
    ({'d': ['bad.parquet']}, {}, 'bad.parquet.*not a Parquet'),
    ({'d': ['good.txt']}, {'tokenizer': 'words'}, "--tokenizer.*'words'.*allowed"),
    ({'d': ['good.txt']}, {'tokenizer': 'bpe:9'}, '--tokenizer=bpe:9.*257'),
    ({'d': ['good.txt']}, {'length': 0}, '--length=0, but it must be at least 1'),
    ({'d': ['good.txt']}, {'heldout': 1.0}, '--heldout=1.0'),
    ({'d': ['good.txt']}, {'shard_rows': 0}, '--shard_rows=0'),
  ],
)
def test_bad_input_is_refused_by_name(domains, changes, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  for name, data in {
    'good.txt': b'some text that is long enough',
    'odd.bin': b'x',
    'void.txt': b'',
    'blank.jsonl': b'{"text": ""}\n\n',
    'lines.jsonl': b'{"text": "a", "n": 1}\n',
    'broken.jsonl': b'{"text": \n',
    'latin.txt': b'caf\xe9',
    'lone.jsonl': b'{"text": "\\ud800"}\n',
    'cut.jsonl.gz': gzip.compress(b'{"text": "a"}\n')[:-9],
    'bad.parquet': b'PAR0',
  }.items():
    (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    prepare.run('out', domains, options(**{'heldout': 0} | changes), processes=1)
  assert not (tmp_path / 'out' / 'manifest.json').exists()


@pytest.mark.slow
def test_the_command_prints_the_sizes_or_one_line_about_the_fault(tmp_path):
  (tmp_path / 'a.txt').write_text('words to read ' * 20)

  def run(*flags):
    command = [sys.executable, 'scripts/prepare_data.py', f'--out={tmp_path / "out"}']
    command += ['--length=32', '--tokenizer=bytes', '--processes=1', *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

  good = run(f'--domain=d={tmp_path}', '--heldout=0')
  assert good.returncode == 0, good.stderr
  assert 'train d: 9 rows, 1 documents, 280 tokens, 279 bytes' in good.stdout
  away = run(f'--domain=d={tmp_path}', '--out=s3://bucket/out')
  assert away.returncode == 2
  assert '--out=s3://bucket/out, but it must be a local folder' in away.stderr
  bad = run('--domain=d')
  assert bad.returncode == 2 and '--domain=d, but it must be NAME=PATH' in bad.stderr
  file = run(f'--domain=d={tmp_path}', f'--out={tmp_path / "a.txt" / "below"}')
  assert file.returncode == 2 and 'a.txt is not a writable folder' in file.stderr
  assert 'Traceback' not in bad.stderr + file.stderr
