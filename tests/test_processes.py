"""The processes of a run find each other, or one says which is missing."""

import jax
import pytest

from gated import processes


@pytest.mark.parametrize(
  ('count', 'process', 'said'),
  [(2, 0, '--processes=2 without'), (2, 2, '--process=2 must'), (1, -1, '--process=-1')],
)
def test_a_process_that_would_run_alone_by_mistake_is_refused(count, process, said):
  with pytest.raises(ValueError, match=said):
    processes.start('', count, process, start_timeout=9, peer_timeout=9)


def test_start_leaves_a_single_process_alone():
  processes.start('', 1, 0, start_timeout=9, peer_timeout=9)
  assert not jax.distributed.is_initialized()
