"""The flags of scripts/prepare_data.py that determine a dataset."""

import codecs
import dataclasses
import re
from typing import Any

from gated import config
from gated.data import content, ids, shards

BPE = re.compile(r'bpe:\d+')
ON_ERROR = ('stop', 'skip')
DEDUP = ('none', 'exact', 'near')
IDS = ('', 'auto', *ids.DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The flags of scripts/prepare_data.py that determine the rows, besides the input."""

  length: int
  tokenizer: str  # 'bytes', 'bpe:SIZE', or a path.
  eos: str  # The end-of-text token, if it has an unusual name.
  heldout: float  # The held-out fraction of documents.
  shard_rows: int
  seed: int  # Sets the order of documents.
  # Whether each document starts with the beginning-of-text token, or which one.
  bos: bool | str
  field: str  # The field with the text, in JSON lines and Parquet.
  suffixes: tuple[str, ...]  # Files with these suffixes are one document of text each.
  # The manifest has these only where they differ from the defaults, which are those of
  # datasets that were made before an option existed; the command has dedup='exact'.
  encoding: str = 'utf-8'  # Of text files and JSON lines.
  on_error: str = 'stop'  # Or 'skip', which leaves out what cannot be read.
  # Or 'exact': one copy of each text, and a split by content; or 'near': one of similar
  # texts as well.
  dedup: str = 'none'
  ids: str = ''  # The input holds token ids of this dtype, or 'auto', instead of text.

  def __post_init__(self):
    config.one_of('--on_error', self.on_error, ON_ERROR)
    config.one_of('--dedup', self.dedup, DEDUP)
    config.one_of('--ids', self.ids, IDS)
    if self.dedup == 'near':
      content.check_library()
    if self.ids and BPE.fullmatch(self.tokenizer):
      raise ValueError(
        f'--ids={self.ids}, but --tokenizer={self.tokenizer} is to be trained; name the '
        'tokenizer of the ids'
      )
    if self.bos == '':
      raise ValueError('--bos= is empty, but it must be a token')
    if isinstance(self.bos, str) and BPE.fullmatch(self.tokenizer):
      raise ValueError(f'--bos={self.bos}, but --tokenizer={self.tokenizer} has no such')
    try:
      'text'.encode(self.encoding)
      codecs.getincrementaldecoder(self.encoding)
    except LookupError as error:
      raise ValueError(f'--encoding={self.encoding!r}: {error}') from error
    config.within('--length', self.length, 1, shards.MAX_LENGTH)
    config.within('--shard_rows', self.shard_rows, 1, 1 << 31)
    config.within('--seed', self.seed, 0, shards.MAX_COUNT)
    if not 0 <= self.heldout < 1:
      raise ValueError(f'--heldout={self.heldout}, but 0 to below 1 are allowed')
    if not all(self.suffixes):
      raise ValueError(f'--suffixes={self.suffixes}, but one of them is empty')

  @property
  def recorded(self) -> dict[str, Any]:
    """The options in a manifest."""
    fields = dataclasses.asdict(self) | {'suffixes': sorted(self.suffixes)}
    for name in ('encoding', 'on_error', 'dedup', 'ids'):
      if fields[name] == getattr(Options, name):
        del fields[name]
    return fields
