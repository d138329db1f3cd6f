"""Data: arithmetic on (seed, data_step), datasets verified by their manifests."""

import collections
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from faults import process

from gated import data, storage
from gated.data import cache, embedded, mixture, prepare, shards, tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
T = 16


def config(mix, **changes):
  knobs = dict(
    mixture=str(mix),
    length=T,
    tokenizer='bytes',
    cache='',
    verify='sha256',
    workers=0,
    prefetch=2,
  )
  return data.Config(**knobs | changes)


def open_(mix, *, batch=4, seed=0, vocab=300, **changes):
  return data.open(
    config(mix, **changes), vocab=vocab, batch=batch, seed=seed, max_segments=0
  )


def make(out, seed, domains=('code', 'prose'), **changes):
  """Random documents -> a dataset with a few shards per domain."""
  dice = random.Random(seed)
  inputs = {}
  for domain in domains:
    path = out.parent / f'{out.name}-{domain}.jsonl'
    texts = [
      ''.join(dice.choices('abc dé\n', k=dice.randrange(1, 90))) for _ in range(90)
    ]
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    inputs[domain] = [str(path)]
  options = dict(
    length=T,
    tokenizer='bytes',
    eos='',
    heldout=0.2,
    shard_rows=60,
    seed=seed,
    bos=False,
    field='text',
    suffixes=(),
  )
  prepare.run(str(out), inputs, prepare.Options(**options | changes), processes=1)
  return out


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  return make(folder / 'one', 1), make(folder / 'two', 2)


@pytest.fixture
def copy(built, tmp_path):
  """A dataset to damage."""
  return pathlib.Path(shutil.copytree(built[0], tmp_path / 'copy'))


def take(batches, count):
  return [next(batches) for _ in range(count)]


def same(a, b):
  return all(
    x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
  )


def test_a_batch_has_the_rows_of_its_global_indices(built):
  corpus = open_(built[0], batch=4, seed=3)
  for step, batch in enumerate(take(corpus.train(5, range(4)), 6), start=5):
    rows_B = np.stack([corpus.row(step * 4 + i) for i in range(4)])
    assert same(batch, shards.batch(rows_B))
    assert [(x.shape, str(x.dtype)) for x in batch] == [
      ((4, T), dtype) for dtype in ['int32', 'int32', 'float32', 'int32', 'int32']
    ]


def test_the_batches_of_all_hosts_form_the_batch_of_one_host(built):
  mix = f'{built[0]}=3,{built[1]}@code=1.5'
  corpus = open_(mix, batch=12, seed=5)
  whole = take(corpus.train(7, range(12)), 5)
  dice = random.Random(0)
  for _ in range(5):
    order = dice.sample(range(12), 12)
    cuts = sorted(dice.sample(range(1, 12), dice.randrange(1, 4)))
    shares = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 12])]
    hosts = [
      open_(mix, batch=12, seed=5, prefetch=dice.choice([1, 3, 9])) for _ in shares
    ]
    parts = [take(host.train(7, rows), 5) for host, rows in zip(hosts, shares)]
    for step, batch in enumerate(whole):
      joined = [np.concatenate(arrays) for arrays in zip(*(part[step] for part in parts))]
      assert same([x[np.argsort(order)] for x in joined], batch)


def test_a_late_start_gives_the_batches_of_an_early_start(built):
  corpus = open_(built[0], batch=4, seed=1)
  straight = take(corpus.train(0, range(4)), 60)
  for step in (1, 2, 17, 59):
    assert same(next(corpus.train(step, [0, 1, 2, 3])), straight[step])
  # A distant step is as fast as a near one.
  began = time.monotonic()
  next(corpus.train(10**12, range(4)))
  assert time.monotonic() - began < 2


def test_every_epoch_has_every_row_once_in_a_different_order(built):
  corpus = open_(built[0], batch=1, seed=2)
  rows = sum(p.rows for p in shards.read_manifest(built[0]).splits['train'].values())
  epochs = [
    [tuple(corpus.record_ids(g)[0]) for g in range(e * rows, (e + 1) * rows)]
    for e in range(3)
  ]
  assert all(len(set(epoch)) == rows for epoch in epochs)
  assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
  for a, b in itertools.pairwise(epochs):
    assert sum(x == y for x, y in zip(a, b)) < rows / 10


def test_neighbouring_seeds_share_no_order(built):
  rows = sum(p.rows for p in shards.read_manifest(built[0]).splits['train'].values())
  one, two = (open_(built[0], batch=1, seed=seed) for seed in (1, 2))
  # grain's own shuffle makes epoch 1 of seed 1 the epoch 0 of seed 2.
  a = [one.record_ids(rows + g) for g in range(rows)]
  b = [two.record_ids(g) for g in range(rows)]
  assert sum(x == y for x, y in zip(a, b)) < rows / 10


def test_record_ids_name_the_records_of_the_batch(built):
  from array_record.python import array_record_module

  corpus = open_(f'{built[0]},{built[1]}@prose', batch=6, seed=4)
  folders = {str(built[0]): built[0], f'{built[1]}@prose': built[1]}
  for step in (0, 3, 40):
    ids = json.loads(json.dumps(corpus.record_ids(step)))
    for i, (label, file, record) in enumerate(ids):
      reader = array_record_module.ArrayRecordReader(str(folders[label] / file))
      assert reader.read([record])[0] == corpus.row(step * 6 + i).tobytes()
      reader.close()


@pytest.mark.parametrize(
  'weights', ['1,1', '0.7,0.3', '7,3', '0.9,0.05,0.05', '3,1,1,0.125', '1', '0.1,2.3,11']
)
def test_every_window_of_a_mixture_holds_its_weights_exactly(weights):
  fractions = [Fraction(weight) for weight in weights.split(',')]
  turns = mixture.Turns(fractions)
  window = sum(turns.whole)
  assert [Fraction(w, window) for w in turns.whole] == [
    weight / sum(fractions) for weight in fractions
  ]
  for start in (0, window, 1000 * window, 10**12 * window):
    drawn = [turns[start + i] for i in range(window)]
    counts = collections.Counter(part for part, _ in drawn)
    assert [counts[i] for i in range(len(fractions))] == turns.whole
    for i, whole in enumerate(turns.whole):
      # Each window continues where the previous one ended.
      indices = [index for part, index in drawn if part == i]
      assert indices == list(
        range(start // window * whole, (start // window + 1) * whole)
      )


@pytest.mark.parametrize('mix', ['{0}', '{0}@code=3,{1}', '{1}@prose'])
def test_the_mean_number_of_documents_in_a_row_is_estimated_from_above(built, mix):
  corpus = open_(mix.format(*built), batch=6)
  ids = [batch.segments for batch in take(corpus.train(0, range(6)), 40)]
  true = 1 + (np.diff(np.concatenate(ids), axis=1) != 0).sum(1).mean()
  assert true <= corpus.mean_segments <= true + 1


def test_a_mixture_draws_from_its_parts_by_weight(built):
  corpus = open_(f'{built[0]}@code=0.7,{built[1]}=0.3', batch=10)
  for step in range(5):
    labels = collections.Counter(label for label, _, _ in corpus.record_ids(step))
    assert labels == {f'{built[0]}@code': 7, str(built[1]): 3}
  assert corpus.domains == ('one.code', 'two.code', 'prose')


def test_heldout_rows_come_in_order_and_the_last_batch_is_padded(built):
  corpus = open_(built[0])
  assert corpus.domains == ('code', 'prose')
  for domain in corpus.domains:
    rows = shards.read_manifest(built[0]).splits['heldout'][domain].rows
    for batch, limit in [(7, 0), (4, 5), (1, 3), (rows, 0), (64, 10**9)]:
      parts = list(corpus.heldout(domain, batch=batch, rows=range(batch), limit=limit))
      count = min(limit, rows) if limit else rows
      assert len(parts) == -(-count // batch)
      assert all(b.tokens.shape == (batch, T) and n.shape == (batch,) for b, n in parts)
      weights = np.concatenate([b.weights for b, _ in parts])
      bytes_R = np.concatenate([n for _, n in parts])
      assert (weights[:count].sum(1) > 0).all() and not weights[count:].any()
      assert not bytes_R[count:].any()
      text = corpus.heldout_text(domain, limit)
      assert len(text) == bytes_R.sum()
      if not limit:
        portion = shards.read_manifest(built[0]).splits['heldout'][domain]
        assert (portion.tokens, portion.bytes) == (weights.sum(), bytes_R.sum())
    halves = [
      list(corpus.heldout(domain, batch=6, rows=part, limit=0))
      for part in ([0, 2, 4], [5, 3, 1])
    ]
    whole = list(corpus.heldout(domain, batch=6, rows=range(6), limit=0))
    for (a, n), (b, m), (c, k) in zip(*halves, whole, strict=True):
      assert same([x[[0, 2, 4]] for x in c], a) and same([x[[5, 3, 1]] for x in c], b)
      assert np.array_equal(k[[0, 2, 4, 5, 3, 1]], np.concatenate([n, m]))


def test_the_fingerprint_depends_on_the_content_alone(built, copy):
  a, b = open_(built[0], seed=0), open_(copy, seed=9)
  assert a.fingerprint == b.fingerprint == json.loads(json.dumps(a.fingerprint))
  others = [str(built[1]), f'{built[0]}@code', f'{built[0]},{built[1]}',
            f'{built[0]},{built[1]}=2']  # fmt: skip
  prints = {open_(mix).fingerprint['sha256'] for mix in others}
  assert len(prints | {a.fingerprint['sha256']}) == 5
  assert str(built[0].parent) not in json.dumps(a.fingerprint)


def test_a_smaller_vocabulary_than_the_models_is_logged(built, caplog):
  with caplog.at_level(logging.INFO):
    assert open_(built[0], vocab=1000).vocab == 257
  assert 'the data has a vocabulary of 257, the model of 1000' in caplog.text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'verify': 'md5'}, r"config.data.verify='md5', but allowed are 'sha256', 'size'"),
    ({'tokenizer': 'words'}, "config.data.tokenizer='words'"),
    ({'length': 0}, 'config.data.length=0'),
    ({'workers': -1}, 'config.data.workers=-1'),
    ({'prefetch': 0}, 'config.data.prefetch=0'),
    ({'mix': ''}, 'config.data.mixture='),
    ({'mix': 'a=0'}, 'config.data.mixture=.*weight above 0'),
    ({'mix': 'a=-1'}, 'config.data.mixture='),
    ({'mix': 'a=1e9'}, 'config.data.mixture='),
    ({'mix': 'a,b,a'}, 'names a dataset twice'),
  ],
)
def test_a_wrong_knob_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**{'mix': 'a'} | changes)


def test_unsuitable_datasets_are_refused_by_the_knob(built, tmp_path):
  cases = [
    (dict(mix=tmp_path / 'no'), 'config.data.mixture=.*no such dataset.*prepare_data.py'),
    (dict(mix=f'{built[0]}@x'), r"no domain 'x', but allowed are \['code', 'prose'\]"),
    (dict(mix=built[0], length=8), 'config.data.length=8, but .* --length=16'),
    (dict(mix=built[0], vocab=256), 'config.model.vocab=256, but the data has 257'),
    (dict(mix=built[0], batch=10**6), 'rows to train on, but a batch has 1000000'),
  ]
  for knobs, message in cases:
    with pytest.raises(ValueError, match=message):
      open_(**knobs)
  path = tmp_path / 'tokenizer.json'
  tokenizer.train_bpe(['abc dé abc'] * 3, 260, str(path))
  other = make(tmp_path / 'bpe', 1, tokenizer=str(path))
  with pytest.raises(ValueError, match=r"made with the tokenizer 'tokenizer\.json'"):
    open_(f'{built[0]},{other}')
  corpus = open_(other)
  for domain in corpus.domains:
    sizes = sum(
      n.sum() for _, n in corpus.heldout(domain, batch=3, rows=range(3), limit=0)
    )
    assert len(corpus.heldout_text(domain, 0)) == sizes


def damage(copy, kind):
  """Damages a shard -> its name."""
  shard = sorted(copy.glob('*-train-*.array_record'))[-1]
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  {
    'flip': lambda: shard.write_bytes(content),
    'cut': lambda: shard.write_bytes(content[:-100]),
    'gone': shard.unlink,
  }[kind]()
  return shard.name


@pytest.mark.parametrize('kind', ['flip', 'cut', 'gone'])
def test_a_damaged_shard_is_named(copy, kind):
  name = damage(copy, kind)
  with pytest.raises(ValueError, match=f'config.data.mixture=.*{name}'):
    open_(copy)
  if kind != 'flip':
    with pytest.raises(ValueError, match=name):
      open_(copy, verify='size')


def test_a_changed_tokenizer_is_refused(tmp_path):
  out = make(tmp_path / 'out', 3, tokenizer='bpe:258')
  path = out / 'tokenizer.json'
  path.write_text(path.read_text() + ' ')
  with pytest.raises(ValueError, match='not the tokenizer in the manifest'):
    open_(out)


def test_a_forged_manifest_is_refused(copy, tmp_path):
  good = json.loads((copy / 'manifest.json').read_text())
  shard = good['splits']['train']['code']['shards'][0]['file']
  (tmp_path / 'outside').write_bytes((copy / shard).read_bytes())
  os.symlink(tmp_path / 'outside', copy / 'link')

  def refused(message, change):
    manifest = json.loads(json.dumps(good))
    change(manifest)
    (copy / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f'config.data.mixture=.*{message}'):
      open_(copy)

  def first(manifest):
    return manifest['splits']['train']['code']['shards'][0]

  for name in [
    '../outside',
    str(tmp_path / 'outside'),
    'link',
    '',
    'a\0b',
    '.',
    'x/../..',
  ]:
    refused('outside of the folder', lambda m, name=name: first(m).update(file=name))
  refused(
    'tokenizer.*|outside', lambda m: m['tokenizer'].update(name='../tokenizer.json')
  )
  for field, values in {
    'length': ['16', True, 0, -1, 1 << 40, None, 16.0],
    'format': [99],
    'splits': [[]],
    'tokenizer': ['bytes'],
    'seed': [1 << 70],
  }.items():
    for value in values:
      refused(field, lambda m, f=field, v=value: m.update({f: v}))
  refused('rows', lambda m: first(m).update(rows=1))
  refused('rows', lambda m: first(m).update(rows=-5))
  refused('tokenizer.* is missing', lambda m: m.update(tokenizer={}))
  refused('vocab', lambda m: m['tokenizer'].update(vocab=1 << 40))
  refused('eos', lambda m: m['tokenizer'].update(eos=257))
  portion = good['splits']['train']['code']
  refused('no name', lambda m: m['splits']['train'].update({'../x': portion}))
  for text in ['', '{', 'null', '[' * 10**5, '\xff']:
    (copy / 'manifest.json').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match=r'config\.data\.mixture='):
      open_(copy)


def test_rows_must_be_in_the_batch(built):
  corpus = open_(built[0], batch=4)
  for rows in ([4], [-1], []):
    with pytest.raises(ValueError, match='rows='):
      corpus.train(0, rows)


def test_a_dataset_of_one_row_is_repeated(tmp_path):
  (tmp_path / 'a.txt').write_text('abc')
  out = str(tmp_path / 'out')
  settings = dict(tokenizer='bytes', eos='', heldout=0.0, shard_rows=9, seed=0, bos=False)
  options = prepare.Options(length=T, field='text', suffixes=(), **settings)
  prepare.run(out, {'d': [str(tmp_path / 'a.txt')]}, options, processes=1)
  corpus = open_(out, batch=1)
  batches = take(corpus.train(0, [0]), 3)
  assert same(batches[0], batches[2]) and batches[0].weights.sum() == 3
  assert corpus.domains == ()


def test_batches_can_be_pickled_and_the_import_loads_no_large_package(built):
  batch = next(open_(built[0]).train(0, range(4)))
  assert same(pickle.loads(pickle.dumps(batch)), batch)
  code = (
    'import sys; from gated import data; '
    "sys.exit(bool({'jax', 'grain', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_code_and_prose_are_separated():
  source = '''#!/usr/bin/env python
"""Module é, "first".

    Indented.
"""
import os  # why

x = '# no comment' + "é"  # é: a comment


class A:
  """Only words."""


def f():
  """One line."""
  return f"{x}#"  # end
'''
  code, prose = embedded.take_apart(source)
  assert (
    code
    == """import os

x = '# no comment' + "é"


class A:
  pass


def f():
  return f"{x}#"
"""
  )
  compile(code, 'code', 'exec')
  words = ['usr/bin/env', 'Module é, "first".\n\nIndented.', 'why', 'é: a comment',
           'Only words.', 'One line.', 'end']  # fmt: skip
  assert [word for word in words if word in prose] == words
  assert prose.index('why') < prose.index('Only') < prose.index('end')


@pytest.fixture(scope='module')
def stdlib(tmp_path_factory):
  """A part of the standard library."""
  folder = tmp_path_factory.mktemp('stdlib')
  names = sorted(embedded.files())[::12]
  return folder, {name: embedded.files()[name] for name in names}


@pytest.mark.slow
def test_the_embedded_corpus_is_built_once_and_splits_by_file(
  stdlib, monkeypatch, caplog
):
  folder, paths = stdlib
  monkeypatch.setattr(embedded, 'files', lambda: paths)
  monkeypatch.setattr(embedded, 'HELDOUT', 0.3)
  with caplog.at_level(logging.INFO):
    corpora = [open_('stdlib', cache=str(folder)) for _ in range(2)]
  assert caplog.text.count('building the embedded corpus') == 1
  assert corpora[0].fingerprint == corpora[1].fingerprint
  assert corpora[0].domains == ('code', 'prose')
  (dataset,) = folder.glob('stdlib-*')
  manifest = shards.read_manifest(str(dataset))
  assert manifest.made['python'] in dataset.name
  documents = {
    (split, domain): manifest.splits[split][domain].documents
    for split in shards.SPLITS
    for domain in embedded.DOMAINS
  }
  # Files without prose have no document.
  assert documents['heldout', 'code'] >= documents['heldout', 'prose'] > 0
  assert documents['train', 'code'] + documents['heldout', 'code'] <= len(paths)
  # The message about damage names the cure; without a manifest it is built again.
  damage(dataset, 'flip')
  with pytest.raises(
    ValueError, match='delete that folder, and the next run makes it again'
  ):
    open_('stdlib', cache=str(folder))
  (dataset / 'manifest.json').unlink()
  assert open_('stdlib', cache=str(folder)).fingerprint == corpora[0].fingerprint


@pytest.mark.full
def test_two_builders_without_locks_use_their_own_drafts(stdlib, tmp_path, monkeypatch):
  _, paths = stdlib
  monkeypatch.setattr(embedded, 'files', lambda: paths)

  def refuse(*_):
    raise OSError('no locks')

  monkeypatch.setattr(cache.fcntl, 'flock', refuse)
  write, prints = shards.write_manifest, []

  def race(out, manifest):
    write(out, manifest)
    if not prints:
      prints.append(None)
      prints[0] = open_('stdlib', cache=str(tmp_path)).fingerprint

  monkeypatch.setattr(shards, 'write_manifest', race)
  assert open_('stdlib', cache=str(tmp_path)).fingerprint == prints[0]
  assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_the_default_cache_follows_the_platform(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert cache.default() == str(tmp_path / 'gated')
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'config\.data\.cache='):
    open_('stdlib', cache=str(tmp_path / 'file'))


@pytest.mark.full
def test_the_whole_library_is_large_enough_and_built_within_a_minute(tmp_path):
  began = time.monotonic()
  corpus = open_('stdlib', length=256, cache=str(tmp_path))
  assert time.monotonic() - began < 60
  (folder,) = tmp_path.glob('stdlib-*')
  splits = shards.read_manifest(str(folder)).splits
  assert sum(portion.bytes for portion in splits['train'].values()) > 6e6
  assert sum(portion.bytes for portion in splits['heldout'].values()) > 3e5
  assert not [n for n in embedded.files() if {'test', 'tests'} & set(n.split('/'))]
  assert all(splits['heldout'][domain].bytes > 1e5 for domain in corpus.domains)


@pytest.fixture(name='url')
def stored(built, remote):
  """The first dataset in an object store."""
  storage.upload(built[0], f'{remote}/one', storage.sizes(built[0]))
  return f'{remote}/one'


def test_a_dataset_in_a_store_is_the_same_data(built, url, tmp_path, caplog):
  cache = str(tmp_path / 'cache')
  here = open_(f'{built[0]}=2,{built[1]}@code=1', batch=6)
  with caplog.at_level(logging.INFO):
    there = open_(f'{url}/=2,{built[1]}@code=1', batch=6, cache=cache)
  assert there.fingerprint == here.fingerprint and there.domains == here.domains
  batches = [take(corpus.train(3, range(6)), 4) for corpus in (here, there)]
  assert all(same(a, b) for a, b in zip(*batches))
  assert {row[0] for row in there.record_ids(0)} == {f'{url}/', f'{built[1]}@code'}
  size = sum(n for name, n in storage.sizes(url).items() if name != 'manifest.json')
  assert f'copying {url}: ' in caplog.text and f'{size / 1e9:.3f} GB' in caplog.text
  caplog.clear()
  with caplog.at_level(logging.INFO):
    open_(f'{url}@prose', cache=cache)
  assert 'copying' not in caplog.text
  (copy,) = [name for name in storage.names(cache) if name[0] != '.']
  assert copy == f'data-{shards.read_manifest(built[0]).digest[:32]}'
  damage(tmp_path / 'cache' / copy, 'flip')
  with pytest.raises(
    ValueError, match='delete that folder, and the next run makes it again'
  ):
    open_(url, cache=cache)
  storage.remove(f'{cache}/{copy}/manifest.json')
  assert same(next(open_(url, batch=4, cache=cache).train(0, range(4))),
              next(open_(built[0], batch=4).train(0, range(4))))  # fmt: skip


def test_a_dataset_in_a_store_includes_its_tokenizer(remote, tmp_path):
  out = make(tmp_path / 'out', 3, tokenizer='bpe:258')
  storage.upload(out, f'{remote}/bpe', storage.sizes(out))
  cache = str(tmp_path / 'cache')
  corpus = open_(f'{remote}/bpe', cache=cache)
  assert corpus.tokenizer.fingerprint == open_(out).tokenizer.fingerprint
  storage.remove(cache)
  text = storage.read(out / 'tokenizer.json', 1 << 20)
  storage.write(f'{remote}/bpe/tokenizer.json', text + b' ')
  message = f'{remote}/bpe: tokenizer.json is not the tokenizer'
  for _ in range(2):
    with pytest.raises(ValueError, match=message):
      open_(f'{remote}/bpe', cache=cache)
  storage.remove(f'{remote}/bpe/tokenizer.json')
  with pytest.raises(ValueError, match=r'tokenizer\.json has 0 bytes'):
    open_(f'{remote}/bpe', cache=cache)


def test_damage_in_a_store_is_named_by_url_and_copied_again_alone(
  built, url, tmp_path, caplog, monkeypatch
):
  cache = str(tmp_path / 'cache')
  shard = max(shards.read_manifest(built[0]).shards, key=lambda shard: shard.size)
  good = storage.read(f'{url}/{shard.file}', 1 << 30)
  storage.write(f'{url}/{shard.file}', bytes(len(good)))
  with pytest.raises(ValueError, match=f'{url}/{shard.file} is damaged: its SHA-256'):
    open_(url, cache=cache)
  for bad, message in ((good[:-1], f'has {shard.size - 1} bytes'), (None, 'is missing')):
    storage.remove(f'{url}/{shard.file}')
    if bad:
      storage.write(f'{url}/{shard.file}', bad)
    with pytest.raises(ValueError, match=f'config.data.mixture=.*{shard.file} {message}'):
      open_(url, cache=cache)
  assert not [name for name in storage.names(cache) if name[0] != '.']
  storage.write(f'{url}/{shard.file}', good)
  with caplog.at_level(logging.INFO):
    corpus = open_(url, cache=cache)
  assert f'copying {url}: 1 files' in caplog.text
  assert corpus.fingerprint == open_(built[0]).fingerprint


def test_a_dataset_missing_in_the_store_is_named_by_url(remote, tmp_path, built):
  def refused(mix, message):
    with pytest.raises(ValueError, match=f'config.data.mixture=.*{message}'):
      open_(mix, cache=str(tmp_path))

  refused(f'{remote}/no', f"no such dataset '{remote}/no'")
  refused('s3://nobucket/x', "no such dataset 's3://nobucket/x'")
  refused('http://host/x', r'gs:// and s3://')
  storage.write(f'{remote}/odd/manifest.json', b'{"format": 1, ')
  refused(f'{remote}/odd', f'{remote}/odd/manifest.json is not JSON')
  manifest = json.loads((built[0] / 'manifest.json').read_text())
  manifest['splits']['train']['code']['shards'][0]['file'] = '../x'
  storage.write(f'{remote}/odd/manifest.json', json.dumps(manifest).encode())
  refused(f'{remote}/odd', 'outside of the folder')
  assert not storage.exists(tmp_path / 'x')


def test_a_dataset_without_room_is_refused_before_it_is_copied(
  url, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  message = f'{url} needs 0.0.. GB in .* only 0.000 GB: .*config.data.cache.*mount'
  with pytest.raises(ValueError, match=message):
    open_(url, cache=str(tmp_path / 'cache'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r"config\.data\.cache='.*/file'"):
    open_(url, cache=str(tmp_path / 'file'))


COPY = """
import sys, time
from gated.data import cache, remote
while time.time() < float(sys.argv[3]): pass
print(remote.directory(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.full
@pytest.mark.parametrize('locks', [True, False])
def test_several_processes_copy_one_dataset(url, built, tmp_path, spawn_python, locks):
  cache = tmp_path / 'cache'
  code = COPY
  if not locks:  # As on a file system without locks.
    refuse = 'def refuse(*_): raise OSError\ncache.fcntl.flock = refuse\n'
    code = COPY.replace('while', f'{refuse}while', 1)
  start = time.time() + 1.5
  children = [spawn_python(['-c', code, url, cache, start]) for _ in range(3)]
  outputs = process.outputs(children, timeout=60)
  assert len({out for out, _ in outputs}) == 1
  (folder,) = [path for path in cache.iterdir() if path.name[0] != '.']
  shards.verify(folder, shards.read_manifest(folder).shards, 'sha256')
  assert shards.read_manifest(folder).digest == shards.read_manifest(built[0]).digest


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_mixture_may_name_urls(scheme):
  url = f'{scheme}://bucket.a-b/books_1'
  terms = mixture.terms(f'{url}@code=0.7,{url}=2, {url}/sub@prose')
  assert [tuple(term) for term in terms] == [
    (url, 'code', Fraction(7, 10)),
    (url, '', Fraction(2)),
    (f'{url}/sub', 'prose', Fraction(1)),
  ]


WORKERS = """
import json, pickle, sys
from absl import app
from gated import data

def main(argv):
  cfg = data.Config(**json.loads(argv[1]))
  corpus = data.open(cfg, vocab=300, batch=6, seed=3, max_segments=0)
  batches = corpus.train(4, [5, 0, 3])
  taken = [tuple(x.copy() for x in next(batches)) for _ in range(7)]
  sys.stdout.buffer.write(pickle.dumps(taken))

if __name__ == '__main__':
  app.run(main)  # As in train.py: grain reads absl's flags.
"""


@pytest.mark.full
@pytest.mark.parametrize('workers', [1, 2])
def test_worker_processes_do_not_change_the_batches(built, tmp_path, workers):
  mix = f'{built[0]}=2,{built[1]}=1'
  expected = take(open_(mix, batch=6, seed=3).train(4, [5, 0, 3]), 7)
  (tmp_path / 'read.py').write_text(WORKERS)
  knobs = json.dumps(dataclasses.asdict(config(mix, workers=workers)))
  child = subprocess.run(
    [sys.executable, str(tmp_path / 'read.py'), knobs],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    timeout=120,
  )
  assert child.returncode == 0, child.stderr.decode()
  for a, b in zip(pickle.loads(child.stdout), expected, strict=True):
    assert same(a, b)
