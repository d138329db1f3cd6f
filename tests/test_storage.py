"""Files on a disk and in an object store, with the same functions."""

import errno
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from gated import storage

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(params=['local', 's3', 'gs'])
def folder(request, tmp_path):
  """A folder that does not exist yet, on the disk and in each store."""
  if request.param == 'local':
    return storage.path(tmp_path / 'run')
  bucket = request.getfixturevalue(request.param)
  return storage.path(f'{bucket}/{tmp_path.name}/run')


def store():
  """A file system without caches, as another process has it."""
  import fsspec

  return fsspec.filesystem('s3', use_listings_cache=False, skip_instance_cache=True)


def test_a_file_is_read_as_written(folder):
  for content in (b'', b'one', bytes(range(256)) * 99, b'two'):
    storage.write(folder / 'a' / 'note.json', content)
    assert storage.read(folder / 'a' / 'note.json', 1 << 20) == content
  assert storage.names(folder / 'a') == ['note.json']
  assert abs(storage.modified(folder / 'a' / 'note.json') - time.time()) < 60


def test_a_tilde_is_the_home_folder_and_any_other_name_is_itself(monkeypatch):
  """No shell expands --flag=~/x."""
  monkeypatch.setenv('HOME', '/home/me')
  assert os.fspath(storage.path('~/runs')) == '/home/me/runs'
  assert os.fspath(storage.path('~')) == '/home/me'
  for name in ('a~', 'a/~'):
    assert os.fspath(storage.path(name)) == name
  for name in ('./~', '~nobody-has-this-name/x'):
    assert os.fspath(storage.path(storage.path(name))) == os.path.abspath(name)


def test_dots_behind_a_link_are_the_folder_of_its_target(tmp_path):
  (tmp_path / 'there/deep').mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'there/deep')
  real = os.path.realpath(tmp_path)
  assert os.fspath(storage.path(tmp_path / 'link/../run')) == f'{real}/there/run'
  for name in ('../run', 'a/../run'):
    assert os.fspath(storage.path(name)) == name


def test_a_missing_file_is_named(folder):
  storage.write(folder / 'one', b'1')
  for path in (folder / 'two', folder / 'no' / 'where'):
    with pytest.raises(FileNotFoundError, match=str(path)):
      storage.read(path, 9)
    with pytest.raises(FileNotFoundError):
      storage.modified(path)
    assert not storage.exists(path)
  with pytest.raises(OSError, match='run'):
    storage.read(folder, 9)


def test_a_file_above_the_limit_is_refused_before_it_is_read(folder, monkeypatch):
  storage.write(folder / 'big', b'12345')
  assert storage.read(folder / 'big', 5) == b'12345'
  if storage.is_remote(folder):
    monkeypatch.setattr(storage._store(str(folder)[:2]), 'cat_file', None)
  else:
    os.truncate(folder / 'big', 1 << 40)  # More than the memory.
  with pytest.raises(ValueError, match=r'big has \d+ bytes, but 4 are allowed'):
    storage.read(folder / 'big', 4)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux')
def test_a_file_with_more_bytes_than_its_size_is_refused():
  assert os.path.getsize('/proc/self/status') == 0
  with pytest.raises(ValueError, match='has 4 bytes, but 3 are allowed'):
    storage.read('/proc/self/status', 3)


def test_a_pipe_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (tmp_path / 'pipe', '/dev/zero'):
    with pytest.raises(OSError, match='is not a file'):
      storage.read(path, 9)


def test_names_and_sizes_are_current(folder):
  assert storage.names(folder) == [] and storage.sizes(folder) == {}
  expected = {}
  # Patterns, backup files and hidden files are names like any other.
  for n, name in enumerate(['b', 'a/x', 'a/y/z', 'c~', '.d', '[a-z]', 'a b', 'é', '*']):
    storage.write(folder / name, b'.' * n)
    expected[name] = n
    assert storage.sizes(folder) == expected
  assert storage.names(folder) == sorted({name.partition('/')[0] for name in expected})
  assert storage.names(folder / 'a') == ['x', 'y']
  assert storage.sizes(folder / 'a') == {'x': 1, 'y/z': 2}
  assert storage.names(folder / 'b') == [] and storage.sizes(folder / 'b') == {}


def test_changes_by_other_processes_are_seen(remote):
  storage.write(f'{remote}/one', b'1')
  assert storage.names(remote) == ['one'] and not storage.exists(f'{remote}/two')
  other = store()
  other.pipe_file(f'{remote}/two', b'22')
  other.rm_file(f'{remote}/one')
  assert storage.names(remote) == ['two'] and storage.sizes(remote) == {'two': 2}
  assert storage.exists(f'{remote}/two') and not storage.exists(f'{remote}/one')
  assert storage.read(f'{remote}/two', 2) == b'22'


def test_the_marker_of_an_empty_folder_is_not_a_file(remote):
  store().pipe_file(f'{remote}/empty/', b'')
  storage.write(f'{remote}/full/x', b'1')
  store().pipe_file(f'{remote}/full/', b'')
  assert storage.names(remote) == ['empty', 'full']
  assert storage.names(f'{remote}/full') == ['x']
  assert storage.sizes(remote) == {'full/x': 1}


def test_a_file_and_a_folder_may_have_the_same_name(remote):
  storage.write(f'{remote}/a', b'1')
  storage.write(f'{remote}/a/b', b'22')
  storage.write(f'{remote}/ab', b'333')
  assert storage.names(f'{remote}/a') == ['b']
  assert storage.sizes(f'{remote}/a') == {'b': 2}
  storage.remove(f'{remote}/a')
  assert storage.sizes(remote) == {'ab': 3}


def test_remove_takes_a_file_a_tree_or_a_missing_path(folder):
  for name in ('a/x', 'a/y/z', 'ab', 'a*', 'b'):
    storage.write(folder / name, b'1')
  for name, left in (
    ('nothing', 5), ('a*', 4), ('a', 2), ('b', 1), ('b', 1), ('b/c', 1), ('ab', 0)
  ):  # fmt: skip
    storage.remove(folder / name)
    assert len(storage.sizes(folder)) == left
  storage.remove(folder)
  assert not storage.exists(folder)


def test_a_link_is_removed_without_its_target(tmp_path):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'x').write_bytes(b'1')
  (tmp_path / 'link').symlink_to(tmp_path / 'data')
  storage.remove(tmp_path / 'link')
  assert storage.sizes(tmp_path) == {'data/x': 1}


def test_a_whole_bucket_is_never_removed(s3):
  with pytest.raises(ValueError, match='whole bucket'):
    storage.remove(s3)
  assert storage.exists(s3)


@pytest.mark.parametrize(
  'spec, fault',
  [
    ('http://host/x', r'gs:// and s3://'),
    ('az://bucket/x', r'gs:// and s3://'),
    ('file:///x', r'gs:// and s3://'),
    ('s3://', r's3://BUCKET/PATH'),
    ('gs:///x', r'gs://BUCKET/PATH'),
    ('s3://bucket/../other', r's3://BUCKET/PATH'),
    ('s3:/bucket/x', r"one slash: write 's3://bucket/x'"),
    ('GS:/bucket/x', r"one slash: write 'GS://bucket/x'"),
    ('hdfs:/x', r"one slash: write 'hdfs://x'"),
  ],
)
def test_an_invalid_path_is_refused(spec, fault):
  with pytest.raises(ValueError, match=fault):
    storage.path(spec)


@pytest.mark.parametrize('package, spec', [('s3fs', 's3://b/x'), ('gcsfs', 'gs://b/x')])
def test_a_missing_package_is_reported(monkeypatch, package, spec):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=rf'{package}.*pip install -r requirements-cloud'):
    storage.path(spec)
  assert storage.path('local') == storage.Path('local')


def test_a_path_keeps_its_spelling(s3):
  path = storage.path(f'{s3}/runs/a b') / 'x'
  assert str(path) == f'{s3}/runs/a b/x' and storage.is_remote(path)
  assert os.fspath(storage.path('runs/x')) == 'runs/x'
  assert not storage.is_remote('runs/s3://x')


def test_a_failed_local_write_leaves_the_old_file(tmp_path, monkeypatch):
  storage.write(tmp_path / 'note', b'old')

  def refuse(*_):
    raise OSError('no space')

  monkeypatch.setattr(os, 'replace', refuse)
  with pytest.raises(OSError, match='no space'):
    storage.write(tmp_path / 'note', b'new')
  assert [p.name for p in tmp_path.iterdir()] == ['note']
  assert (tmp_path / 'note').read_bytes() == b'old'


def test_a_reader_sees_a_complete_file(folder):
  storage.write(folder / 'note', b'a' * 5000)
  ended = threading.Event()

  def rewrite():
    for n in range(20):
      storage.write(folder / 'note', b'ab'[n % 2 : n % 2 + 1] * 5000)
    ended.set()

  writer = threading.Thread(target=rewrite)
  writer.start()
  while not ended.is_set():
    content = storage.read(folder / 'note', 5000)
    assert len(content) == 5000 and len(set(content)) == 1
  writer.join()


@pytest.mark.slow
@pytest.mark.parametrize('store', ['s3', 'gs'])
def test_upload_and_download_copy_complete_files(store, request, tmp_path):
  remote = f'{request.getfixturevalue(store)}/{tmp_path.name}'
  up, down = tmp_path / 'up', tmp_path / 'down'
  sizes = {f'{i % 3}/file{i}': i * 1000 for i in range(12)} | {'large': 2 * storage.PART}
  ends = itertools.cycle([b'\r', b'\n', b'\r\n', b'\0', b'--', b''])
  for (name, size), end in zip(sizes.items(), ends):
    (up / name).parent.mkdir(parents=True, exist_ok=True)
    (up / name).write_bytes((os.urandom(size) + end)[-size:] if size else b'')
  storage.upload(up, f'{remote}/copy', sizes)
  assert storage.sizes(f'{remote}/copy') == sizes
  storage.download(f'{remote}/copy', down, sizes)
  assert storage.sizes(down) == sizes
  assert all((up / name).read_bytes() == (down / name).read_bytes() for name in sizes)


def test_copying_a_missing_file_is_an_error(remote, tmp_path):
  (tmp_path / 'a').write_bytes(b'1')
  with pytest.raises(FileNotFoundError, match='b'):
    storage.upload(tmp_path, remote, ['a', 'b'])
  with pytest.raises(FileNotFoundError, match=f'{remote}/c'):
    storage.download(remote, tmp_path / 'down', ['c'])
  assert storage.sizes(tmp_path / 'down') == {}


OUTSIDE = ['..', '../x', 'a/../../x', '/etc/passwd', '', '.', 'a\0b', 'out/x']


@pytest.mark.parametrize('name', OUTSIDE)
def test_a_name_outside_of_the_folder_is_refused(remote, tmp_path, name):
  folder = tmp_path / 'in'
  folder.mkdir()
  (folder / 'out').symlink_to(tmp_path)
  with pytest.raises(ValueError, match='is outside of the folder'):
    storage.inside(folder, name)
  with pytest.raises(ValueError, match='is outside of the folder'):
    storage.download(remote, folder, [name])
  if name != 'out/x':
    with pytest.raises(ValueError, match='is outside of the folder'):
      storage.inside(remote, name)
  assert storage.inside(folder, 'a/b') == storage.Path(folder) / 'a' / 'b'
  assert str(storage.inside(remote, 'a/b')) == f'{remote}/a/b'


def test_an_error_of_the_store_is_an_oserror(s3):
  with pytest.raises(FileNotFoundError, match='nobucket'):
    storage.write('s3://nobucket/x', b'')
  with pytest.raises(OSError, match='UPPER'):
    storage.write('s3://UPPER case/x', b'')


@pytest.mark.slow
def test_an_unreachable_store_is_an_oserror(s3):
  story = (
    'from gated import storage\n'
    'try: storage.read("s3://bucket/x", 9)\n'
    'except OSError as error: print("fault:", error)\n'
  )
  clean = {k: v for k, v in os.environ.items() if k != 'AWS_ENDPOINT_URL'}
  done = subprocess.run(
    [sys.executable, '-c', story],
    cwd=ROOT,
    env=clean | {'AWS_ENDPOINT_URL': 'http://127.0.0.1:9', 'AWS_MAX_ATTEMPTS': '1'},
    capture_output=True,
    text=True,
  )
  assert done.stdout.startswith('fault: s3://bucket/x'), done.stderr


def test_an_error_of_a_full_disk_has_the_path_that_it_came_from(tmp_path):
  full = OSError(errno.ENOSPC, 'No space left on device')
  raises = pytest.raises(OSError, match=r"No space left on device: '.*run/run\.json'")
  with raises, storage.named(tmp_path / 'run' / 'run.json'):
    raise full
  assert storage.is_passing(full)
  other = OSError(errno.EACCES, 'Permission denied', '/dev/shm/x')
  assert not storage.is_passing(other)


def test_the_nearest_part_that_exists_is_found_and_long_names_are_refused(tmp_path):
  assert storage.top(tmp_path / 'a' / ('x' * 255)) == tmp_path
  assert storage.top(tmp_path) == tmp_path
  (tmp_path / 'link').symlink_to('nowhere')
  assert storage.top(tmp_path / 'link' / 'b') == tmp_path / 'link'
  with pytest.raises(OSError, match='File name too long'):
    storage.top(tmp_path / 'a' / ('x' * 256) / 'b')
