"""Files -> a dataset directory, by several processes, resumably.

Stage 1 turns each unit of input into a unit of tokens, stage 2 packs the token streams
into shards; the manifest comes last. A restarted call reuses the finished files of an
interrupted one after a check of their SHA-256. The number of processes does not change a
byte of the result.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from gated import config
from gated.data import packing, shards, sources, tokenizer, workers

log = logging.getLogger(__name__)

WORK = 'work'  # Folder of intermediate files; a complete dataset has none.
SAMPLE = 1 << 26  # Bytes of text to train a BPE, spread over all units.
BPE = re.compile(r'bpe:\d+')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The flags of scripts/prepare_data.py that determine the rows, besides the input."""

  length: int
  tokenizer: str  # 'bytes', 'bpe:SIZE', or a path.
  eos: str  # The end-of-text token, if it has an unusual name.
  heldout: float  # The held-out fraction of documents.
  shard_rows: int
  seed: int  # Sets the order of documents.
  bos: bool  # Whether each document starts with the beginning-of-text token.
  field: str  # The field with the text, in JSON lines and Parquet.
  suffixes: tuple[str, ...]  # Files with these suffixes are one document of text each.

  def __post_init__(self):
    config.within('--length', self.length, 1, shards.MAX_LENGTH)
    config.within('--shard_rows', self.shard_rows, 1, 1 << 31)
    config.within('--seed', self.seed, 0, shards.MAX_COUNT)
    if not 0 <= self.heldout < 1:
      raise ValueError(f'--heldout={self.heldout}, but 0 to below 1 are allowed')
    if not all(self.suffixes):
      raise ValueError(f'--suffixes={self.suffixes}, but one of them is empty')


def run(
  out: str, domains: dict[str, list[str]], options: Options, *, processes: int
) -> shards.Manifest:
  """Files and folders by domain -> a dataset in the folder `out`, and its manifest.

  ValueError, naming the flag, for unreadable input, and for an `out` that contains a
  dataset with other options or input.
  """
  config.at_least('--processes', processes, 1)
  if '://' in out:
    raise ValueError(
      f'--out={out}, but it must be a local folder; then copy it there, manifest.json '
      'last, with gcloud storage cp -r or aws s3 cp --recursive'
    )
  units = _survey(domains, options)
  token = None if BPE.fullmatch(options.tokenizer) else _load(options)
  made = dataclasses.asdict(options) | {'suffixes': sorted(options.suffixes)}
  # The rows depend on the content of a tokenizer, not on its path.
  made['tokenizer'] = token.fingerprint if token else options.tokenizer
  work = os.path.join(out, WORK)
  with _pool(processes) as pool:
    digests = {
      domain: pool(sources.digest, group, f'reading {domain}')
      for domain, group in units.items()
    }
    made['input'] = {
      domain: hashlib.sha256(''.join(hashes).encode()).hexdigest()
      for domain, hashes in digests.items()
    }
    manifest = _existing(out, made)
    if not manifest:
      token = token or _train_bpe(work, units, options)
      # A digest covers the names of the files, so equal paths mean equal units.
      settings = [token.fingerprint, options.heldout, options.seed, options.bos]
      path = lambda digest: f'{work}/{config.digest([digest, settings])[:24]}.unit'
      paths = {
        domain: [path(digest) for digest in hashes] for domain, hashes in digests.items()
      }
      spec = token.path or token.name
      tokenize = functools.partial(
        _tokenize, spec=spec, eos=token.eos_token, options=options
      )
      for domain, group in units.items():
        pool(tokenize, list(zip(group, paths[domain])), f'tokenizing {domain}')
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
  _clean(out, manifest)
  return manifest


def _existing(out: str, made: dict[str, Any]) -> shards.Manifest | None:
  """The manifest of a complete dataset in `out`; ValueError if `made` differs."""
  try:
    manifest = shards.read_manifest(out)
  except FileNotFoundError:
    return None
  changes = [
    f'{name.replace("config.input.", "--domain=").replace("config.", "--")} was {old!r}, '
    f'is {new!r}'
    for name, (old, new) in config.differences(manifest.made, made).items()
  ]
  if changes:
    raise ValueError(f'--out={out} contains another dataset: {"; ".join(changes)}')
  shards.verify(out, manifest.shards, 'sha256')
  log.info('%s is already complete', out)
  return manifest


def _clean(out: str, manifest: shards.Manifest) -> None:
  """Removes the files of interrupted calls, and of calls with other options."""
  shutil.rmtree(os.path.join(out, WORK), ignore_errors=True)
  kept = {shard.file for shard in manifest.shards}
  for pattern in ('*-of-*.array_record', '.*.partial'):
    for path in Path(out).glob(pattern):
      if path.name not in kept:
        path.unlink()


def _survey(domains: dict[str, list[str]], options: Options) -> dict[str, list]:
  if not domains:
    raise ValueError('--domain=NAME=PATH[,PATH]: at least one is needed')
  units = {}
  for domain, paths in domains.items():
    flag = f'--domain={domain}={",".join(paths)}'
    if not shards.NAME.fullmatch(domain):
      raise ValueError(f'{flag}: a name consists of letters, digits, ".", "_" and "-"')
    try:
      units[domain] = sources.survey(
        paths, field=options.field, suffixes=options.suffixes
      )
      # The first document usually shows a wrong field or encoding.
      next(sources.documents(units[domain][0]), None)
    except ValueError as error:
      raise ValueError(f'{flag}: {error}') from error
  return units


def _load(options: Options) -> tokenizer.Tokenizer:
  try:
    return tokenizer.load(options.tokenizer, eos=options.eos)
  except ValueError as error:
    raise ValueError(f"--tokenizer ('bytes', 'bpe:SIZE' or a path): {error}") from error


def _train_bpe(
  work: str, units: dict[str, list], options: Options
) -> tokenizer.Tokenizer:
  """A BPE of the first training documents of every unit, SAMPLE bytes in total."""
  pooled = [unit for group in units.values() for unit in group]

  def texts() -> Iterator[str]:
    for unit in pooled:
      remaining = math.ceil(SAMPLE / len(pooled))
      for name, text in sources.documents(unit):
        if remaining <= 0:
          break
        if not packing.is_heldout(name, options.heldout):
          remaining -= len(text)
          yield text

  log.info('training a BPE')
  size, path = int(options.tokenizer.removeprefix('bpe:')), f'{work}/tokenizer.json'
  try:
    return tokenizer.train_bpe(texts(), size, path)
  except ValueError as error:
    raise ValueError(f'--tokenizer={options.tokenizer}: {error}') from error


_cached = functools.cache(tokenizer.load)


def _tokenize(
  job: tuple[sources.Unit, str], *, spec: str, eos: str, options: Options
) -> None:
  """Writes a unit of tokens, unless an interrupted call has finished it."""
  unit, path = job
  if not packing.unit_is_complete(path):
    packing.write_unit(
      path,
      sources.documents(unit),
      _cached(spec, eos=eos),
      seed=options.seed,
      heldout=options.heldout,
      bos=options.bos,
    )


@contextlib.contextmanager
def _pool(processes: int) -> Generator[packing.Run, None, None]:
  """Yields a Run over so many processes; with 1, it runs in this process."""
  if processes == 1:
    yield functools.partial(_run, map)
    return
  # Spawn, because forking a process that has threads can hang.
  spawn = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(
    processes, spawn, workers.die_with_parent
  )
  try:
    yield functools.partial(_run, executor.map)
  finally:
    executor.shutdown(cancel_futures=True)


def _run(mapper: Callable, function: Callable, jobs: Sequence[Any], label: str) -> list:
  """A Run that shows a progress bar."""
  results = mapper(function, jobs)
  return list(tqdm.tqdm(results, label, len(jobs), unit='unit', disable=None))
