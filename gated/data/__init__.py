"""Packed rows -> batches, by arithmetic on (seed, data_step).

A dataset is a directory made by scripts/prepare_data.py, local or on gs:// or s3://, or
'stdlib', the embedded corpus. A run reads a mixture of datasets. The row with global
index

  g = data_step * batch + index in the batch

is the same for any number of hosts, threads and worker processes, and needs no earlier
rows, so the position in the data is one integer.

B batch  T tokens.
"""

import dataclasses
import logging
import re

from gated import config, storage
from gated.data import cache, embedded, mixture, remote, shards, tokenizer
from gated.data.corpus import Corpus, Damaged, Unreadable
from gated.data.shards import Batch

__all__ = ['Batch', 'Config', 'Corpus', 'Damaged', 'Unreadable', 'open', 'open_tokenizer']

log = logging.getLogger(__name__)

TOKENIZER = re.compile(r'bytes|bpe:\d+')
STDLIB = 'stdlib'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Which datasets to read, and how."""

  # 'stdlib' or 'DIR[@DOMAIN][=WEIGHT],...'; a DIR may be gs://... or s3://... A part
  # without a weight has weight 1; a part without a domain pools all its domains.
  mixture: str
  length: int  # T; must equal the datasets' --length.
  tokenizer: str  # For 'stdlib': 'bytes' or 'bpe:SIZE'. Other datasets contain one.
  # Folder for 'stdlib' and copies from gs:// and s3://; '' is the platform's cache.
  cache: str
  verify: str  # Check of each shard against the manifest: 'sha256' or 'size'.
  # Processes that read ahead; 0 reads in threads. More than 0 needs parsed absl flags
  # and an importable main module, such as train.py.
  workers: int
  prefetch: int  # Batches read ahead, per worker.

  def __post_init__(self):
    config.one_of('config.data.verify', self.verify, shards.CHECKS)
    if not TOKENIZER.fullmatch(self.tokenizer):
      raise ValueError(
        f'config.data.tokenizer={self.tokenizer!r}, but allowed are '
        "'bytes' and 'bpe:SIZE'"
      )
    config.within('config.data.length', self.length, 1, shards.MAX_LENGTH)
    config.within('config.data.workers', self.workers, 0, 1 << 10)
    config.within('config.data.prefetch', self.prefetch, 1, 1 << 16)
    mixture.terms(self.mixture)


def open(cfg: Config, *, vocab: int, batch: int, seed: int, max_segments: int) -> Corpus:
  """The config's mixture, checked against its manifests -> Corpus.

  `vocab` is the model's; `batch` counts rows per step over all hosts; `max_segments`
  limits the documents per row (0 for no limit). ValueError names the knob of a dataset
  that is missing, damaged, smaller than a batch, or that differs in tokenizer or length.
  """
  knob = f'config.data.mixture={cfg.mixture!r}'
  parts = [_part(term, cfg, knob) for term in mixture.terms(cfg.mixture)]
  for part in parts:
    _check(part, parts[0], cfg, knob)
  try:
    mixture.check_distinct(parts)
  except ValueError as error:
    raise ValueError(f'{knob}: {error}') from error
  if doubt := mixture.unseen_doubt(parts):
    log.warning('%s: %s', knob, doubt)
  size = parts[0].manifest.tokenizer.vocab
  if size > vocab:
    raise ValueError(
      f'config.model.vocab={vocab}, but the data has {size} tokens ({knob})'
    )
  if size < vocab:
    log.info('the data has a vocabulary of %d, the model of %d', size, vocab)
  segments = max(part.segments() for part in parts)
  if 0 < max_segments < segments:
    raise ValueError(
      f'config.model.attn.max_segments={max_segments}, but a row of the data has '
      f'{segments} documents ({knob}): raise the knob'
    )
  rows = sum(part.rows('train') for part in parts)
  if rows < batch:
    raise ValueError(f'{knob}: {rows} rows to train on, but a batch has {batch}')
  try:
    for part in parts:
      files = part.files('train') + part.files('heldout')
      shards.verify(part.directory, files, cfg.verify)
    return Corpus(
      parts, batch=batch, seed=seed, workers=cfg.workers, prefetch=cfg.prefetch
    )
  except ValueError as error:
    is_cached = any(part.directory != part.term.directory for part in parts)
    hint = '; delete that folder, and the next run makes it again' if is_cached else ''
    raise ValueError(f'{knob}: {error}{hint}') from error


def open_tokenizer(cfg: Config) -> tokenizer.Tokenizer:
  """The tokenizer of a mixture; ValueError, naming the knob, if it cannot be opened."""
  if (cfg.mixture, cfg.tokenizer) == (STDLIB, 'bytes'):
    return tokenizer.load('bytes')
  knob = f'config.data.mixture={cfg.mixture!r}'
  part = _part(mixture.terms(cfg.mixture)[0], cfg, knob)
  return shards.open_tokenizer(part.directory, part.manifest)


def _part(term: mixture.Term, cfg: Config, knob: str) -> mixture.Part:
  place, folder = term.directory, cfg.cache or cache.default()
  try:
    directory = _directory(place, cfg, folder)
    return mixture.Part(term, directory, shards.read_manifest(directory))
  except FileNotFoundError as error:
    raise ValueError(
      f'{knob}: no such dataset {place!r} ({error}); if it has moved, name its new '
      'place (eval.py: --data), or make one with python scripts/prepare_data.py '
      f'--length={cfg.length} --out=DIR ...'
    ) from error
  except (ValueError, OSError) as error:
    raise ValueError(f'{knob} (config.data.cache={folder!r}): {error}') from error


def _directory(place: str, cfg: Config, folder: str) -> str:
  """The place of a dataset -> its local directory, built or copied if necessary."""
  if place == STDLIB:
    try:
      return embedded.directory(cfg.length, cfg.tokenizer, folder)
    except ValueError as error:
      raise ValueError(f'config.data.tokenizer={cfg.tokenizer!r}: {error}') from error
  if storage.is_remote(storage.path(place)):
    return remote.directory(place.rstrip('/'), folder)
  return place


def _check(part: mixture.Part, first: mixture.Part, cfg: Config, knob: str) -> None:
  place, manifest = part.term.directory, part.manifest
  if manifest.length != cfg.length:
    raise ValueError(
      f'config.data.length={cfg.length}, but {place} was packed with --length='
      f'{manifest.length} ({knob})'
    )
  token, other = manifest.tokenizer, first.manifest.tokenizer
  if token.sha256 != other.sha256:
    raise ValueError(
      f'{knob}: {place} was made with the tokenizer {token.name!r} ({token.sha256[:8]}), '
      f'but {first.term.directory} with {other.name!r} ({other.sha256[:8]})'
    )
  domain, domains = part.term.domain, sorted(manifest.splits['train'])
  if domain and domain not in domains:
    raise ValueError(f'{knob}: no domain {domain!r}, but allowed are {domains}')
  if not part.rows('train'):
    raise ValueError(f'{knob}: {part.label} has no training rows')
