"""Files -> a dataset directory, by several processes, resumably.

Stage 1 turns each unit of input into a unit of tokens, stage 2 packs the token streams
into shards; the manifest comes last. A restarted call reuses the finished files of an
interrupted one after a check of their SHA-256. The number of processes does not change a
byte of the result.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import math
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from gated import config, storage
from gated.data import faults, packing, shards, sources, tokenizer, workers
from gated.data.options import BPE, Options

log = logging.getLogger(__name__)

WORK = 'work'  # Folder of intermediate files; a complete dataset has none.
SAMPLE = 1 << 26  # Bytes of text to train a BPE, spread over all units.


def run(
  out: str, domains: dict[str, list[str]], options: Options, *, processes: int
) -> shards.Manifest:
  """Files and folders by domain -> a dataset in the folder `out`, and its manifest.

  ValueError, naming the flag, for unreadable input, and for an `out` that contains a
  dataset with other options or input. Logs what is left out.
  """
  config.at_least('--processes', processes, 1)
  if '://' in out:
    raise ValueError(
      f'--out={out}, but it must be a local folder; then copy it there, manifest.json '
      'last, with gcloud storage cp -r or aws s3 cp --recursive'
    )
  tallies = {domain: faults.Tally() for domain in domains}
  units = _survey(domains, options, tallies)
  token = None if BPE.fullmatch(options.tokenizer) else _load(options)
  # The rows depend on the content of a tokenizer, not on its path.
  tokens = token.fingerprint if token else options.tokenizer
  made = options.recorded | {'tokenizer': tokens}
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
      settings += [options.encoding, options.dedup]
      path = lambda digest: f'{work}/{config.digest([digest, settings])[:24]}.unit'
      paths = {
        domain: [path(digest) for digest in hashes] for domain, hashes in digests.items()
      }
      bos = options.bos if isinstance(options.bos, str) else ''
      tokenize = functools.partial(
        _tokenize,
        spec=token.path or token.name,
        ends={'eos': token.eos_token, 'bos': bos},
        options=options,
      )
      counts = {}
      for domain, group in units.items():
        jobs = list(zip(group, paths[domain]))
        notes = pool(tokenize, jobs, f'tokenizing {domain}')
        counts[domain] = _note(domain, notes, tallies[domain], token)
        _check(tallies, options, enough=faults.NAMED)
      _check(tallies, options)
      _check_split(counts, options)
      if left_out := {name: tally.counts for name, tally in tallies.items() if tally}:
        made['counts'] = {'left_out': left_out}
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
        dedup=options.dedup == 'exact',
      )
  _clean(out, manifest)
  return manifest


def _note(
  domain: str, notes: list[dict], tally: faults.Tally, token: tokenizer.Tokenizer
) -> Counter[str]:
  """Adds the faults of a domain's units to its tally -> the sums of their counts."""
  counts: Counter[str] = Counter()
  for note in notes:
    tally.merge(note['faults'])
    counts.update(note['counts'])
  if empty := counts['empty']:
    log.info('%s: %s documents are empty', domain, f'{empty:,}')
  if token.unk >= 0:
    share = counts['unknown'] / max(1, counts['tokens'])
    log.info('%s: %.3g%% of the tokens are unknown', domain, 100 * share)
  if tally:
    log.warning('%s: left out: %s', domain, tally)
  return counts


def _check_split(counts: dict[str, Counter[str]], options: Options) -> None:
  """ValueError if all documents, or none, are held out although both parts are wanted."""
  for domain, count in counts.items():
    if count['heldout'] and count['heldout'] == count['documents']:
      log.warning('%s: all its documents are held out (%s)', domain, count['heldout'])
  total = sum(counts.values(), Counter())
  documents, flag = total['documents'], f'--heldout={options.heldout}'
  if documents and total['heldout'] == documents:
    which = 'the only document is' if documents == 1 else f'all {documents} documents are'
    raise ValueError(f'{flag}: {which} held out; --heldout=0 trains on everything')
  if documents and options.heldout and not total['heldout']:
    raise ValueError(
      f'{flag} holds out none of {documents:,} documents: raise it, or hold out nothing '
      'with --heldout=0'
    )


def _check(
  tallies: dict[str, faults.Tally], options: Options, *, enough: int = 1
) -> None:
  """ValueError for faults, all together, unless they are skipped."""
  total = faults.Tally()
  for tally in tallies.values():
    total.merge(tally.plain())
  if options.on_error == 'stop' and total.total() >= enough:
    raise ValueError(f'{total}\n--on_error=skip leaves out what cannot be read')


def _existing(out: str, made: dict[str, Any]) -> shards.Manifest | None:
  """The manifest of a complete dataset in `out`; ValueError if `made` differs."""
  try:
    manifest = shards.read_manifest(out)
  except FileNotFoundError:
    return None
  before = {name: value for name, value in manifest.made.items() if name != 'counts'}
  changes = [
    f'{name.replace("config.input.", "--domain=").replace("config.", "--")} was {old!r}, '
    f'is {new!r}'
    for name, (old, new) in config.differences(before, made).items()
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


def _survey(
  domains: dict[str, list[str]], options: Options, tallies: dict[str, faults.Tally]
) -> dict[str, list]:
  if not domains:
    raise ValueError('--domain=NAME=PATH[,PATH]: at least one is needed')
  units = {}
  for domain, paths in domains.items():
    flag = f'--domain={domain}={",".join(paths)}'
    if not shards.NAME.fullmatch(domain):
      raise ValueError(f'{flag}: a name consists of letters, digits, ".", "_" and "-"')
    try:
      units[domain] = sources.survey(
        paths,
        field=options.field,
        suffixes=options.suffixes,
        encoding=options.encoding,
        report=tallies[domain].add,
      )
    except ValueError as error:
      faulty = f': {tallies[domain]}' if tallies[domain] else ''
      raise ValueError(f'{flag}: {error}{faulty}') from error
  _check(tallies, options)
  # The first document usually shows a wrong field or encoding.
  if options.on_error == 'stop':
    first = {domain: faults.Tally() for domain in domains}
    for domain, group in units.items():
      found = next(sources.documents(group[0], first[domain].add), None)
      if found:
        first[domain] = faults.Tally()  # The later pass names all.
    _check(first, options)
  return units


def _load(options: Options) -> tokenizer.Tokenizer:
  bos = options.bos if isinstance(options.bos, str) else ''
  try:
    token = tokenizer.load(options.tokenizer, eos=options.eos, bos=bos)
  except ValueError as error:
    raise ValueError(f"--tokenizer ('bytes', 'bpe:SIZE' or a path): {error}") from error
  # In the vocabularies of GPT-2, one token ends a document and begins the next.
  if options.bos and not token.bos_token and token.eos_token not in ('', tokenizer.END):
    raise ValueError(
      f'--bos: {token.path!r} has none of {", ".join(tokenizer.BEGINNINGS)}; name the '
      'token with --bos=TOKEN'
    )
  return token


def _train_bpe(
  work: str, units: dict[str, list], options: Options
) -> tokenizer.Tokenizer:
  """A BPE of the first training documents of every unit, SAMPLE bytes in total."""
  pooled = [unit for group in units.values() for unit in group]

  def texts() -> Iterator[str]:
    for unit in pooled:
      remaining = math.ceil(SAMPLE / len(pooled))
      # The later pass reports what cannot be read.
      for name, text in sources.documents(unit, lambda fault: None):
        if remaining <= 0:
          break
        key = packing.split_key(name, text, options.dedup == 'exact')
        if not packing.is_heldout(key, options.heldout):
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
  job: tuple[sources.Unit, str], *, spec: str, ends: dict[str, str], options: Options
) -> dict[str, Any]:
  """Writes a unit of tokens, unless an interrupted call has finished it -> its notes."""
  unit, path = job
  notes_path = f'{path}.notes'
  notes = packing.read_json(notes_path)
  if notes and packing.unit_is_complete(path):
    return notes
  tally = faults.Tally()
  counts = packing.write_unit(
    path,
    sources.documents(unit, tally.add),
    _cached(spec, **ends),
    seed=options.seed,
    heldout=options.heldout,
    bos=bool(options.bos),
    dedup=options.dedup == 'exact',
    report=tally.add,
  )
  notes = {'counts': counts, 'faults': tally.plain()}
  storage.write_json(notes_path, notes)
  return notes


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
  try:
    return list(tqdm.tqdm(results, label, len(jobs), unit='unit', disable=None))
  except concurrent.futures.process.BrokenProcessPool as error:
    raise ValueError(
      f'{label}: a process was killed, most likely for memory; fewer --processes and '
      'smaller documents need less'
    ) from error
