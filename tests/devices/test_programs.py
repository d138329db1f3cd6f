"""Programs that were compiled once are read from the user's cache."""

import json
import os

import pytest

from gated.devices import programs

CODE = """
import json, sys
import jax, jax.monitoring
from gated.devices import programs
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
programs.keep(sys.argv[1])
print(json.dumps([
  float(jax.jit(lambda x: x * 3 + 1)(2.0)),
  jax.config.jax_compilation_cache_dir,
  sum(event == '/jax/compilation_cache/cache_hits' for event in hits),
]))
"""


@pytest.fixture
def start(run_python):
  """start(folder, **environment) -> the value, JAX's folder and the programs read."""

  def start(folder, **env):
    chosen = {'JAX_COMPILATION_CACHE_DIR': ''} | env
    done = run_python(['-c', CODE, folder], env=chosen)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  return start


@pytest.mark.slow
def test_a_program_is_compiled_once(start, tmp_path):
  value, folder, hits = start(tmp_path)
  assert (value, hits) == (7.0, 0)
  assert os.path.dirname(folder) == str(tmp_path / 'programs')
  assert os.stat(folder).st_mode & 0o777 == 0o700
  value, again, hits = start(tmp_path)
  assert (value, again) == (7.0, folder) and hits > 0


@pytest.mark.slow
def test_the_users_own_choice_and_a_missing_place_are_respected(start, tmp_path):
  own = str(tmp_path / 'own')
  assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=own)[1] == own
  assert not (tmp_path / 'programs').exists()
  (tmp_path / 'file').write_text('')
  assert start(tmp_path / 'file')[:2] == [7.0, '']


def test_the_programs_not_used_for_longest_are_removed_first(tmp_path):
  for age, name in enumerate(['new', 'middle', 'old']):
    (tmp_path / name).write_bytes(bytes(100))
    os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
  programs.prune(tmp_path, 250)
  assert sorted(os.listdir(tmp_path)) == ['middle', 'new']
