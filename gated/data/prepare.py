"""Files -> a dataset directory, by several processes, resumably.

Stage 1 turns each unit of input into a unit file of tokens, stage 2 packs shards from the
token streams; the manifest comes last. What an earlier, killed try has finished is used
again once its SHA-256 was seen to hold. The result is the same to the byte for any number
of processes.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import tqdm

from gated.data import packing, shards, sources, tokenizer, workers

log = logging.getLogger(__name__)

WORK = 'work'  # Where a try keeps what is not the dataset; it goes when that is complete.
SAMPLE = 1 << 26  # Bytes of text that a BPE is trained on, spread over all units.
BPE = re.compile(r'bpe:(\d+)')
DRAFT = r'\.manifest\.json\.[0-9a-f]+\.partial|tokenizer\.(json|model)\.\d+'
LEFT = re.compile(rf'{DRAFT}|.+-(train|heldout)-\d+-of-\d+\.array_record(\.\d+)?')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the rows depend on, beside the input; the flags of scripts/prepare_data.py."""

  length: int
  tokenizer: str  # 'bytes', 'bpe:SIZE', or a path.
  eos: str  # The end-of-text token of a tokenizer that has another than the usual names.
  heldout: float  # The fraction of documents that is held out.
  shard_rows: int
  seed: int  # Of the order of documents.
  bos: bool  # Whether a document begins with a token of its own.
  field: str  # Of JSON lines and Parquet.
  suffixes: tuple[str, ...]  # Of files read as text, one document each.

  def __post_init__(self):
    highs = {'length': shards.MAX_LENGTH, 'shard_rows': 1 << 31, 'seed': shards.MAX_COUNT}
    for name, high in highs.items():
      low = 0 if name == 'seed' else 1
      if not low <= getattr(self, name) <= high:
        value = getattr(self, name)
        raise ValueError(f'--{name}={value}, but {low} to {high} are allowed')
    if not 0 <= self.heldout < 1:
      raise ValueError(f'--heldout={self.heldout}, but 0 to below 1 are allowed')
    if not all(self.suffixes):
      raise ValueError(f'--suffixes={self.suffixes}, but one of them is empty')


def run(
  out: str, domains: dict[str, list[str]], options: Options, *, processes: int
) -> shards.Manifest:
  """Files and folders by domain -> the manifest of the dataset made of them in `out`.

  ValueError, naming the flag, for input that cannot be read, and for an `out` that holds
  a dataset made otherwise.
  """
  if processes < 1:
    raise ValueError(f'--processes={processes}, but 1 is the least')
  if '://' in out:
    raise ValueError(
      f'--out={out}, but it must be a local folder: copy it from there, manifest.json '
      'last, by gcloud storage cp -r or aws s3 cp --recursive'
    )
  units = _survey(domains, options)
  fixed = None if BPE.fullmatch(options.tokenizer) else _load(options)
  made = dataclasses.asdict(options) | {'suffixes': sorted(options.suffixes)}
  # Where a tokenizer lay is not what the rows depend on.
  made['tokenizer'] = fixed.fingerprint if fixed else options.tokenizer
  earlier = _earlier(out, made)
  work = os.path.join(out, WORK)
  os.makedirs(work, exist_ok=True)
  with _pool(processes) as pool:
    digests = {
      domain: pool(sources.digest, own, f'reading {domain}')
      for domain, own in units.items()
    }
    made['input'] = {
      domain: hashlib.sha256(''.join(own).encode()).hexdigest()
      for domain, own in digests.items()
    }
    if earlier:
      shutil.rmtree(work)
      return _same_input(out, earlier, made)
    token = fixed or _train_bpe(work, units, digests, options)
    jobs, paths = _stage_1(work, units, digests, token=token, options=options)
    pool(_tokenize, jobs, 'tokenizing')
    manifest = packing.pack(
      out,
      paths,
      token,
      length=options.length,
      seed=options.seed,
      shard_rows=options.shard_rows,
      made=made,
      work=work,
      run=pool,
    )
  if not sum(portion.rows for portion in manifest.splits['train'].values()):
    raise ValueError('--domain: the input has too little text for a row to train on')
  shards.write_manifest(out, manifest)
  _sweep(out, manifest)
  return manifest


def _sweep(out: str, manifest: shards.Manifest) -> None:
  """Removes what tries that were killed, or had other options, have left behind."""
  shutil.rmtree(os.path.join(out, WORK))
  kept = {shard.file for shard in manifest.shards} | {manifest.tokenizer['name']}
  for name in os.listdir(out):
    if name not in kept and LEFT.fullmatch(name):
      os.remove(os.path.join(out, name))


def _survey(domains: dict[str, list[str]], options: Options) -> dict[str, list]:
  if not domains:
    raise ValueError('--domain=NAME=PATH[,PATH]: at least one is needed')
  units = {}
  for domain, paths in domains.items():
    flag = f'--domain={domain}={",".join(paths)}'
    if not shards.NAME.fullmatch(domain):
      raise ValueError(f'{flag}: a name is made of letters, digits, ".", "_" and "-"')
    try:
      units[domain] = sources.survey(
        paths, field=options.field, suffixes=options.suffixes
      )
      # A wrong field or encoding most often shows in the first document.
      next(sources.documents(units[domain][0]), None)
    except ValueError as error:
      raise ValueError(f'{flag}: {error}') from error
  return units


def _load(options: Options) -> tokenizer.Tokenizer:
  try:
    return tokenizer.load(options.tokenizer, eos=options.eos)
  except ValueError as error:
    raise ValueError(f"--tokenizer ('bytes', 'bpe:SIZE' or a path): {error}") from error


def _earlier(out: str, made: dict[str, Any]) -> shards.Manifest | None:
  """The manifest that `out` has already, if what made it could be what is asked for."""
  try:
    manifest = shards.read_manifest(out)
  except FileNotFoundError:
    return None
  _refuse(out, {name: (manifest.made.get(name), made[name]) for name in made})
  return manifest


def _same_input(
  out: str, manifest: shards.Manifest, made: dict[str, Any]
) -> shards.Manifest:
  was = manifest.made['input']
  names = sorted(was.keys() | made['input'].keys())
  changes = {f'domain={name}': (was.get(name), made['input'].get(name)) for name in names}
  _refuse(out, changes)
  shards.verify(out, manifest.shards, 'sha256')
  log.info('%s is complete already', out)
  return manifest


def _refuse(out: str, changes: dict[str, tuple[Any, Any]]) -> None:
  """ValueError if something changed from what made the dataset to what is asked for."""
  told = [f'--{name} was {a!r}, is {b!r}' for name, (a, b) in changes.items() if a != b]
  if told:
    raise ValueError(f'--out={out} holds a dataset made otherwise: {"; ".join(told)}')


def _train_bpe(
  work: str, units: dict[str, list], digests: dict[str, list], options: Options
) -> tokenizer.Tokenizer:
  """A BPE of the training documents: the first of every unit, SAMPLE bytes in all."""
  match = BPE.fullmatch(options.tokenizer)
  assert match
  folder = os.path.join(work, f'bpe-{_key(digests, dataclasses.asdict(options))}')
  path = os.path.join(folder, 'tokenizer.json')
  if os.path.isfile(path):
    return tokenizer.load(path, eos=tokenizer.END)
  every = [unit for own in units.values() for unit in own]

  def texts() -> Iterator[str]:
    for unit in every:
      left = math.ceil(SAMPLE / len(every))
      for name, text in sources.documents(unit):
        if left <= 0:
          break
        if not packing.is_heldout(name, options.heldout):
          left -= len(text)
          yield text

  os.makedirs(folder, exist_ok=True)
  log.info('training a BPE')
  try:
    return tokenizer.train_bpe(texts(), int(match[1]), path)
  except ValueError as error:
    raise ValueError(f'--tokenizer={options.tokenizer}: {error}') from error


class _Job(NamedTuple):
  """A unit of input and the unit file to make of it."""

  unit: sources.Unit
  path: str
  spec: str
  eos: str
  options: Options


def _stage_1(
  work: str,
  units: dict[str, list],
  digests: dict[str, list],
  *,
  token: tokenizer.Tokenizer,
  options: Options,
) -> tuple[list[_Job], dict[str, list[str]]]:
  """-> a job for each unit file, and the unit files by domain."""
  jobs, paths = [], {}
  stated = [token.fingerprint, options.heldout, options.seed, options.bos]
  for domain, own in units.items():
    paths[domain] = []
    for unit, digest in zip(own, digests[domain]):
      # Equal files of two names differ in the digest, so a name stands for one content.
      path = os.path.join(work, f'{_key(digest, stated)}.unit')
      paths[domain].append(path)
      spec = token.path or token.name
      jobs.append(_Job(unit, path, spec, token.eos_token, options))
  return jobs, paths


def _tokenize(job: _Job) -> None:
  if packing.unit_is_whole(job.path):
    return
  packing.write_unit(
    job.path,
    sources.documents(job.unit),
    _loaded(job.spec, job.eos),
    seed=job.options.seed,
    heldout=job.options.heldout,
    bos=job.options.bos,
  )


@functools.cache
def _loaded(spec: str, eos: str) -> tokenizer.Tokenizer:
  return tokenizer.load(spec, eos=eos)


def _key(*content: Any) -> str:
  return hashlib.sha256(shards.canonical(content).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _pool(processes: int) -> Generator[packing.Run, None, None]:
  """-> a Run over so many processes, with a progress bar; one process is this one."""
  if processes == 1:
    yield lambda function, jobs, label: _watch(map(function, jobs), jobs, label)
    return
  # Started afresh, not forked: a fork of a process with threads can hang.
  spawn = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(
    processes, spawn, workers.die_with_parent
  )
  try:
    yield lambda function, jobs, label: _watch(executor.map(function, jobs), jobs, label)
  finally:
    executor.shutdown(cancel_futures=True)


def _watch(results: Any, jobs: Sequence[Any], label: str) -> list:
  return list(tqdm.tqdm(results, label, len(jobs), unit='unit', disable=None))
