"""Folders of the cache: an interrupted one leaves nothing that no one resumes."""

import os

import pytest

from gated.data import cache


@pytest.mark.parametrize(('resumes', 'left'), [(False, []), (True, ['.corpus.partial'])])
def test_an_interrupted_folder_is_removed_unless_the_next_call_resumes_it(
  resumes, left, tmp_path
):
  target = tmp_path / 'corpus'

  def fill(draft):
    with open(os.path.join(draft, 'half'), 'w') as file:
      file.write('half')
    raise SystemExit(143)  # As by SIGTERM.

  with pytest.raises(SystemExit):
    cache.make(str(target), target.exists, fill, resumes=resumes)
  assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == left
  cache.make(str(target), target.exists, lambda draft: None, resumes=resumes)
  assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ['corpus']
  assert [p.name for p in target.iterdir()] == (['half'] if resumes else [])
