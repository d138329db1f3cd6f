"""Documents of any size, token ids, duplicates, the hub, and a worker that is killed."""

import contextlib
import inspect
import json
import logging
import lzma
import os
import random
import signal
import sys

import numpy as np
import pytest
import tokenizers

from gated import data, evals
from gated.data import (
  content,
  cuts,
  documents,
  mixture,
  pieces,
  pool,
  prepare,
  progress,
  shards,
  tokenizer,
  units,
)
from scripts import prepare_data
from tests.data.test_prepare_data import decoded, options, rows

PRE, END = tokenizers.pre_tokenizers, tokenizer.END
GPT4 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
GPT4 += r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
BYTES = PRE.ByteLevel(add_prefix_space=False, use_regex=False)
SPLIT = PRE.Sequence([PRE.Split(tokenizers.Regex(GPT4), 'isolated'), BYTES])
# Name -> pre-tokenizer, normalizer, decoder.
VOCABULARIES = {
  'GPT-2': (PRE.ByteLevel(add_prefix_space=False), None, None),
  'GPT-2 with a space before': (PRE.ByteLevel(add_prefix_space=True), None, None),
  'GPT-4': (SPLIT, None, None),
  'Qwen': (SPLIT, tokenizers.normalizers.NFC(), None),
  'BERT': (
    PRE.BertPreTokenizer(),
    tokenizers.normalizers.BertNormalizer(),
    tokenizers.decoders.WordPiece(),
  ),
  'T5': (PRE.Metaspace(), None, tokenizers.decoders.Metaspace()),
}


def mess(size, seed=0):
  parts = (
    "a,b,z , ,  ,\n,\n\n,日,本,é,e\u0301,1,22,333,!,...,\t,\u00a0,'s,'ll,😀,\x1c,word "
  )
  return ''.join(random.Random(seed).choices(parts.split(','), k=size))


def blocks(text, size=1500):
  return [text[i : i + size] for i in range(0, len(text) or 1, size)]


def encoded(text, token):
  parts = documents.Text(blocks(text)).encode(token, lambda block: None)
  ids, sizes = zip(*parts)
  return len(ids), np.concatenate(ids), np.concatenate(sizes)


@pytest.fixture
def small_windows(monkeypatch):
  monkeypatch.setattr(cuts, 'WINDOW', 1000)
  monkeypatch.setattr(cuts, 'TAIL', 100)


@pytest.mark.parametrize('name', VOCABULARIES)
def test_the_ids_of_pieces_are_those_of_the_whole_text(name, tmp_path, small_windows):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer, normalizer, decoder = VOCABULARIES[name]
  if normalizer:
    model.normalizer = normalizer
  model.decoder = decoder or tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[END],
    initial_alphabet=[] if decoder else PRE.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([mess(3000, seed=1), 'some words to learn ' * 9], trainer)
  model.save(str(tmp_path / 'tokenizer.json'))
  token = tokenizer.load(str(tmp_path / 'tokenizer.json'))
  for text in (mess(9000), 'to be, ' * 900 + ' ' * 900, '271828' * 700, ''):
    count, ids_N, bytes_N = encoded(text, token)
    whole_N, sizes_N = token.encode(text)
    assert ids_N.tolist() == whole_N.tolist()
    assert bytes_N.sum() == sizes_N.sum()
    assert count > 3 or len(set(text)) < 9


def test_a_text_that_cannot_be_cut_is_refused_above_a_size(
  small_windows, monkeypatch, tmp_path
):
  monkeypatch.setattr(cuts, 'MAX_WHOLE', 4000)
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer, model.decoder = BYTES, tokenizers.decoders.ByteLevel()
  settings = dict(initial_alphabet=PRE.ByteLevel.alphabet(), special_tokens=[END])
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, **settings)
  model.train_from_iterator(['a b'], trainer)
  model.save(str(tmp_path / 'tokenizer.json'))
  token = tokenizer.load(str(tmp_path / 'tokenizer.json'))
  text = 'a b' * 1300
  assert encoded(text, token)[1].tolist() == token.encode(text)[0].tolist()
  with pytest.raises(ValueError, match='cannot cut a text of more than 4,000 characters'):
    encoded(text + text, token)


def test_a_bpe_of_a_text_in_pieces_is_that_of_the_whole(tmp_path, small_windows):
  text = ''.join(f'line {i} of it,  and\n\n more{i % 7}\n' for i in range(900))
  assert len(list(cuts.words(blocks(text)))) > 5
  whole = tokenizer.train_bpe([text], 300, str(tmp_path / 'whole.json'))
  parts = tokenizer.train_bpe(cuts.words(blocks(text)), 300, str(tmp_path / 'parts.json'))
  assert whole.fingerprint == parts.fingerprint


def test_a_large_document_gives_the_same_dataset_in_pieces(tmp_path, monkeypatch):
  text = 'A line of é and 日本, then more; to be continued elsewhere.\n' * 900
  (tmp_path / 'a.txt').write_text(text)
  (tmp_path / 'b.jsonl').write_text(json.dumps({'text': text + 'x'}) + '\n')
  domains = {'d': [str(tmp_path / 'a.txt'), str(tmp_path / 'b.jsonl')]}
  settings = options(
    tokenizer='bpe:280', heldout=0, dedup='exact', bos=True, length=512, shard_rows=999
  )
  whole = prepare.run(str(tmp_path / 'whole'), domains, settings, processes=1)
  monkeypatch.setattr(pieces, 'BLOCK', 1001)  # Cuts characters.
  monkeypatch.setattr(cuts, 'WINDOW', 5000)
  parts = prepare.run(str(tmp_path / 'parts'), domains, settings, processes=1)
  assert whole == parts and whole.splits['train']['d'].documents == 2


def test_a_document_that_takes_long_shows_its_progress(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(progress, 'EVERY', 0)
  monkeypatch.setattr(pieces, 'BLOCK', 1000)
  (tmp_path / 'a.txt').write_text('x' * 2500)
  domains = {'d': [str(tmp_path / 'a.txt')]}
  prepare.run(str(tmp_path / 'out'), domains, options(heldout=0), processes=1)
  assert 'a.txt: 2,000 characters\n' in capsys.readouterr().err


def test_a_fault_inside_a_large_document_leaves_nothing_of_it(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, 'BLOCK', 1000)
  monkeypatch.setattr(cuts, 'WINDOW', 500)
  text = ('é' * 2600).encode()
  (tmp_path / 'a.txt').write_bytes(text[:5001])
  (tmp_path / 'b.txt').write_bytes(b'kept')
  settings = options(heldout=0, on_error='skip', length=2)
  domains = {'d': [str(tmp_path)]}
  prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)
  assert decoded(rows(tmp_path / 'out', 'train', 'd')) == [b'kept']
  with pytest.raises(ValueError, match=r'a.txt is not UTF-8.*behind 5,000 bytes'):
    prepare.run(str(tmp_path / 'o'), domains, options(heldout=0), processes=1)


@pytest.mark.full
def test_the_memory_of_a_document_does_not_grow_with_it(tmp_path, run_python):
  """A document of 6 MB, which took 1 GiB in one piece."""
  line = 'The quick brown fox, number 12345, jumps over lazy dogs.\n'
  tokenizer.train_bpe([line * 3], 280, str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'a.txt').write_text(line * (6_000_000 // len(line)))
  code = (
    'import sys; sys.path.insert(0, "."); import scripts.prepare_data as p; '
    'p.main(sys.argv[1:]); status = open("/proc/self/status").read(); '
    'print(status.partition("VmHWM:")[2].split()[0])'
  )
  done = run_python(
    ['-c', code, f'--out={tmp_path}/out', f'--tokenizer={tmp_path}/tokenizer.json',
     '--length=4096', '--heldout=0', '--processes=1', f'--domain=d={tmp_path}/a.txt']
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert int(done.stdout.split()[-1]) < 400_000  # KiB, of which 130,000 are imports.


def die(job):
  if job == 'large.txt':
    os.kill(os.getpid(), signal.SIGKILL)
  return job


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_with_its_file():
  message = r'tokenizing d: a process was killed, most likely for memory, at large.txt\.'
  with pool.start(2, lambda job: job) as run:
    assert run(die, ['a.txt', 'b.txt', 'c.txt'], 'reading') == ['a.txt', 'b.txt', 'c.txt']
    with pytest.raises(ValueError, match=message):
      run(die, ['a.txt', 'large.txt', *'bcdefgh'], 'tokenizing d')


def test_words_and_sketches_do_not_depend_on_the_blocks():
  dice = random.Random(0)
  for text in (mess(200), '', ' \n', 'one', 'a b c d e f ' * 30):
    results = set()
    for size in (1, 3, dice.randrange(4, 50), 10_000):
      words, sketch = content.Words(), content.Sketch()
      for block in blocks(text, size):
        words.add(block)
        sketch.add(block)
      results.add((words.number(), sketch.values().tobytes()))
    assert len(results) == 1
  number = units.split_number('', ['a  b\n', ' c', 'd '], 'exact')
  assert number == units.split_number('', ['a b cd'], 'exact')


def near_texts():
  """60 texts of 200 words, a copy of each with two words changed, and an exact copy."""
  dice = random.Random(0)
  for i in range(60):
    words = [f'w{dice.randrange(999)}' for _ in range(200)]
    yield i, ' '.join(words)
    yield i, '  '.join(words)
    words[60] = words[160] = 'changed'
    yield i, ' '.join(words)


def test_near_duplicates_are_left_out_and_counted(tmp_path, monkeypatch):
  for name, domain in (('a', near_texts()), ('b', list(near_texts())[:9])):
    lines = (json.dumps({'text': f'doc{i} {text}'}) + '\n' for i, text in domain)
    (tmp_path / f'{name}.jsonl').write_text(''.join(lines))
  domains = {name: [str(tmp_path / f'{name}.jsonl')] for name in 'ab'}
  settings = options(dedup='near', heldout=0.3)
  manifest = prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)
  assert manifest.made['counts'] == {
    'duplicates': {'a': 60, 'b': 9}, 'near-duplicates': {'a': 60, 'b': 0}
  }  # fmt: skip
  parts = [
    [text.split()[0] for text in decoded(rows(tmp_path / 'out', split, 'a'))]
    for split in shards.SPLITS
  ]
  assert len(parts[1]) > 5 and not {*parts[0]} & {*parts[1]}
  assert sorted([*parts[0], *parts[1]]) == sorted(f'doc{i}'.encode() for i in range(60))
  monkeypatch.setitem(sys.modules, 'datasketch', None)
  with pytest.raises(
    ValueError, match=r"--dedup=near needs: pip install 'datasketch>=2'"
  ):
    options(dedup='near')


def test_text_in_both_halves_is_reported(tmp_path, caplog):
  for i in range(90):
    (tmp_path / f'{i}.txt').write_text(f'text {i % 30}' + ' ' * (i // 30))
  domains = {'a': [str(tmp_path)]}
  prepare.run(str(tmp_path / 'out'), domains, options(), processes=1)
  heldout = decoded(rows(tmp_path / 'out', 'heldout', 'a'))
  train = {text.strip() for text in decoded(rows(tmp_path / 'out', 'train', 'a'))}
  seen = sum(text.strip() in train for text in heldout)
  assert seen
  told = f'{seen} of {len(heldout)} held-out documents are also training text'
  assert told in caplog.text


def test_the_command_leaves_out_copies_by_default(tmp_path):
  folder = tmp_path / 'D'
  (folder / 'sub').mkdir(parents=True)
  for i in range(40):
    (folder / f'{i}.txt').write_text(f'text {i}')
    (folder / 'sub' / f'{i}.txt').write_text(f'text {i + 20}')
  domains = {'a': [str(folder)], 'b': [str(folder / 'sub')]}
  flags = [f'--domain={name}={path}' for name, (path,) in domains.items()]
  flags += ['--length=16', '--tokenizer=bytes', '--heldout=0.3', '--processes=1']
  prepare_data.main([*flags, f'--out={tmp_path}/out'])
  halves = [
    {text for name in domains for text in decoded(rows(tmp_path / 'out', split, name))}
    for split in shards.SPLITS
  ]
  assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 60
  # A dataset of before keeps its split.
  settings = options(heldout=0.3, shard_rows=1 << 16)
  before = prepare.run(str(tmp_path / 'old'), domains, settings, processes=1)
  prepare_data.main([*flags, f'--out={tmp_path}/old'])
  assert shards.read_manifest(str(tmp_path / 'old')) == before
  with pytest.raises(ValueError, match=r"--dedup was .*, is 'exact'"):
    prepare_data.main([*flags, f'--out={tmp_path}/old', '--dedup=exact'])


def test_a_mixture_of_datasets_with_text_in_both_halves_is_reported(tmp_path, caplog):
  for i in range(60):
    (tmp_path / f'{i}.txt').write_text(f'some text {i}')
  made = {'A': {}, 'B': {'heldout': 0.3}, 'C': {'seed': 1}, 'D': {'dedup': 'none'}}
  for name, changes in made.items():
    settings = options(**{'dedup': 'exact'} | changes)
    prepare.run(str(tmp_path / name), {'d': [str(tmp_path)]}, settings, processes=1)

  def doubt(*names):
    directories = [str(tmp_path / name) for name in names]
    terms = mixture.terms(','.join(directories))
    parts = [
      mixture.Part(term, term.directory, shards.read_manifest(term.directory))
      for term in terms
    ]
    return mixture.unseen_doubt(parts)

  assert doubt('A', 'C') == doubt('A') == doubt('D') == ''
  assert "made with --heldout=['0.2', '0.3']" in doubt('A', 'B')
  assert f'{tmp_path}/D: made with --dedup=none' in doubt('A', 'D')
  with caplog.at_level(logging.WARNING):
    cfg = config(tmp_path / 'A', tmp_path / 'D')
    data.open(cfg, vocab=257, batch=2, seed=0, max_segments=0)
  assert 'D: made with --dedup=none' in caplog.text


def config(*places, length=16):
  return data.Config(
    mixture=','.join(map(str, places)),
    length=length,
    tokenizer='bytes',
    cache='',
    verify='size',
    workers=0,
    prefetch=2,
  )


def test_xz_and_bits_per_byte_count_the_same_bytes(tmp_path):
  """An unknown token hides text; the bytes of the original are counted."""
  vocab = {'the': 0, '</s>': 1, '[UNK]': 2, 'cat': 3}
  model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '[UNK]'}
  settings = {'version': '1.0', 'added_tokens': [], 'model': model}
  settings |= {'pre_tokenizer': {'type': 'WhitespaceSplit'}}
  (tmp_path / 'a.json').write_text(json.dumps(settings))
  for i in range(40):
    (tmp_path / f'{i}.txt').write_text('the cat the extraordinarily-long-word cat')
  settings = options(tokenizer=str(tmp_path / 'a.json'), length=8)
  manifest = prepare.run(
    str(tmp_path / 'out'), {'d': [str(tmp_path)]}, settings, processes=1
  )
  assert manifest.made['counts'] == {'unknown_tokens': {'d': 40}}
  corpus = data.open(
    config(tmp_path / 'out', length=8), vocab=4, batch=1, seed=0, max_segments=0
  )
  flags = dict(chosen=['xz'], rows=0, limit=0, xz_bytes=0)
  measured = evals.measure_yardsticks(corpus, corpus, **flags)['d']
  text, size = corpus.heldout_text('d', 0), manifest.splits['heldout']['d'].bytes
  # The first word of a document is no target.
  documents = manifest.splits['heldout']['d'].documents
  assert size == documents * len(' cat the extraordinarily-long-word cat') > len(text)
  assert measured['xz_bytes'] == len(text)
  packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  assert measured['xz_bits_per_byte'] == pytest.approx(8 * len(packed) / size)


@pytest.mark.parametrize('size', [300, 1 << 20])
def test_a_stream_of_ids_is_divided_without_losing_one(size, tmp_path, monkeypatch):
  dice = np.random.default_rng(0)
  lists = [dice.integers(32, 127, dice.integers(0, 40)).tolist() for _ in range(200)]
  stream = [token for ids in lists for token in (*ids, 256)]
  (tmp_path / 'a.bin').write_bytes(np.array(stream[:-1], '<u4').tobytes())
  monkeypatch.setattr(pieces, 'UNIT', 4 * size)
  monkeypatch.setattr(pieces, 'BLOCK', 11)
  settings = options(ids='uint32', heldout=0)
  domains = {'d': [str(tmp_path / 'a.bin')]}
  prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)
  right = sorted(bytes(ids) for ids in lists if ids)
  assert decoded(rows(tmp_path / 'out', 'train', 'd')) == right


def bpe(tmp_path, name='tokenizer.json', text='the cat sat on the mat, and so on; 1 2 3'):
  return tokenizer.train_bpe([text] * 3, 270, str(tmp_path / name))


def test_ids_give_the_dataset_of_their_text(tmp_path):
  token = bpe(tmp_path)
  texts = [f'the {i} cats sat on {i * 7} mats, é' for i in range(80)]
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  (tmp_path / 'text.jsonl').write_text(lines)
  stream = [i for text in texts for i in (*token.encode(text)[0].tolist(), token.eos)]
  (tmp_path / 'ids.bin').write_bytes(np.array(stream, '<u2').tobytes())
  parts = []
  for name, changes in (('text.jsonl', {}), ('ids.bin', {'ids': 'auto'})):
    settings = options(tokenizer=token.path, dedup='exact', **changes)
    manifest = prepare.run(
      str(tmp_path / f'out {name}'), {'d': [str(tmp_path / name)]}, settings, processes=1
    )
    portions = [manifest.splits[split]['d'] for split in shards.SPLITS]
    parts.append([(p.documents, p.tokens, p.bytes) for p in portions])
  # Also the same documents are held out.
  assert parts[0] == parts[1] and parts[0][1][0] > 5
  assert manifest.made['ids'] == 'auto'


@pytest.mark.parametrize(
  ('name', 'content', 'changes', 'message'),
  [
    ('a.bin', b'abc', {}, 'a.bin has 3 bytes of ids of 2 bytes each'),
    (
      'a.bin',
      np.arange(100, dtype='<u4').tobytes(),
      {},
      'a.bin: every second uint16 is 0: use --ids=uint32',
    ),
    (
      'a.bin',
      np.array([20240520, 1, 9] + [0] * 253, '<i4').tobytes() + b'abcd',
      {},
      'a.bin has 4 bytes of ids of 2 bytes each, and its header says 9 ids',
    ),
    ('a.bin', np.array([1, -5], '<i4').tobytes(), {'ids': 'uint32'}, 'the id 4294967291'),
    ('a.jsonl', b'{"text": [1, 2.5]}', {}, "--field='text' is no list of ids there"),
    ('a.jsonl', b'{"text": [1, -2]}', {}, 'the id -2, but --tokenizer has 257 tokens'),
    ('a.jsonl', b'{"text": [1, 99999999999999999999]}', {}, 'a.jsonl.*too large'),
    ('a.jsonl', b'{"text": "a"}', {}, "--field='text' is no list of ids there"),
    ('a.bin', b'ab', {'tokenizer': 'bpe:300'}, '--ids=auto, but --tokenizer=bpe:300 is'),
    ('a.bin', b'ab', {'ids': 'int8'}, "--ids='int8'"),
    ('a.txt', b'ab', {}, 'a.txt.*unknown suffix.*.bin'),
  ],
)
def test_bad_ids_are_refused(name, content, changes, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    prepare.run(
      str(tmp_path / 'out'),
      {'d': [str(tmp_path / name)]},
      options(**{'ids': 'auto', 'heldout': 0} | changes),
      processes=1,
    )


def test_ids_of_another_tokenizer_are_refused(tmp_path):
  token, other = (
    tokenizer.train_bpe([inspect.getsource(module)], 900, str(tmp_path / name))
    for name, module in (('mine.json', random), ('other.json', logging))
  )
  ids_N, _ = token.encode(inspect.getsource(contextlib))
  (tmp_path / 'a.bin').write_bytes(ids_N.astype('<u2').tobytes())
  settings = dict(ids='auto', heldout=0, on_error='skip')
  domains = {'d': [str(tmp_path / 'a.bin')]}
  with pytest.raises(ValueError, match=r'come from another tokenizer'):
    prepare.run(
      str(tmp_path / 'o'), domains, options(tokenizer=other.path, **settings), processes=1
    )
  settings = options(tokenizer=token.path, **settings)
  assert prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)


def test_the_sizes_of_ids_are_those_of_their_text(tmp_path):
  import sentencepiece

  path = tmp_path / 'words.model'
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
  for token in (tokenizer.load(str(path)), bpe(tmp_path), tokenizer.load('bytes')):
    ids_N, bytes_N = token.encode('the ☃')
    assert token.sizes(ids_N).sum() - bytes_N.sum() == (token.path == str(path))
    ids_N, bytes_N = token.encode('the cat, wörter the mat')
    sizes_N = token.sizes(ids_N)
    # SentencePiece marks the first word with a space that is not in the text.
    assert sizes_N[1:].tolist() == bytes_N[1:].tolist()
    assert sizes_N[0] - bytes_N[0] == (token.path == str(path))


def test_a_beginning_of_text_in_ids_is_replaced(tmp_path):
  vocab = {'<s>': 0, '</s>': 1, 'a': 2, '[UNK]': 3}
  model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '[UNK]'}
  settings = {'version': '1.0', 'added_tokens': [], 'model': model}
  (tmp_path / 'a.json').write_text(json.dumps(settings))
  (tmp_path / 'a.bin').write_bytes(np.array([0, 2, 2, 1, 0, 2, 2], '<u2').tobytes())
  for bos, right in ((True, [0, 2, 2, 1] * 2), (False, [2, 2, 1] * 2)):
    changes = dict(tokenizer=str(tmp_path / 'a.json'), ids='auto', bos=bos, length=1)
    out = tmp_path / f'out{bos}'
    domains = {'d': [str(tmp_path / 'a.bin')]}
    prepare.run(str(out), domains, options(heldout=0, **changes), processes=1)
    tokens_R = rows(out, 'train', 'd')['tokens']
    assert [*tokens_R[:, 0], tokens_R[-1, 1]] == right


@pytest.fixture
def hub(tmp_path, monkeypatch):
  pytest.importorskip('datasets')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  folder = tmp_path / 'corpus'
  (folder / 'data').mkdir(parents=True)
  for split, count in (('train', 3), ('test', 1)):
    for shard in range(count):
      lines = (json.dumps({'body': f'{split} {shard} {i}'}) + '\n' for i in range(20))
      (folder / f'data/{split}-{shard:05}.jsonl').write_text(''.join(lines))
  return folder


@pytest.mark.full
def test_a_dataset_of_the_hub_is_streamed_by_shards_and_resumed(
  hub, tmp_path, monkeypatch
):
  out, domains = tmp_path / 'out', {'d': [f'hf:{hub}'], 't': [f'hf:{hub}:default:test']}
  settings = options(field='body', heldout=0)
  written = []
  write = units.write_unit

  def dying(path, *args, **kwargs):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(path)
    return write(path, *args, **kwargs)

  with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
    patch.setattr(units, 'write_unit', dying)
    prepare.run(str(out), domains, settings, processes=1)
  assert not (out / 'manifest.json').exists()
  with monkeypatch.context() as patch:
    patch.setattr(
      units,
      'write_unit',
      lambda path, *a, **k: written.append(path) or write(path, *a, **k),
    )
    manifest = prepare.run(str(out), domains, settings, processes=1)
  assert len(written) == len({*written}) == 4  # Three shards, and one.
  train = [f'train {shard} {i}'.encode() for shard in range(3) for i in range(20)]
  assert decoded(rows(out, 'train', 'd')) == sorted(train)
  assert decoded(rows(out, 'train', 't')) == sorted(
    f'test 0 {i}'.encode() for i in range(20)
  )
  hub.rename(tmp_path / 'elsewhere').joinpath('data/test-00000.jsonl').write_text(
    '{"body": "x"}'
  )
  with pytest.raises(ValueError, match=r'--domain=t was'):
    moved = str(tmp_path / 'elsewhere')
    prepare.run(
      str(out), {'d': [f'hf:{moved}'], 't': [f'hf:{moved}:test']}, settings, processes=1
    )
  assert 'hub' not in manifest.made  # A folder is known by its content.
  for spec, message in {
    f'hf:{moved}:nothing': "no split 'nothing'",
    f'hf:{moved}:nothing:train': "no config 'nothing'",
    f'hf:{moved}::': 'it must be hf:OWNER/NAME',
  }.items():
    with pytest.raises(ValueError, match=message):
      prepare.run(str(tmp_path / 'o'), {'d': [spec]}, settings, processes=1)
  with pytest.raises(ValueError, match=r"--field='text' is no column; it has \['body'\]"):
    prepare.run(str(tmp_path / 'o'), {'d': [f'hf:{moved}']}, options(), processes=1)


@pytest.mark.slow
def test_the_revision_of_the_hub_is_pinned(hub, tmp_path, monkeypatch):
  """The hub is replaced by a folder; its main branch moves between two calls."""
  import datasets
  import huggingface_hub

  class Info:
    sha = 'c0ffee'

  asked = []
  load = datasets.load_dataset

  def info(api, name, revision, timeout):
    asked.append((name, revision))
    return Info

  monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', info)
  names = lambda value: lambda *args, revision: asked.append(revision) or [value]
  monkeypatch.setattr(datasets, 'get_dataset_config_names', names('default'))
  monkeypatch.setattr(datasets, 'get_dataset_split_names', names('train'))
  monkeypatch.setattr(
    datasets,
    'load_dataset',
    lambda place, config, revision, **rest: (
      asked.append(revision) or load(str(hub), **rest)
    ),
  )
  settings, domains = options(field='body', heldout=0), {'d': ['hf:owner/name']}
  manifest = prepare.run(str(tmp_path / 'out'), domains, settings, processes=1)
  assert manifest.made['hub'] == {'hf:owner/name': 'hf:owner/name@c0ffee:default:train'}
  assert asked[0] == ('owner/name', None) and {*asked[1:]} == {'c0ffee'}
  Info.sha = 'beef'
  assert prepare.run(str(tmp_path / 'out'), domains, settings, processes=1) == manifest
  pinned = {'d': ['hf:owner/name@v1']}
  made = prepare.run(str(tmp_path / 'other'), pinned, settings, processes=1).made['hub']
  assert made == {'hf:owner/name@v1': 'hf:owner/name@beef:default:train'}
  assert ('owner/name', 'v1') in asked
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match=r"hf:owner/name needs: pip install 'datasets>=4'"):
    prepare.run(str(tmp_path / 'third'), domains, settings, processes=1)
