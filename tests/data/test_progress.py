"""Progress lines of long work."""

import time

import pytest

from gated.data import progress
from gated.data.progress import Progress


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(progress, 'FIRST', 0.1)
  monkeypatch.setattr(progress, 'EVERY', 0.1)


def test_long_work_prints_how_much_is_done(capsys):
  with Progress('packing', total=2000, unit='rows') as shown:
    for i in shown.over(range(2000)):
      if i == 1500:
        time.sleep(0.3)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'packing: 1,500 of 2,000 rows, 0 s' and len(lines) >= 2


def test_a_single_long_call_prints_its_seconds(capsys):
  with Progress('reading'):
    time.sleep(0.15)
  assert capsys.readouterr().err == 'reading: 0 s\n'


def test_short_or_disabled_work_prints_nothing(capsys):
  with Progress('short'):
    pass
  with Progress('of another process', enabled=False):
    time.sleep(0.15)
  assert capsys.readouterr().err == ''
