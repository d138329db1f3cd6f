"""The flags of an evaluation on documents and long rows, and their values."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gated import config
from gated.evals import copying

FLAGS = 'domain', 'suffixes', 'stride', 'streaming', 'copying'
SHARED = 'length', 'batch', 'rows', 'by_position', 'figures'
UNCOUNTED = 'batch', 'by_position', 'figures'  # They do not change the numbers.
_WINDOW = re.compile(r'(\d{1,9}):(\d{1,9})', re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Options:
  """What is measured. ValueError, with the flag's name, for an option out of range."""

  domain: tuple[str, ...]  # NAME=PATH each
  suffixes: tuple[str, ...]  # of further files of text in folders
  length: int  # tokens of a window; 0 for those that RoPE is prepared for
  stride: int  # tokens between the starts of two windows; 0 for half a window
  batch: int  # windows per device at a time
  rows: int  # documents per domain, and rows per distance; 0 for all, and a few
  by_position: bool  # adds the loss by position in the window
  figures: bool  # draws the loss by domain and by position
  streaming: tuple[str, ...]  # WINDOW:KEPT each
  copying: tuple[int, ...]  # distances

  def __post_init__(self):
    for name in ('stride', 'streaming', 'suffixes', 'by_position', 'figures'):
      if (value := getattr(self, name)) and not self.domain:
        raise ValueError(f'--{name}={value} needs --domain')
    names = [spec.partition('=')[0] for spec in self.domain]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(f'--domain={name}=... is given twice')
    if len({*self.streaming}) < len(self.streaming):
      raise ValueError(f'--streaming={",".join(self.streaming)} has a pair twice')
    for distance in self.copying:
      config.within('--copying', distance, copying.SPAN, 1 << 24)
    assert self.caches is not None  # ValueError for a pair that is none.

  @property
  def caches(self) -> dict[str, tuple[int, int]]:
    """The window and the kept tokens of each cache, by its spelling."""
    caches = {}
    for spec in self.streaming:
      match = _WINDOW.fullmatch(spec)
      if not match or int(match[1]) < 1:
        raise ValueError(
          f'--streaming={spec}, but WINDOW:KEPT is expected, such as 1020:4'
        )
      caches[spec] = int(match[1]), int(match[2])
    return caches

  def window(self, prepared: int, yarn: str) -> tuple[int, int]:
    """-> the length and the stride of windows, for RoPE `prepared` for some tokens.

    0 is any number. ValueError names the flag if a window, a cache or a distance is
    longer, unless `yarn` is given with a factor of 1: RoPE is then used as it is.
    """
    length = self.length or prepared
    if not length and self.domain:
      raise ValueError('--length=TOKENS is needed: the model does not say its own')
    longest = {'length': self.length} if not self.streaming else {}
    longest |= {f'streaming={spec}': sum(cache) for spec, cache in self.caches.items()}
    longest |= {f'copying={each}': each + copying.SPAN for each in self.copying}
    for name, tokens in longest.items():
      if 0 < prepared < tokens and float(yarn.partition(',')[0] or 0) != 1:
        name = name if '=' in name else f'{name}={tokens}'
        raise ValueError(
          f'--{name}, but RoPE is prepared for {prepared} tokens: --yarn=FACTOR '
          'stretches it, and --yarn=1 measures beyond them as it is'
        )
    stride = self.stride or max(1, length // 2)
    if stride > length:
      raise ValueError(f'--stride={stride}, but a window has only {length} tokens')
    return length, stride


def define(flags: Any, *, excludes: Sequence[str]) -> Callable[[], Options | None]:
  """Defines the flags -> a function that reads them; None without --domain and --copying.

  ValueError names a flag with a wrong value, an option that needs another one, or a flag
  of `excludes` that is given too. `flags` is absl's module.
  """
  own = {
    'domain': flags.DEFINE_multi_string(
      'domain', [], 'NAME=PATH: perplexity of documents; may be repeated.'
    ),
    'suffixes': flags.DEFINE_list('suffixes', [], 'With --domain: further text files.'),
    'stride': flags.DEFINE_integer(
      'stride', 0, 'With --domain: tokens between windows; 0: half a window.', 0
    ),
    'streaming': flags.DEFINE_list(
      'streaming', [], 'With --domain: StreamingLLM with WINDOW:KEPT tokens, ...'
    ),
    'copying': flags.DEFINE_list(
      'copying', [], 'The loss on spans repeated at these distances in tokens.'
    ),
  }

  def read() -> Options | None:
    values: dict[str, Any] = {
      name: tuple(flag.value) if isinstance(flag.value, list) else flag.value
      for name, flag in own.items()
    }
    chosen = [name for name in ('domain', 'copying') if values[name]]
    for name in excludes if chosen else own:
      if flags.FLAGS[name].present:
        side = f'with --{chosen[0]}' if chosen else 'without --domain or --copying'
        value = flags.FLAGS[name].value
        raise ValueError(f'--{name}={value!r} is not allowed {side}')
    if not chosen:
      return None
    try:
      values['copying'] = tuple(int(each) for each in values['copying'])
    except ValueError as error:
      raise ValueError(f'--copying={",".join(values["copying"])}: {error}') from error
    return Options(**values, **{name: flags.FLAGS[name].value for name in SHARED})

  return read


def plain(options: Options) -> dict[str, Any]:
  """The options that decide the numbers of a report."""
  every = dataclasses.asdict(options)
  return {name: every[name] for name in every if name not in UNCOUNTED}
