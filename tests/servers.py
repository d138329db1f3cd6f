"""Object stores of our own: servers here that speak as Amazon's and Google's do."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence

from faults import process

NO_PROXY = ('no_proxy', 'NO_PROXY')


class Missing(Exception):
  """A server needs a package that is not installed; says which."""


@contextlib.contextmanager
def s3() -> Generator[str]:
  """A server that speaks S3 -> the URL of a bucket; os.environ names it meanwhile."""
  environment = {
    'AWS_ACCESS_KEY_ID': 'nobody',
    'AWS_SECRET_ACCESS_KEY': 'nothing',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_CONFIG_FILE': os.devnull,
    'AWS_SHARED_CREDENTIALS_FILE': os.devnull,
    'AWS_EC2_METADATA_DISABLED': 'true',
  }
  command = ['-m', 'moto.server', '-H', '127.0.0.1', '-p']
  with _server(('moto', 's3fs'), command, ['AWS_ENDPOINT_URL'], environment) as url:
    urllib.request.urlopen(urllib.request.Request(f'{url}/bucket', method='PUT')).close()
    yield 's3://bucket'


@contextlib.contextmanager
def gs() -> Generator[str]:
  """As `s3`, a server that speaks Google's: for gcsfs, and for TensorStore itself."""
  environment = {
    'GOOGLE_CLOUD_PROJECT': 'nobody',
    'NO_GCE_CHECK': 'true',
    'GCE_METADATA_HOST': '127.0.0.1:1',  # TensorStore then needs no credentials.
  }
  names = ['STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL']
  command = [__file__, 'start', '--in-memory', '--default-bucket=bucket']
  command += ['--host=127.0.0.1', '--port']
  with _server(('gcp_storage_emulator', 'gcsfs'), command, names, environment):
    yield 'gs://bucket'


@contextlib.contextmanager
def _server(
  packages: Sequence[str],
  command: Sequence[str],
  names: Sequence[str],
  environment: Mapping[str, str],
) -> Generator[str]:
  """Runs `python COMMAND PORT` until the end -> its URL, once it answers.

  The variables `names` say the URL, and `environment` stands beside them.
  """
  for package in packages:
    if not importlib.util.find_spec(package):
      raise Missing(f'needs {package}: pip install -r requirements-dev.txt')
  port = process.free_port()
  url = f'http://127.0.0.1:{port}'
  local = {n: ','.join(filter(None, ['127.0.0.1', os.environ.get(n)])) for n in NO_PROXY}
  quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  with (
    _environment(local | dict(environment) | dict.fromkeys(names, url)),
    subprocess.Popen([sys.executable, *command, str(port)], **quiet) as server,
  ):
    try:
      until = time.monotonic() + 60
      while not _answers(port):
        assert server.poll() is None, f'{packages[0]} ended with {server.returncode}'
        assert time.monotonic() < until, f'{packages[0]} does not answer'
        time.sleep(0.05)
      yield url
    finally:
      server.kill()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Generator[None]:
  """Variables of this process, as they were again in the end."""
  before = {name: os.environ.get(name) for name in changes}
  os.environ.update(changes)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


def _answers(port: int) -> bool:
  try:
    socket.create_connection(('127.0.0.1', port), timeout=5).close()
    return True
  except OSError:
    return False


def _emulate() -> None:
  """gcp_storage_emulator, corrected in two points where Google's server differs.

  It tells the generation of the bytes that it sends: TensorStore cannot write again
  what came without. And it keeps a file's last byte where that is a carriage return:
  gcsfs ends a part with a line feed alone, which the emulator's parser takes for the
  second half of a line's end.
  """
  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers import objects

  download = objects.download

  def told(request, response, storage, *args, **options):
    where = request.params['bucket_name'], request.params['object_id']
    download(request, response, storage, *args, **options)
    if response.status < 300:
      response['x-goog-generation'] = storage.get_file_obj(*where)['generation']

  objects.download = told
  decode = server._decode_raw_data
  server._decode_raw_data = lambda data, request: (decode(data, request) or b'').replace(
    b'\n--==0==', b'\r\n--==0=='
  )
  from gcp_storage_emulator.__main__ import main

  main()


if __name__ == '__main__':
  _emulate()
