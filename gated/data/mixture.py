"""What a run's data is mixed from: the parts of a mixture, and how they take turns.

A mixture is 'DIR[@DOMAIN][=WEIGHT],...'. A part without a weight weighs 1; without a
domain, the rows of all its domains are pooled.
"""

import dataclasses
import fractions
import hashlib
import itertools
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from gated.data import shards

WEIGHT = re.compile(r'\d{1,9}(\.\d{1,9})?')


class Term(NamedTuple):
  """One 'DIR[@DOMAIN][=WEIGHT]'."""

  directory: str
  domain: str
  weight: fractions.Fraction


def terms(mixture: str) -> list[Term]:
  """The knob's text -> its terms. ValueError, with the knob's name, if it is none."""
  found = []
  for text in mixture.split(','):
    place, equals, weight = text.strip().partition('=')
    directory, _, domain = place.partition('@')
    weight = weight if equals else '1'
    if not directory or not WEIGHT.fullmatch(weight) or not fractions.Fraction(weight):
      raise ValueError(
        f'config.data.mixture={mixture!r}: {text!r} is not DIR[@DOMAIN][=WEIGHT] with a '
        'weight above 0'
      )
    found.append(Term(directory, domain, fractions.Fraction(weight)))
  if len({term[:2] for term in found}) < len(found):
    raise ValueError(f'config.data.mixture={mixture!r} names a dataset twice')
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A term of the mixture, opened."""

  directory: str
  label: str  # As the mixture spells it, without its weight.
  domain: str
  weight: fractions.Fraction
  manifest: shards.Manifest

  @property
  def place(self) -> str:
    """Its directory or URL, as the mixture spells it."""
    return self.label.removesuffix(f'@{self.domain}') if self.domain else self.label

  def portions(self, split: str) -> dict[str, shards.Portion]:
    everything = self.manifest.splits[split]
    chosen = [self.domain] if self.domain else sorted(everything)
    return {name: everything[name] for name in chosen if name in everything}

  def files(self, split: str) -> list[shards.Shard]:
    return [
      shard for portion in self.portions(split).values() for shard in portion.shards
    ]

  def segments(self) -> int:
    """The most documents that one of its rows holds."""
    both = [p for split in shards.SPLITS for p in self.portions(split).values()]
    return max((portion.segments for portion in both), default=0)

  def rows(self, split: str) -> int:
    return sum(portion.rows for portion in self.portions(split).values())

  def source(self, used: Sequence[shards.Shard]) -> Any:
    """Shards -> a grain data source of their records."""
    import grain

    paths = [shards.inside(self.directory, shard.file) for shard in used]
    try:
      source: Any = grain.sources.ArrayRecordDataSource(paths)
    except Exception as error:
      raise ValueError(f'{self.directory}: a shard cannot be read: {error}') from error
    if len(source) != sum(shard.rows for shard in used):
      raise ValueError(
        f'{self.directory}: its shards hold {len(source)} rows, not what the '
        'manifest says'
      )
    return source


def heldout_domains(parts: Sequence[Part]) -> dict[str, tuple[Part, str]]:
  """Name of a held-out domain -> where it lies; DIR.DOMAIN where two would share it."""
  found = [
    (part, name)
    for part in parts
    for name, portion in part.portions('heldout').items()
    if portion.rows
  ]
  names = [name for _, name in found]
  domains = {}
  for part, name in found:
    folder = os.path.basename(os.path.normpath(part.place))
    key = name if names.count(name) == 1 else f'{folder}.{name}'
    if key in domains:
      raise ValueError(
        f'two datasets are called {folder!r} and have a domain {name!r}; '
        'rename a directory of config.data.mixture'
      )
    domains[key] = part, name
  return domains


def fingerprint(parts: Sequence[Part]) -> dict[str, Any]:
  """What the data is, wherever it lies and whatever the seed; ready for JSON."""
  content = {
    'parts': [
      {
        'manifest': part.manifest.digest,
        'domain': part.domain,
        'weight': str(part.weight),
      }
      for part in parts
    ],
    'tokenizer': parts[0].manifest.tokenizer['sha256'],
    'length': parts[0].manifest.length,
  }
  digest = hashlib.sha256(shards.canonical(content).encode()).hexdigest()
  return content | {'sha256': digest}


class Turns:
  """Weights -> index -> (part, index within the part), as grain's selection maps do it.

  In whole numbers w with sum W, every window [kW, (k+1)W) holds exactly w rows of each
  part, evenly spread. grain's own mix() rounds its weights (7:3 becomes 233:100).
  """

  def __init__(self, weights: Sequence[fractions.Fraction]):
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    self.whole = [weight // common for weight in whole]
    # What is left from each part on: [W, W - w0, W - w0 - w1, ..., 0].
    taken = itertools.accumulate([0, *self.whole])
    self._left = [sum(self.whole) - before for before in taken]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    for part, (left, after) in enumerate(itertools.pairwise(self._left)):
      # Of the first n that come to a part, floor(n * after / left) go on to the next.
      on = index * after // left
      if (index + 1) * after // left == on:
        return part, index - on
      index = on
    raise AssertionError('the last part takes what is left')
