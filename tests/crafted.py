"""What a stranger could send: good folders and files, each spoiled by one change.

A family has a good folder, a way to use it, and cases: a name, what the refusal must say,
and what spoils the folder. As a script it tries them all where nothing may be executed,
no socket opened, nothing written elsewhere, and memory is short:

  python tests/crafted.py FOLDER              every case: one line of JSON each
  python tests/crafted.py FOLDER commands     the command lines of train.py likewise
"""

import contextlib
import gzip
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import small

from gated import config, data, hf, plan, storage
from gated.data import faults, ids, inputs, prepare, sources, tokenizer
from gated.hf import files
from gated.model import abstract
from gated.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 1 << 29  # Bytes that refusing may take; a header may ask for any number.
SECONDS = 5.0  # Of processor time that refusing may take.
HANGS = 60.0  # Seconds after which it is stopped.
OUTSIDE = 'outside'  # A folder beside the good one, with what a path must not reach.
DEEP = '[' * 10**5 + ']' * 10**5
HUGE = 1 << 62
PICKLE = b'\x80\x04cos\nsystem\n(S"touch x"\ntR.'


class Case(NamedTuple):
  told: str  # A regular expression of what the refusal says.
  spoil: Callable[[Path], Any]


class Family(NamedTuple):
  make: Callable[[Path], None]  # Fills an empty folder with what is good.
  use: Callable[[Path], Any]  # As the code does; ValueError where it refuses.
  cases: dict[str, Case]


def said(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
  """A change of a JSON file: what `change` returns, or what it did to the content."""

  def spoil(folder: Path) -> None:
    content = json.loads((folder / file).read_text())
    changed = change(content)
    (folder / file).write_text(json.dumps(content if changed is None else changed))

  return spoil


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
  """Other content for a file, as it stands."""
  return lambda folder: (folder / file).write_bytes(
    content if isinstance(content, bytes) else content.encode()
  )


def cut(file: str, size: int) -> Callable[[Path], None]:
  return lambda folder: os.truncate(folder / file, size)


def linked(pattern: str, to: str = '') -> Callable[[Path], None]:
  """A file becomes a link: to itself moved out of the folder, or to `to`."""

  def spoil(folder: Path) -> None:
    file = min(folder.glob(pattern))
    target = Path(to) if to else folder.parent / OUTSIDE / file.name
    if not to:
      shutil.copy(file, target)
    file.unlink()
    file.symlink_to(target)

  return spoil


def pipe(pattern: str) -> Callable[[Path], None]:
  """A file becomes a pipe that nobody writes to: who reads it waits for ever."""

  def spoil(folder: Path) -> None:
    file = min(folder.glob(pattern))
    file.unlink()
    os.mkfifo(file)

  return spoil


# Tokenizers.

BPE, PIECES = 'tokenizer.json', 'words.model'


def make_tokenizers(folder: Path) -> None:
  import sentencepiece

  tokenizer.train_bpe(['the cat sat on the mat'] * 3, 262, str(folder / BPE))
  with open(folder / PIECES, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['the cat sat on the mat'] * 50),
      model_writer=file,
      vocab_size=290,
      byte_fallback=True,
      model_type='bpe',
      hard_vocab_limit=False,
      minloglevel=2,
    )


def use_tokenizers(folder: Path) -> None:
  for file in (BPE, PIECES):
    token = tokenizer.load(str(folder / file))
    ids_N, _ = token.encode('a' * 28 + '! the cat')
    token.decode(ids_N)


def token(number: Any) -> Callable[[Path], None]:
  return said(BPE, lambda c: c['model']['vocab'].update(zz=number))


def rule(group: str, **fields: Any) -> Callable[[Path], None]:
  return said(BPE, lambda c: c.update({group: fields}))


def split(pattern: str) -> dict:
  return dict(type='Split', pattern={'Regex': pattern}, behavior='Isolated', invert=False)


BOMB = dict(type='Replace', pattern={'String': 'a'}, content='a' * 1000)

TOKENIZERS = {
  'nothing': Case('1 to', text(BPE, '')),
  'no JSON': Case('is not a tokenizer.json', text(BPE, '{')),
  'a list': Case('is not a tokenizer.json', text(BPE, '[]')),
  'a pickle': Case('is not a tokenizer.json', text(BPE, PICKLE)),
  'UTF-16': Case('is not a tokenizer.json', text(BPE, '{}'.encode('utf-16'))),
  'deep': Case('is not a tokenizer.json', text(BPE, DEEP)),
  'deep within': Case('recursion limit', text(BPE, f'{{"model": {DEEP}}}')),
  'an id that allocates 16 GiB': Case('the id 4294967295', token(2**32 - 1)),
  'an id above all': Case('tokenizer', token(2**70)),
  'an id below 0': Case('-1', token(-1)),
  'half an id': Case('1.5', token(1.5)),
  'an id in words': Case('"5"', token('5')),
  'an id twice': Case('the same id', token(5)),
  'no vocabulary': Case(
    'out of vocabulary', said(BPE, lambda c: c['model'].update(vocab={}))
  ),
  'merges of nothing': Case(
    'out of vocab', said(BPE, lambda c: c['model']['merges'].append(['q' * 9] * 2))
  ),
  'another model': Case(
    'tokenizer', said(BPE, lambda c: c['model'].update(type='__import__("os")'))
  ),
  'dice': Case('at random', said(BPE, lambda c: c['model'].update(dropout=0.5))),
  'a pattern that is none': Case('Oniguruma', rule('pre_tokenizer', **split('(((('))),
  'a deep pattern': Case(
    'parse depth', rule('pre_tokenizer', **split('(' * 10**5 + ')' * 10**5))
  ),
  'a pattern that explodes': Case(
    'cannot encode', rule('pre_tokenizer', **split('(a+)+$'))
  ),
  'rules that blow up': Case(
    'times as long', rule('normalizer', type='Sequence', normalizers=[BOMB] * 4)
  ),
  'a map that is none': Case(
    'charsmap', rule('normalizer', type='Precompiled', precompiled_charsmap='AAAA')
  ),
  'a folder': Case('no such file', lambda f: ((f / BPE).unlink(), (f / BPE).mkdir())),
  'a pipe': Case('no such file', pipe(BPE)),
  'all of /dev/zero': Case('no such file', linked(BPE, '/dev/zero')),
  'pieces cut off': Case('not a SentencePiece model', cut(PIECES, 4000)),
  'pieces of noise': Case('not a SentencePiece model', text(PIECES, b'\xff' * 4096)),
  'a length of pieces above all': Case(
    'not a SentencePiece model', text(PIECES, b'\x0a' + b'\xff' * 8 + b'\x7f')
  ),
}


# Datasets.

MANIFEST = 'manifest.json'


def make_dataset(folder: Path) -> None:
  source = folder.parent / 'source.jsonl'
  lines = (json.dumps({'text': f'the cat sat on the mat {i}'}) for i in range(90))
  source.write_text('\n'.join(lines))
  options = prepare.Options(
    length=16,
    tokenizer='bytes',
    eos='',
    heldout=0.2,
    shard_rows=60,
    seed=0,
    bos=False,
    field='text',
    suffixes=(),
  )
  prepare.run(str(folder), {'cats': [str(source)]}, options, processes=1)


def use_dataset(folder: Path) -> None:
  c = small.recipe(data__mixture=str(folder))
  cfg = config.build(data.Config, c['data'], 'config.data')
  corpus = data.open(cfg, vocab=300, batch=4, seed=0, max_segments=0)
  next(corpus.train(0, range(4)))


def dataset(change: Callable[[Any], Any]) -> Callable[[Path], None]:
  return said(MANIFEST, change)


def cats(c: dict) -> dict:
  return c['splits']['train']['cats']


def shard(**fields: Any) -> Callable[[Path], None]:
  return dataset(lambda c: cats(c)['shards'][0].update(fields))


def portion(**fields: Any) -> Callable[[Path], None]:
  return dataset(lambda c: cats(c).update(fields))


def tokens(**fields: Any) -> Callable[[Path], None]:
  return dataset(lambda c: c['tokenizer'].update(fields))


SHARDS = '*-train-*.array_record'

DATASETS = {
  'no JSON': Case('is not JSON', text(MANIFEST, '{"format":')),
  'a list': Case('format', text(MANIFEST, '[]')),
  'deep': Case('is not JSON', text(MANIFEST, DEEP)),
  'deep within': Case(
    'nests deeper',
    dataset(lambda c: c['made'].update(x=json.loads('[' * 900 + ']' * 900))),
  ),
  'a number of 10^5 digits': Case(
    'is not JSON', text(MANIFEST, f'{{"format": {"9" * 10**5}}}')
  ),
  'a pipe': Case('', pipe(MANIFEST)),
  'all of /dev/zero': Case('', linked(MANIFEST, '/dev/zero')),
  'another format': Case('format=2', dataset(lambda c: c.update(format=2))),
  'a path up': Case('outside', shard(file=f'../{OUTSIDE}/secret')),
  'a path up and down': Case('outside', shard(file=f'x/../../{OUTSIDE}/secret')),
  'a path from the root': Case('outside', shard(file='/etc/passwd')),
  'a path with a NUL': Case('outside', shard(file='a\0b')),
  'a path that is none': Case('a str is expected', shard(file=['a'])),
  'a path of 5000 letters': Case('', shard(file='a' * 5000)),
  'a path that is no UTF-8': Case('', shard(file='a\ud800b')),
  'the folder itself': Case('outside', shard(file='.')),
  'no path': Case('outside', shard(file='')),
  'a shard linked out': Case('outside', linked(SHARDS)),
  'a shard that is a pipe': Case('missing', pipe(SHARDS)),
  'a shard cut off': Case('bytes, but', lambda f: os.truncate(min(f.glob(SHARDS)), 1000)),
  'more rows than there are': Case('rows=', portion(rows=HUGE)),
  'rows that nobody has': Case(
    'rows', lambda f: (shard(rows=HUGE - 1)(f), portion(rows=HUGE)(f))
  ),
  'rows below 0': Case('rows=-1', shard(rows=-1)),
  'rows that are no number': Case('tokens=nan', portion(tokens=float('nan'))),
  'rows without end': Case('rows=inf', shard(rows=float('inf'))),
  'rows in words': Case("rows='9'", shard(rows='9')),
  'rows that are a truth': Case('rows=True', shard(rows=True)),
  'a size above all': Case('the manifest says', shard(size=HUGE)),
  'a length above all': Case('length', dataset(lambda c: c.update(length=HUGE))),
  'a row of 100 MB': Case('length', dataset(lambda c: c.update(length=1 << 24))),
  'a vocabulary above all': Case('vocab', tokens(vocab=HUGE)),
  'an end that is no token': Case('eos', tokens(eos=300)),
  'a tokenizer elsewhere': Case('outside', tokens(name=f'../{OUTSIDE}/{BPE}')),
  'a tokenizer that is none': Case('tokenizer', tokens(name='__import__("os")')),
  'a domain that is a path': Case(
    'no name', dataset(lambda c: c['splits']['train'].update({'../x': cats(c)}))
  ),
  '10^5 domains': Case(
    'shards',
    dataset(lambda c: c['splits']['train'].update({f'd{i}': {} for i in range(10**5)})),
  ),
  '10^5 shards': Case(
    'rows=', portion(shards=[dict(file='x', rows=1, size=1, sha256='')] * 10**5)
  ),
  'splits in a list': Case('splits', dataset(lambda c: c.update(splits=[]))),
}


# Folders of Hugging Face's.

NORM = 'model.norm.weight'
GOLDEN = ROOT / 'tests/golden'


def make_export(folder: Path) -> None:
  shutil.copytree(GOLDEN / 'hf_qwen3', folder, dirs_exist_ok=True)


def use_export(folder: Path) -> None:
  hf.read(folder, abstract(hf.config(folder)))


def header(change: Callable[[dict], Any], size: int | None = None):
  """A change of the header of a safetensors file, and of the length it claims to have."""

  def spoil(folder: Path) -> None:
    path = folder / files.SINGLE
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], 'little')
    said = json.loads(content[8:end])
    changed = change(said)
    head = changed if isinstance(changed, bytes) else json.dumps(said).encode()
    length = len(head) if size is None else size
    path.write_bytes(length.to_bytes(8, 'little') + head + content[end:])

  return spoil


def norm(**fields: Any):
  return header(lambda h: h[NORM].update(fields))


def model(**keys: Any) -> Callable[[Path], None]:
  return said(files.CONFIG, lambda c: c | keys)


def index(place: Any) -> Callable[[Path], None]:
  """An index that names a file for each tensor, one of them where it must not lie."""

  def spoil(folder: Path) -> None:
    names = dict.fromkeys(files.Tensors(folder).headers, files.SINGLE)
    content = {'weight_map': names | {NORM: place}}
    (folder / files.INDEX).write_text(json.dumps(content))

  return spoil


def renamed(to: str) -> Callable[[Path], None]:
  return lambda folder: (folder / files.SINGLE).rename(folder / to)


def many(h: dict) -> None:
  empty = dict(dtype='F32', shape=[0], data_offsets=[0, 0])
  h.update({f'e{i}': empty for i in range(10**4)})


WHOLE, MEANS = 'is not a complete safetensors', 'config.json'

EXPORTS = {
  'a header longer than the file': Case(WHOLE, header(lambda h: None, 10**7)),
  'a header of 2^63 bytes': Case(WHOLE, header(lambda h: None, 2**63)),
  'no header': Case(WHOLE, header(lambda h: None, 0)),
  'a deep header': Case(WHOLE, header(lambda h: DEEP.encode())),
  'a shape that overflows': Case(WHOLE, norm(shape=[HUGE, 4])),
  'a shape above all': Case(WHOLE, norm(shape=[2**70])),
  'a shape below 0': Case(WHOLE, norm(shape=[-16])),
  'an offset past the end': Case(WHOLE, norm(data_offsets=[0, 2**40])),
  'an offset above all': Case(WHOLE, norm(data_offsets=[2**63, 2**63 + 64])),
  'offsets the wrong way round': Case(WHOLE, norm(data_offsets=[64, 0])),
  'tensors over each other': Case(WHOLE, norm(data_offsets=[0, 64])),
  'a dtype that is none': Case(WHOLE, norm(dtype='O')),
  'a dtype that is not read': Case('has dtype F64', norm(dtype='F64', shape=[8])),
  'a tensor that is missing': Case(
    'is missing', header(lambda h: h.update({'../x': h.pop(NORM)}))
  ),
  '10^4 tensors too many': Case('10000 faults', header(many)),
  'an index that leads up': Case('inside the folder', index('../../../etc/passwd')),
  'an index that leads to a root': Case('inside the folder', index('/etc/x.safetensors')),
  'an index that leads up and down': Case(
    'inside the folder', index('x/../../x.safetensors')
  ),
  'an index that leads to a number': Case('inside the folder', index(3)),
  'an index with a NUL': Case('', index('a\0.safetensors')),
  'an index of an address': Case('', index('gs://x/y.safetensors')),
  'an index of nothing': Case('no weight_map', text(files.INDEX, '{"weight_map": {}}')),
  'a deep index': Case(
    'nested too deeply', text(files.INDEX, f'{{"weight_map": {DEEP}}}')
  ),
  'weights linked out': Case('a link out', linked(files.SINGLE)),
  'weights of /dev/zero': Case('a link out', linked(files.SINGLE, '/dev/zero')),
  'weights from a pipe': Case('no such file', pipe(files.SINGLE)),
  'a config linked out': Case('a link out', linked(files.CONFIG)),
  'a pickle': Case('such as pickles', renamed('pytorch_model.bin')),
  'a pickle by another name': Case('such as pickles', renamed('model.pkl')),
  'an array of objects': Case('such as pickles', renamed('model.npy')),
  'a pickle that says it is none': Case(WHOLE, text(files.SINGLE, PICKLE)),
  'a config of 10^9 layers': Case(
    MEANS, model(num_hidden_layers=10**9, layer_types=None)
  ),
  'a config of 4000 layers': Case(
    '4000 layers, but', model(num_hidden_layers=4000, layer_types=None)
  ),
  'a width above all': Case(MEANS, model(hidden_size=HUGE)),
  'a width below 0': Case(MEANS, model(hidden_size=-16)),
  'a width in words': Case("hidden_size='16'", model(hidden_size='16')),
  'a width that is no number': Case('hidden_size=nan', model(hidden_size=float('nan'))),
  'a width of 10^400': Case('401 digits', model(hidden_size=10**400)),
  'no heads': Case(MEANS, model(num_attention_heads=0)),
  'a base that is no number': Case(
    'nan', model(rope_theta=float('nan'), rope_parameters=None)
  ),
  'a vocabulary above all': Case(MEANS, model(vocab_size=HUGE)),
  'a vocabulary of others': Case('shape', model(vocab_size=2**20)),
  'code for an activation': Case('hidden_act', model(hidden_act='__import__("os")')),
  'code for a model': Case('model_type', model(model_type='evil.py')),
  '10^5 kinds of layers': Case(
    'layer_types', model(layer_types=['full_attention'] * 10**5)
  ),
  'a deep config': Case('nested too deeply', text(files.CONFIG, f'{{"x": {DEEP}}}')),
  'no config': Case('No such file', lambda f: (f / files.CONFIG).unlink()),
}


# Recipes: what is typed, or stands in a checkpoint.


def make_recipe(folder: Path) -> None:
  (folder / 'changes.json').write_text('{}')


def use_recipe(folder: Path) -> None:
  changes = json.loads((folder / 'changes.json').read_text())
  plan.Plan(config.build(plan.Config, small.recipe(**changes), 'config'))


def knob(name: str, value: Any, told: str = '') -> tuple[str, Case]:
  spoil = text('changes.json', json.dumps({name: value}))
  return f'{name}={value!r}'[:60], Case(told or name.replace('__', r'\.'), spoil)


RECIPES = dict(
  [
    knob('model__depth', 10**9),
    knob('model__depth', HUGE),
    knob('model__depth', -1),
    knob('model__depth', 1e9),
    knob('model__depth', True),
    knob('model__depth', '4'),
    knob('model__depth', [4]),
    knob('model__width', 10**20),
    knob('model__vocab', 2**40),
    knob('model__ffn', 0),
    knob('model__norm_rank', HUGE),
    knob('model__attn__heads', HUGE),
    knob('model__attn__head_dim', 2**30),
    knob('model__attn__sink_tokens', 10**12),
    knob('model__attn__switch__experts', 10**12),
    knob('model__attn__backend', '__import__("os")'),
    knob('model__attn__window', -1),
    knob('model__attn__window', HUGE),
    knob('model__attn__global_layers', 'every:' + '9' * 99),
    knob('model__attn__rounding', 'lambda: 0'),
    knob('model__attn__clip_gamma', float('nan')),
    knob('model__attn__clip_zeta', 10**9),
    knob('model__attn__elastic_tau', float('inf')),
    knob('model__attn__differential', 'yes'),
    knob('model__norm_alpha', [1.0] * 10**4),
    knob('optim__qk_clip', float('inf')),
    knob('optim__qk_clip', 1.0),  # With QK-norm.
    knob('model__attn__gate__layers', 'every:' + '9' * 99),
    knob('model__attn__gate__layers', '0-' + '9' * 9),
    knob('model__attn__gate__inputs', 'rank:' + '9' * 9),
    knob('model__attn__gate__opens', [0, 10**18]),
    knob('model__attn__gate__bias_init', float('nan')),
    knob('model__attn__gate__weight_decay', float('inf')),
    knob('model__attn__gates', 'sdpa; ' * 10**3, r'two gates have position'),
    knob('model__attn__gates', 'value std=' + '(' * 500, r'gates\[0\]\.std'),
    knob('model__attn__gates', 'value std=__import__("os")', r'gates\[0\]\.std'),
    knob('model__attn__gates', 'value layers=last:99', r'gates\[0\]\.layers'),
    knob('optim__gates_first', -1),
    knob('model__moe__experts', 10**9),
    knob('model__branch_clip', float('-inf')),
    knob('model__numerics__compute', 'object'),
    knob('model__numerics__matmul', 'float8'),
    knob('optim__lr', float('nan')),
    knob('optim__lr', float('inf')),
    knob('optim__lr', -1.0),
    knob('optim__lr', '1e-3 if True else 0'),
    knob('optim__schedule', 'lambda: 0'),
    knob('optim__moments', 'float8'),
    knob('optim__transfer', 'mup()'),
    knob('optim__base_width', 0),
    knob('optim__base_width', -HUGE),
    knob('optim__base_head_dim', -1),
    knob('steps', 10**18),
    knob('seed', 2**70),
    knob('mesh__data', HUGE),
    knob('mesh__tensor', -2),
    knob('name', '../../x'),
    knob('name', ''),
    knob('data__length', HUGE),
    knob('data__workers', 10**9),
    knob('data__prefetch', 10**12),
    knob('data__tokenizer', '$(touch x)'),
    knob('data__mixture', ''),
    knob('data__mixture', 'a=nan'),
    knob('data__mixture', 'a=1e9'),
  ]
)


# Checkpoints. Digests find damage, not forgery: `forged` makes them right again.

STEP = 'checkpoints/5'
SAVED = f'{STEP}/{MANIFEST}'


class State(NamedTuple):
  model: Any
  step: Any


def a_state() -> State:
  w, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(3, np.float32)
  return State(jax.tree.map(jax.numpy.asarray, {'w': w, 'b': b}), jax.numpy.int32(5))


def make_checkpoint(folder: Path) -> None:
  about = {'config': {}, 'data': {'sha256': ''}, 'heldout_loss': None}
  with checkpoint.Checkpoints(folder / 'checkpoints', keep=2, keep_every=0) as saved:
    saved.save(5, a_state(), about)


def use_checkpoint(folder: Path) -> None:
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
  with checkpoint.Reader(folder / 'checkpoints') as saved:
    step = saved.pick('latest', '--step')
    saved.restore(step, jax.tree.map(shape, a_state()))


def forged(change: Callable[[dict], Any]) -> Callable[[Path], None]:
  """A changed manifest of a step, whose own digest is right."""

  def seal(c: dict) -> dict:
    c.pop('sha256')
    change(c)
    return c | {'sha256': config.digest(c)}

  return said(SAVED, seal)


def payload(file: str, content: bytes) -> Callable[[Path], None]:
  """Another content of a file of a step, which the manifest vouches for."""

  def spoil(folder: Path) -> None:
    (folder / STEP / file).write_bytes(content)
    found = checkpoint.manifest.survey(storage.path(folder / STEP), [file])
    forged(lambda c: c['files'].update(found))(folder)

  return spoil


def zarr(**fields: Any) -> Callable[[Path], None]:
  """Other metadata of the array w, below which the manifest vouches for every file."""

  def spoil(folder: Path) -> None:
    import tensorstore

    place = storage.path(folder / STEP)
    spec = {'driver': 'ocdbt', 'base': f'file://{place / "model"}/'}
    store = tensorstore.KvStore.open(spec).result()
    content = json.loads(store.read('w/.zarray').result().value) | fields
    store.write('w/.zarray', json.dumps(content).encode()).result()
    names = checkpoint.manifest.files(place)
    found = checkpoint.manifest.survey(place, names)
    forged(lambda c: c.update(files=found))(folder)

  return spoil


def entry(name: str, found: Any = (1, 'a')) -> Callable[[Path], None]:
  return forged(lambda c: c['files'].update({name: list(found)}))


def leaf(*said: Any) -> Callable[[Path], None]:
  return forged(lambda c: c['leaves']['model'].update(w=list(said)))


def about(**fields: Any) -> Callable[[Path], None]:
  return forged(lambda c: c['about'].update(fields))


CHECKPOINTS = {
  'no JSON': Case('cannot be used', text(SAVED, '{')),
  'a list': Case('format', text(SAVED, '[]')),
  'a pickle': Case('cannot be used', text(SAVED, PICKLE)),
  'deep': Case('cannot be used', text(SAVED, DEEP)),
  'a number of 10^5 digits': Case(
    'cannot be used', text(SAVED, f'{{"format": {"9" * 10**5}}}')
  ),
  'another format': Case('format=2', forged(lambda c: c.update(format=2))),
  'changed': Case('SHA-256', said(SAVED, lambda c: c.update(step=4))),
  'a path up': Case('outside', entry('../x')),
  'a path up and down': Case('outside', entry(f'x/../../../{OUTSIDE}/secret')),
  'a path from the root': Case('outside', entry('/etc/passwd')),
  'a path with a NUL': Case('outside', entry('a\0b')),
  'no path': Case('outside', entry('')),
  'a path to a folder': Case('missing', entry('model')),
  'a payload linked out': Case('outside', linked(f'{STEP}/model/_METADATA')),
  'a payload that is a pipe': Case('bytes, but', pipe(f'{STEP}/model/_METADATA')),
  'a payload cut off': Case('bytes, but', cut(f'{STEP}/model/_METADATA', 9)),
  'a size above all': Case('were saved', entry('model/_METADATA', (HUGE - 1, ''))),
  'a size below 0': Case('has', entry('model/_METADATA', (-1, ''))),
  'a size in words': Case('has', entry('model/_METADATA', ('1', ''))),
  'a shape above all': Case('is expected', leaf('float32', HUGE - 1, 4)),
  'a shape below 0': Case('model has w', leaf('float32', -3, 4)),
  'a shape of 10^4 dims': Case('model has w', leaf('float32', *[1] * 10**4)),
  'a dtype of objects': Case('is expected', leaf('object', 3, 4)),
  'leaves in a list': Case('cannot be used', forged(lambda c: c.update(leaves=[]))),
  'no leaves': Case('manifest', forged(lambda c: c.pop('leaves'))),
  'files in a list': Case('cannot be used', forged(lambda c: c.update(files=[]))),
  'another step': Case('holds step 6', forged(lambda c: c.update(step=6))),
  'a step above all': Case('is not a step', forged(lambda c: c.update(step=2**70))),
  'a config that is none': Case('config', about(config='__import__("os")')),
  'a loss in words': Case('is not a number', about(heldout_loss='x')),
  'an array of another shape': Case('shape', zarr(shape=[2**40, 4])),
  'an array of objects': Case('dtype', zarr(dtype='|O')),
  'an array by pickle': Case('compressor', zarr(compressor={'id': 'pickle'})),
  'an array through pickle': Case('filters', zarr(filters=[{'id': 'pickle'}])),
  'chunks of 8 GiB': Case('has chunks of', zarr(chunks=[2**13, 2**18])),
  'chunks above all': Case('too large', zarr(chunks=[2**31, 2**30])),
  'a pickle for an index': Case('', payload('model/manifest.ocdbt', PICKLE)),
  'deep metadata': Case('', payload('model/_METADATA', DEEP.encode())),
  'metadata in a list': Case('', payload('model/_METADATA', b'[]')),
  'deep within': Case('nests deeper', about(config=json.loads('[' * 99 + ']' * 99))),
  'a pipe': Case('is not a file', pipe(SAVED)),
  'all of /dev/zero': Case('is not a file', linked(SAVED, '/dev/zero')),
  'three numbers of a file': Case(
    'cannot be used', entry('model/_METADATA', (1, 'a', 2))
  ),
  'a leaf of nothing': Case('cannot be used', leaf()),
  'a loss that is no number': Case(
    '', said(SAVED, lambda c: c['about'].update(heldout_loss=float('nan')))
  ),
  'a pickle for metadata': Case('', payload('model/_METADATA', PICKLE)),
}


# Input of scripts/prepare_data.py.

LINES, PACKED, TABLE = 'text/a.jsonl', 'text/b.jsonl.gz', 'text/c.parquet'
STREAM, INDEX, HEADED = 'ids/a.bin', 'ids/b.idx', 'ids/c.bin'
WORDS = b'{"text": "the cat sat on the mat"}\n' * 9


def make_input(folder: Path) -> None:
  import pyarrow
  import pyarrow.parquet
  import zstandard  # noqa: F401  Imported here, not by the first case.

  (folder / 'text').mkdir()
  (folder / 'ids').mkdir()
  (folder / LINES).write_bytes(WORDS)
  (folder / PACKED).write_bytes(gzip.compress(WORDS))
  pyarrow.parquet.write_table(pyarrow.table({'text': ['the cat'] * 99}), folder / TABLE)
  stream = np.frombuffer(b'the cat sat' * 9, np.uint8).astype('<u2')
  (folder / STREAM).write_bytes(stream.tobytes())
  head = np.zeros(256, '<i4')
  head[:3] = 20240520, 1, len(stream)
  (folder / HEADED).write_bytes(head.tobytes() + stream.tobytes())
  (folder / 'ids/b.bin').write_bytes(stream.tobytes())
  (folder / INDEX).write_bytes(index())


def index(
  version=1, code=8, sizes=(50, 49), places=(0, 100), documents=(0, 1, 2), counts=(2, 3)
) -> bytes:
  """Megatron's index of two documents of 99 ids."""
  fields = [(version, '<u8'), (code, '<u1'), (counts, '<u8'), (sizes, '<i4')]
  fields += [(places, '<i8'), (documents, '<i8')]
  return ids.MEGATRON + b''.join(np.array(v, dtype).tobytes() for v, dtype in fields)


def use_input(folder: Path) -> None:
  bytes_ = tokenizer.load('bytes')
  for name in ('text', 'ids'):
    options = prepare.Options(
      length=16,
      tokenizer='bytes',
      eos='',
      heldout=0,
      shard_rows=60,
      seed=0,
      bos=False,
      field='text',
      suffixes=(),
      dedup='exact',
      ids='auto' if name == 'ids' else '',
    )
    domains, tallies = {'d': [str(folder / name)]}, {'d': faults.Tally()}
    groups = inputs.survey(domains, options, tallies, bytes_, {})
    for unit in groups['d']:
      sources.digest(unit)
      for _, document in sources.documents(unit):
        assert list(document.encode(bytes_, len))


def indexed(**fields: Any) -> Callable[[Path], None]:
  return text(INDEX, index(**fields))


def header_of(*numbers: int) -> Callable[[Path], None]:
  head = np.zeros(256, '<i4')
  head[: len(numbers)] = numbers
  return text(HEADED, head.tobytes() + b'ab' * 99)


NO_INDEX = 'is not an index of Megatron'
INPUTS = {
  'no UTF-8': Case('not UTF-8', text('text/a.txt', b'caf\xe9')),
  'a character that is none': Case('not UTF-8', text(LINES, '{"text": "\\ud800"}')),
  'no JSON': Case('not a line of JSON', text(LINES, '{"text": ')),
  'a deep line': Case('not a line of JSON', text(LINES, DEEP)),
  'a number of 10^5 digits': Case(
    'not a line of JSON', text(LINES, f'{{"text": {"9" * 10**5}}}')
  ),
  'a text in a list': Case('is no text there', text(LINES, '{"text": ["a"]}')),
  'a line of nothing': Case('is no text there', text(LINES, '[]')),
  'a pickle for lines': Case('not a line of JSON', text(LINES, PICKLE)),
  'an archive cut off': Case('cannot be unpacked', cut(PACKED, 30)),
  'an archive of noise': Case(
    'cannot be unpacked', text(PACKED, b'\x1f\x8b\x08' + b'\xff' * 99)
  ),
  'another archive of noise': Case(
    'cannot be unpacked', text(PACKED, b'\x28\xb5\x2f\xfd' + b'\xff' * 99)
  ),
  'an archive with a window of 128 GiB': Case(
    'cannot be unpacked', text(PACKED, b'\x28\xb5\x2f\xfd\x00\xd8' + bytes(99))
  ),
  'a table of noise': Case('is not a Parquet file', text(TABLE, b'\xff' * 999)),
  'a pickle for a table': Case('is not a Parquet file', text(TABLE, PICKLE)),
  'a table cut off': Case('is not a Parquet file', cut(TABLE, 300)),
  'a footer above all': Case(
    'is not a Parquet file', text(TABLE, b'PAR1' * 9 + b'\xff\xff\xff\x7fPAR1')
  ),
  'half an id': Case('bytes of ids', text(STREAM, b'abc')),
  'an id above all': Case('the id 65535', text(STREAM, b'\xff' * 99 * 2)),
  'ids of another width': Case('every second', text(STREAM, b'a\0\0\0' * 99)),
  'more ids than there are': Case('its header says', header_of(20240520, 1, 1 << 30)),
  'fewer ids than none': Case('its header says', header_of(20240520, 1, -99)),
  'an index cut off': Case(NO_INDEX, cut(INDEX, 40)),
  'an index of a magic': Case(NO_INDEX, cut(INDEX, 9)),
  'an index of another version': Case(NO_INDEX, indexed(version=2)),
  'ids of no type': Case(NO_INDEX, indexed(code=99)),
  'ids that are floats': Case(NO_INDEX, indexed(code=7)),
  'sequences above all': Case(NO_INDEX, indexed(counts=(HUGE, 3))),
  'documents above all': Case(NO_INDEX, indexed(counts=(2, HUGE))),
  'sequences that wrap': Case(NO_INDEX, indexed(counts=((1 << 64) - 1, 3))),
  'a sequence outside': Case(NO_INDEX, indexed(places=(0, HUGE))),
  'a sequence below 0': Case(NO_INDEX, indexed(places=(0, -100))),
  'a size below 0': Case(NO_INDEX, indexed(sizes=(50, -49))),
  'a size above all': Case(NO_INDEX, indexed(sizes=(50, (1 << 31) - 1))),
  'documents in no order': Case(NO_INDEX, indexed(documents=(0, 2, 1))),
  'a document outside': Case(NO_INDEX, indexed(documents=(0, 1, HUGE))),
  'a document below 0': Case(NO_INDEX, indexed(documents=(-5, 1, 2))),
  'an id in words': Case('is no list of ids', text('ids/a.jsonl', '{"text": ["a"]}')),
  'an id that is a truth': Case(
    'is no list of ids', text('ids/a.jsonl', '{"text": [true]}')
  ),
  'an id of 30 digits': Case(
    'no ids|too large', text('ids/a.jsonl', f'{{"text": [{10**30}]}}')
  ),
}


FAMILIES = {
  'tokenizer': Family(make_tokenizers, use_tokenizers, TOKENIZERS),
  'input': Family(make_input, use_input, INPUTS),
  'dataset': Family(make_dataset, use_dataset, DATASETS),
  'export': Family(make_export, use_export, EXPORTS),
  'recipe': Family(make_recipe, use_recipe, RECIPES),
  'checkpoint': Family(make_checkpoint, use_checkpoint, CHECKPOINTS),
}


# Command lines of train.py: what its one line says, and the argument.

COMMANDS = (
  ('config.model.depth', '--config.model.depth=1000000000'),
  ('config.model.depth', '--config.model.depth=1e9'),
  ('config.model.depth', '--config.model.depth=-4'),
  ('config.model.width', '--config.model.width=99999999999999999999'),
  ('config.model.width', '--config.model.width=__import__("os").system("touch x")'),
  ('config.optim.lr', '--config.optim.lr=nan'),
  ('config.optim.lr', '--config.optim.lr=1e-3;touch x'),
  ('config.name', '--config.name=../../x'),
  ('config.data.mixture', '--config.data.mixture=$(touch x)'),
  ('config.data.mixture', '--config.data.mixture=../../../etc/passwd'),
  ('config.__class__', '--config.__class__=x'),
  ('config.model.moe.experts', '--config.model.moe.experts=1000000000'),
  ('is not a recipe', '--config=/etc/passwd'),
  ('is not a recipe', '--config=os:system("touch x")'),
)


# The script.

FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen')
FORBIDDEN += ('socket.connect', 'socket.bind', 'socket.getaddrinfo', 'socket.sendto')
FORBIDDEN += ('pickle.', 'ctypes.dlopen', 'code.__new__')
CHANGES = ('os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.link', 'os.symlink')
CHANGES += ('os.truncate', 'os.chmod', 'os.chown', 'os.utime', 'shutil.')


class Watch:
  """An audit hook that notes what the refusal of an input must not do."""

  def __init__(self, home: Path):
    self.home, self.seen, self.on = str(home), [], False
    sys.addaudithook(self)

  def __call__(self, event: str, args: tuple) -> None:
    if not self.on:
      return
    # What a string was compiled to; modules have files.
    told = event == 'exec' and getattr(args[0], 'co_filename', '') == '<string>'
    told = told or event.startswith(FORBIDDEN)
    writes = event.startswith(CHANGES)
    if event == 'open':
      writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if told or (writes and any(map(self._elsewhere, args[:2]))):
      self.seen.append(f'{event} {args!r}'[:200])

  def _elsewhere(self, path: Any) -> bool:
    return isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith(self.home)

  @contextlib.contextmanager
  def watching(self):
    self.seen, self.on = [], True
    try:
      yield
    finally:
      self.on = False

  def check(self) -> None:
    """Fails unless it sees what it is for: else its silence would say nothing."""
    with self.watching():
      eval('1')
      pickle.loads(pickle.dumps(print))
      open(os.devnull, 'w').close()
    assert [line.split()[0] for line in self.seen] == [
      'exec',
      'pickle.find_class',
      'open',
    ]


def outcome(use: Callable[[], Any]) -> tuple[str, str]:
  """-> ValueError, or what else it raised (Alarm after HANGS), and what that says."""
  signal.signal(signal.SIGALRM, _ring)
  signal.setitimer(signal.ITIMER_REAL, HANGS)
  try:
    use()
  except ValueError as error:
    return 'ValueError', str(error)
  except BaseException as error:
    return type(error).__name__, str(error)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  return '', ''


class Alarm(BaseException):
  """No refusal came in time."""


def _ring(*_) -> None:
  raise Alarm


def short_of_memory() -> None:
  now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def try_all(home: Path) -> None:
  watch, good = Watch(home), {}
  (home / OUTSIDE).mkdir()
  for name, family in FAMILIES.items():
    good[name] = home / name
    good[name].mkdir()
    family.make(good[name])
    family.use(good[name])  # Imports what is needed, and shows that it is good.
  watch.check()
  short_of_memory()
  for name, family in FAMILIES.items():
    for case, (_, spoil) in family.cases.items():
      folder = home / 'case'
      shutil.copytree(good[name], folder)
      spoil(folder)
      began = time.process_time()
      with watch.watching():
        kind, told = outcome(lambda: family.use(folder))  # noqa: B023
      line = dict(family=name, case=case, kind=kind, told=told, seen=watch.seen)
      print(json.dumps(line | dict(seconds=time.process_time() - began)), flush=True)
      shutil.rmtree(folder)


def try_commands(home: Path) -> None:
  """Each in a fork of this process, which has imported train.py and done no more."""
  from absl import app

  import train

  for told, argument in COMMANDS:
    recipe = [] if argument.startswith('--config=') else [f'{ROOT}/configs/tiny.py']
    argv = ['train.py', *(f'--config={path}' for path in recipe), argument, '--dry_run']
    file = home / 'stderr'
    child = os.fork()
    if not child:
      os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
      os.chdir(home / 'empty')
      short_of_memory()
      sys.argv = argv  # Where ml_collections looks for knobs.
      try:
        app.run(train.main, argv=argv, flags_parser=train.parse)
      except SystemExit as error:
        os._exit(error.code)
      os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line = dict(case=argument[:80], wanted=told, code=code, told=file.read_text())
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  (try_commands if sys.argv[2:] == ['commands'] else try_all)(pathlib.Path(sys.argv[1]))
