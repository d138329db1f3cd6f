"""The mixture of a run: its parts, and their order.

A mixture is 'DIR[@DOMAIN][=WEIGHT],...'. A part without a weight has weight 1; a part
without a domain pools the rows of all its domains. A DIR with one of ',@=' is quoted:
'"runs/lr=3"@code=2'. A `~` at the start of DIR is the home folder.
"""

import dataclasses
import fractions
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gated import config, storage
from gated.data import shards

TERM = re.compile(
  r"""\s*(?:(?P<quote>["'])(?P<quoted>.+?)(?P=quote)|(?P<plain>[^@=,"'\s][^@=,]*?))"""
  r'(?:@(?P<domain>[^=,]*?))?(?:=(?P<weight>[^,]*?))?\s*(?=,|$)'
)
WEIGHT = re.compile(r'\d{1,9}(\.\d{1,9})?')


class Term(NamedTuple):
  """One 'DIR[@DOMAIN][=WEIGHT]'."""

  directory: str
  domain: str
  weight: fractions.Fraction


def terms(mixture: str) -> list[Term]:
  """The value of config.data.mixture -> its terms; ValueError names the knob."""
  result, at = [], 0
  while not result or at <= len(mixture):
    term = TERM.match(mixture, at)
    weight = (term['weight'] or '1') if term else '0'
    if not term or not WEIGHT.fullmatch(weight) or not fractions.Fraction(weight):
      raise ValueError(
        f'config.data.mixture={mixture!r}: {mixture[at:]!r} does not begin with '
        'DIR[@DOMAIN][=WEIGHT], with a weight above 0; quote a DIR that has one of ",@="'
      )
    directory = os.path.expanduser(term['quoted'] or term['plain'])
    result.append(Term(directory, term['domain'] or '', fractions.Fraction(weight)))
    at = term.end() + 1
  if len({term[:2] for term in result}) < len(result):
    raise ValueError(f'config.data.mixture={mixture!r} names a dataset twice')
  return result


@dataclasses.dataclass(frozen=True)
class Part:
  """An opened term of the mixture."""

  term: Term
  directory: str  # A local folder; term.directory may be a URL or 'stdlib'.
  manifest: shards.Manifest

  @property
  def label(self) -> str:
    """The term without its weight."""
    place, domain, _ = self.term
    return f'{place}@{domain}' if domain else place

  def portions(self, split: str) -> dict[str, shards.Portion]:
    domains = self.manifest.splits[split]
    chosen = self.term.domain or None
    return {name: domains[name] for name in sorted(domains) if chosen in (None, name)}

  def files(self, split: str) -> list[shards.Shard]:
    portions = self.portions(split).values()
    return [shard for portion in portions for shard in portion.shards]

  def rows(self, split: str) -> int:
    return sum(portion.rows for portion in self.portions(split).values())

  def documents(self, split: str) -> int:
    return sum(portion.documents for portion in self.portions(split).values())

  def segments(self) -> int:
    """The largest number of documents in a row."""
    portions = (self.portions(split).values() for split in shards.SPLITS)
    counts = (portion.segments for portion in itertools.chain(*portions))
    return max(counts, default=0)

  def source(self, files: Sequence[shards.Shard]) -> Any:
    """Shards -> a grain data source of their records."""
    import grain

    paths = [os.fspath(storage.inside(self.directory, shard.file)) for shard in files]
    try:
      source: Any = grain.sources.ArrayRecordDataSource(paths)
    except Exception as error:
      raise ValueError(f'{self.directory}: a shard cannot be read: {error}') from error
    rows = sum(shard.rows for shard in files)
    if len(source) != rows:
      raise ValueError(
        f'{self.directory}: its shards have {len(source)} rows, but the manifest says '
        f'{rows}'
      )
    return source


def mean_segments(parts: Sequence[Part]) -> float:
  """The mean number of segments in a training row of a mixture; an upper estimate.

  A document that several rows share is a segment in each, so that the ends of rows make
  up to one more a row.
  """
  total = sum(part.term.weight for part in parts)
  rates = (part.documents('train') / max(1, part.rows('train')) for part in parts)
  return 1 + sum(
    float(part.term.weight / total) * rate for part, rate in zip(parts, rates)
  )


def heldout_domains(parts: Sequence[Part]) -> dict[str, tuple[Part, str]]:
  """Unique name -> (part, held-out domain): DOMAIN, or DIR.DOMAIN if parts share it."""
  pairs = [
    (part, name)
    for part in parts
    for name, portion in part.portions('heldout').items()
    if portion.rows
  ]
  names = [name for _, name in pairs]
  domains = {}
  for part, name in pairs:
    folder = os.path.basename(os.path.normpath(part.term.directory))
    key = name if names.count(name) == 1 else f'{folder}.{name}'
    if key in domains:
      raise ValueError(
        f'two datasets are called {folder!r} and have a domain {name!r}; '
        'rename a directory of config.data.mixture'
      )
    domains[key] = part, name
  return domains


def fingerprint(parts: Sequence[Part]) -> dict[str, Any]:
  """The identity of the data, independent of its place and of the seed; plain JSON."""
  content = {
    'parts': [
      {
        'manifest': part.manifest.digest,
        'domain': part.term.domain,
        'weight': str(part.term.weight),
      }
      for part in parts
    ],
    'tokenizer': parts[0].manifest.tokenizer.sha256,
    'length': parts[0].manifest.length,
  }
  return content | {'sha256': config.digest(content)}


def check_distinct(parts: Sequence[Part]) -> None:
  """ValueError if two terms are one dataset, such as a dataset and its copy or link."""
  seen: dict[tuple[str, str], str] = {}
  for part in parts:
    label = seen.setdefault((part.manifest.digest, part.term.domain), part.label)
    if label != part.label:
      raise ValueError(f'{label} and {part.label} are the same dataset: name it once')


def unseen_doubt(parts: Sequence[Part]) -> str:
  """-> why held-out text of one dataset may be training text of another, or ''.

  Datasets that are split by content, with the same fraction, have a text in one half.
  """
  made = {part.manifest.digest: part for part in parts}
  if len(made) < 2 or not any(part.rows('heldout') for part in parts):
    return ''
  labels = {digest: part.label for digest, part in made.items()}
  named = [
    labels[digest]
    for digest, part in made.items()
    if part.manifest.made.get('dedup', 'none') == 'none'
  ]
  if named:
    return (
      f'{", ".join(named)}: made with --dedup=none, so held-out text may also be in the '
      'training text of another dataset; prepare both with --dedup=exact'
    )
  fractions = {part.manifest.made.get('heldout') for part in made.values()}
  if len(fractions) > 1:
    return (
      f'{", ".join(labels.values())}: made with --heldout={sorted(map(str, fractions))}, '
      'so a text may be held out in one and in the training text of another; use one '
      '--heldout'
    )
  return ''


class Turns:
  """Weights -> index -> (part, index within the part).

  With whole weights w of sum W, every window [kW, (k+1)W) has exactly w rows of a part,
  evenly spread. grain's own mix() rounds its weights (7:3 becomes 233:100).
  """

  def __init__(self, weights: Sequence[fractions.Fraction]):
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    self.whole = [weight // common for weight in whole]
    # Weight of each part and its successors: [W, W - w0, W - w0 - w1, ..., 0].
    before = itertools.accumulate([0, *self.whole])
    self._remaining = [sum(self.whole) - weight for weight in before]

  def __getitem__(self, index: int) -> tuple[int, int]:
    for part, (weight, rest) in enumerate(itertools.pairwise(self._remaining)):
      # Of the first n indices that reach a part, floor(n * rest / weight) skip it.
      passed = index * rest // weight
      if (index + 1) * rest // weight == passed:
        return part, index - passed
      index = passed
    raise AssertionError('the last part passes no index')
