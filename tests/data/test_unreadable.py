"""Rows that can no longer be read: one line, which says if another try may help."""

import errno
import types

import pytest

from gated import data
from gated.data import shards

KILLED = RuntimeError('Worker process was terminated unexpectedly with exit code -9.\nx')


def read(error, tmp_path, *, size=4):
  """Reads rows until an error, from a dataset whose manifest says `size` bytes."""

  def rows():
    yield 'a row'
    raise error

  shard = shards.Shard(file='train.array_record', rows=1, size=size, sha256='')
  (tmp_path / shard.file).write_bytes(b'four')
  part = types.SimpleNamespace(directory=tmp_path, files=lambda split: [shard])
  corpus = types.SimpleNamespace(_parts=[part], _workers=2)
  return list(data.Corpus._checked(corpus, rows()))  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(
  ('error', 'kind', 'message'),
  [
    (KILLED, data.Unreadable, 'config.data.workers=2: a data worker was killed'),
    (OSError(errno.ENOSPC, 'No space left'), data.Unreadable, 'workers=2: .*No space'),
    (RuntimeError('Corrupted Riegeli/records file'), data.Damaged, 'cannot be read: Cor'),
    (ValueError('a record has 0 bytes'), data.Damaged, 'row cannot be read: a record'),
    (KeyError('a mistake of ours'), KeyError, 'a mistake of ours'),
  ],
)
def test_the_kind_of_an_error_is_told_apart(error, kind, message, tmp_path):
  with pytest.raises(kind, match=message) as caught:
    read(error, tmp_path)
  assert caught.type is kind and '\n' not in str(caught.value)


def test_a_shard_that_was_cut_is_named(tmp_path):
  with pytest.raises(data.Damaged, match=r'train\.array_record has 4 bytes') as caught:
    read(KeyError('of the decoder'), tmp_path, size=9)
  again = caught.value.saved(7)
  assert type(again) is data.Damaged
  assert str(again).endswith('; the last saved step is 7')
