"""The outcome of the last session in a workdir."""

import json

import pytest

from gated import storage
from gated.run import outcome


def test_an_outcome_is_read_as_written(tmp_path):
  workdir = storage.path(tmp_path)
  assert outcome.read(workdir) is None
  for code, ended in {0: True, 3: True, 4: False, 1: False}.items():
    result = outcome.Outcome(code, 7, 'so', 1.5)
    outcome.write(workdir, result)
    assert outcome.read(workdir) == result and result.ended == ended


@pytest.mark.parametrize(
  'content',
  [
    *('', '{', '[]', '3', '[' * 100_000, '{"code": 0}', '{"code": "0", "step": 9}'),
    *('{"code": 0, "step": NaN}', '{"code": 1e999, "step": 1}'),
    *('{"code": true, "step": 1}', '{"code": 0, "step": -1}'),
    '{"code": 0, "step": 1, "told": []}',
  ],
)
def test_a_damaged_outcome_is_refused(content, tmp_path):
  (tmp_path / outcome.NAME).write_text(content)
  with pytest.raises(ValueError, match=r'outcome\.json is damaged'):
    outcome.read(storage.path(tmp_path))


def test_fields_of_a_later_version_are_ignored(tmp_path):
  (tmp_path / outcome.NAME).write_text(json.dumps({'code': 3, 'step': 2, 'more': 1}))
  assert outcome.read(storage.path(tmp_path)) == outcome.Outcome(3, 2)
