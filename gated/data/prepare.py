"""Files -> a dataset directory, by several processes, resumably.

Stage 1 turns each unit of input into a unit of tokens, stage 2 packs the token streams
into shards; the manifest comes last. A restarted call reuses the finished files of an
interrupted one after a check of their SHA-256. The number of processes does not change a
byte of the result.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gated import config, storage
from gated.data import (
  cuts,
  faults,
  inputs,
  packing,
  pieces,
  pool,
  shards,
  sources,
  tokenizer,
  units,
)
from gated.data.documents import Text
from gated.data.options import BPE, Options

log = logging.getLogger(__name__)

PINS = 'hub.json'  # In WORK: sources of the hub, and what they were resolved to.
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
  token = None if BPE.fullmatch(options.tokenizer) else _load(options)
  # The rows depend on the content of a tokenizer, not on its path.
  tokens = token.fingerprint if token else options.tokenizer
  made = options.recorded | {'tokenizer': tokens}
  work = os.path.join(out, WORK)
  pins = _pins(out)
  groups = inputs.survey(domains, options, tallies, token, pins)
  if pins:
    made['hub'] = pins
    storage.write_json(os.path.join(work, PINS), pins)
  with pool.start(processes, _place) as run:
    digests = {
      domain: run(sources.digest, group, f'reading {domain}')
      for domain, group in groups.items()
    }
    made['input'] = {
      domain: hashlib.sha256(''.join(hashes).encode()).hexdigest()
      for domain, hashes in digests.items()
    }
    manifest = _existing(out, made)
    if not manifest:
      token = token or _train_bpe(work, groups, options)
      # A digest covers the names of the files, so equal paths mean equal units.
      settings = [token.fingerprint, options.heldout, options.seed, options.bos]
      settings += [options.encoding, options.dedup, options.ids, options.field]
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
      for domain, group in groups.items():
        jobs = list(map(_Job, group, paths[domain]))
        notes = run(tokenize, jobs, f'tokenizing {domain}')
        counts[domain] = _note(domain, notes, tallies[domain], token)
        inputs.check(tallies, options, enough=faults.NAMED)
      inputs.check(tallies, options)
      _check_split(counts, options)
      if options.dedup == 'none':
        _warn(*units.seen(paths))
      if noted := _noted(counts, tallies):
        made['counts'] = noted
      manifest = packing.pack(
        out,
        paths,
        token,
        length=options.length,
        seed=options.seed,
        shard_rows=options.shard_rows,
        made=made,
        work=work,
        run=run,
        dedup=options.dedup,
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
  log.info(
    '%s: %s documents with text, %s without, %s left out',
    domain,
    f'{counts["documents"]:,}',
    f'{counts["empty"]:,}',
    f'{tally.total():,}',
  )
  if token.unk >= 0:
    share = counts['unknown'] / max(1, counts['tokens'])
    log.info('%s: %.3g%% of the tokens are unknown', domain, 100 * share)
  if tally:
    log.warning('%s: left out: %s', domain, tally)
  return counts


def _noted(
  counts: dict[str, Counter[str]], tallies: dict[str, faults.Tally]
) -> dict[str, Any]:
  """-> the counts of a manifest: what is left out, and unknown tokens; often none."""
  left_out = {name: tally.counts for name, tally in tallies.items() if tally}
  unknown = {name: count['unknown'] for name, count in counts.items() if count['unknown']}
  noted = {'left_out': left_out, 'unknown_tokens': unknown}
  return {name: values for name, values in noted.items() if values}


def _warn(heldout: int, seen: int) -> None:
  if seen:
    log.warning(
      '%s of %s held-out documents are also training text; --dedup=exact leaves out '
      'copies and splits by content',
      f'{seen:,}',
      f'{heldout:,}',
    )


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


def _pins(out: str) -> dict[str, str]:
  """-> the sources of the hub that an earlier call for `out` has resolved."""
  try:
    return dict(shards.read_manifest(out).made.get('hub', {}))
  except FileNotFoundError:
    return units.read_json(os.path.join(out, WORK, PINS)) or {}


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
  work: str, groups: dict[str, list[pieces.Unit]], options: Options
) -> tokenizer.Tokenizer:
  """A BPE of the first training documents of every unit, SAMPLE bytes in total."""
  pooled = [unit for group in groups.values() for unit in group]

  def texts() -> Iterator[str]:
    for unit in pooled:
      remaining = math.ceil(SAMPLE / len(pooled))
      # The later pass reports what cannot be read.
      for name, document in sources.documents(unit, lambda fault: None):
        if remaining <= 0:
          break
        size = 0
        assert isinstance(document, Text)
        with contextlib.suppress(faults.Fault):
          number = units.split_number(name, document.blocks, options.dedup)
          if number < options.heldout * 2.0**64:
            continue
          for text in cuts.words(document.blocks):
            yield text
            size += len(text)
            if size >= SAMPLE:  # A document of any size is not read to its end.
              break
        remaining -= size

  log.info('training a BPE')
  size, path = int(options.tokenizer.removeprefix('bpe:')), f'{work}/tokenizer.json'
  try:
    return tokenizer.train_bpe(texts(), size, path)
  except ValueError as error:
    raise ValueError(f'--tokenizer={options.tokenizer}: {error}') from error


_cached = functools.cache(tokenizer.load)


class _Job(NamedTuple):
  """A unit of input, and the path of its tokens."""

  unit: pieces.Unit
  path: str


def _place(job: Any) -> str:
  """A job of any stage -> its files, for messages."""
  if isinstance(job, packing.Job):
    return job.path
  return sources.describe_unit(job.unit if isinstance(job, _Job) else job)


def _tokenize(
  job: _Job, *, spec: str, ends: dict[str, str], options: Options
) -> dict[str, Any]:
  """Writes a unit of tokens, unless an interrupted call has finished it -> its notes."""
  unit, path = job
  notes_path = f'{path}.notes'
  notes = units.read_json(notes_path)
  if notes and units.unit_is_complete(path):
    return notes
  tally = faults.Tally()
  counts = units.write_unit(
    path,
    sources.documents(unit, tally.add),
    _cached(spec, **ends),
    seed=options.seed,
    heldout=options.heldout,
    bos=bool(options.bos),
    dedup=options.dedup,
    report=tally.add,
  )
  notes = {'counts': counts, 'faults': tally.plain()}
  storage.write_json(notes_path, notes)
  return notes
