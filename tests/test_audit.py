"""Lock files name all that the requirements ask for; the audit finds what is known."""

import json
import re
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import audit, lock

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob('requirements*.txt'))
MACHINES = [
  dict(
    python_version=python,
    python_full_version=f'{python}.0',
    sys_platform=system,
    platform_machine=machine,
  )
  for python in ('3.11', '3.12')
  for system, machine in (('linux', 'x86_64'), ('linux', 'aarch64'), ('darwin', 'arm64'))
]


def pinned(source, machine):
  """A requirements file and a machine -> the version of each package there."""
  found = {}
  for entry in lock.entries(source):
    line = entry.partition('\\')[0]
    pin, _, marker = line.partition(' ;')
    if marker.strip() and not Marker(marker).evaluate(machine):
      continue
    name, version = pin.strip().split('==')
    assert found.setdefault(name, version) == version, f'{name} has two versions'
  return found


@pytest.mark.parametrize('source', SOURCES, ids=lambda path: path.name)
def test_a_lock_file_has_what_is_asked_for_on_every_machine(source):
  wanted = [line for line in source.read_text().splitlines() if re.match(r'\w', line)]
  for machine in MACHINES:
    found = pinned(source, machine)
    for requirement in map(Requirement, wanted):
      version = found.get(canonicalize_name(requirement.name))
      assert version, f'{requirement} is not locked: make lock'
      assert requirement.specifier.contains(version), f'{requirement}: make lock'


@pytest.mark.parametrize('source', SOURCES, ids=lambda path: path.name)
def test_a_lock_file_has_hashes_and_no_address(source):
  text = source.with_suffix('.lock').read_text()
  assert '://' not in text and 'index' not in text.split('\n')[0]
  own = lock.ENTRY.findall(text)
  rest = lock.ENTRY.sub('', text).splitlines()
  assert all(line.startswith(('#', '-r ')) for line in rest), rest[:5]
  assert all('--hash=sha256:' in entry for entry in own)
  assert lock.included(source) == [
    (ROOT / name).with_suffix('.txt') for name in re.findall(r'(?m)^-r (\S+)', text)
  ]


# Known vulnerabilities.


def record(name='jax', ecosystem='PyPI', **affected):
  package = {'name': name, 'ecosystem': ecosystem}
  return {'id': 'X-1', 'affected': [{'package': package} | affected]}


def between(*events):
  return {
    'ranges': [{'type': 'ECOSYSTEM', 'events': [dict([event]) for event in events]}]
  }


@pytest.mark.parametrize(
  ('entry', 'versions'),
  [
    (record(versions=['0.10.2']), ['0.10.2']),
    (record(**between(('introduced', '0'))), ['0.9', '0.10.2', '0.12.0.1']),
    (record(**between(('introduced', '0'), ('fixed', '0.10.2'))), ['0.9']),
    (
      record(**between(('introduced', '0'), ('last_affected', '0.10.2'))),
      ['0.9', '0.10.2'],
    ),
    (record(**between(('fixed', '0.12'), ('introduced', '0.10'))), ['0.10.2']),
    (record(name='JAX', versions=['0.9']), ['0.9']),
    (record(ecosystem='npm', versions=['0.9']), []),
    (record(name='jaxlib', versions=['0.9']), []),
    (record(versions=['0.9']) | {'withdrawn': '2026'}, []),
    (record(ranges=[{'type': 'GIT', 'events': [{'introduced': '0'}]}]), []),
  ],
)
def test_an_advisory_is_matched_by_name_and_version(entry, versions):
  pins = {audit.Pin('jax', version) for version in ('0.9', '0.10.2', '0.12.0.1')}
  found = audit.match(pins, iter([entry]))
  assert sorted(f.pin.version for f in found) == sorted(versions)


@pytest.fixture
def locks(tmp_path):
  (tmp_path / 'requirements.lock').write_text(
    "jax==0.10.2 ; python_version < '3.12' \\\n    --hash=sha256:0\n"
    "jax==0.12.0 ; python_version >= '3.12' \\\n    --hash=sha256:0\n"
    'flax==0.12.8 \\\n    --hash=sha256:0\n'
  )
  return tmp_path


@pytest.mark.parametrize('kind', ['record', 'list', 'folder', 'zip'])
def test_saved_advisories_are_read_without_a_network(kind, locks, capsys, monkeypatch):
  monkeypatch.setattr(audit, '_pip_audit', lambda *_: pytest.fail('asked a service'))
  bad = record(**between(('introduced', '0'), ('fixed', '0.11')))
  path = locks / 'osv.json'
  path.write_text(json.dumps([bad] if kind == 'list' else bad))
  if kind == 'zip':
    with zipfile.ZipFile(locks / 'all.zip', 'w') as archive:
      archive.write(path, 'X-1.json')
    path = locks / 'all.zip'
  given = locks if kind == 'folder' else path
  assert audit.main([f'--locks={locks}', f'--advisories={given}']) == 1
  out = capsys.readouterr().out
  assert out.startswith('jax 0.10.2: X-1, fixed in 0.11\naudit: 3 packages looked up, 1 ')
  path.write_text('[]')
  assert audit.main([f'--locks={locks}', f'--advisories={path}']) == 0
  path.write_text('{')
  assert audit.main([f'--locks={locks}', f'--advisories={path}']) == 2


def test_a_service_is_asked_for_each_version_of_a_package(locks, capsys, monkeypatch):
  asked = []

  def answer(path):
    asked.append(path.read_text().split())
    vulns = [{'id': 'X-2', 'fix_versions': []}]
    entries = [line.split('==') for line in asked[-1]]
    known = lambda n, v: {
      'name': n,
      'version': v,
      'vulns': vulns if v == '0.12.0' else [],
    }
    skipped = lambda n: {'name': n, 'skip_reason': 'who?'}
    return {
      'dependencies': [skipped(n) if n == 'flax' else known(n, v) for n, v in entries]
    }

  monkeypatch.setattr(audit, '_pip_audit', answer)
  assert audit.main([f'--locks={locks}']) == 1
  assert sorted(pin for group in asked for pin in group) == [
    'flax==0.12.8',
    'jax==0.10.2',
    'jax==0.12.0',
  ]
  out = capsys.readouterr().out
  assert (
    'jax 0.12.0: X-2, fixed in no version\nflax 0.12.8: not known to the service' in out
  )
  assert out.endswith('audit: 2 packages looked up, 1 vulnerabilities known\n')


def test_without_a_service_it_is_a_notice_in_one_line(locks, capsys, monkeypatch):
  def nobody(*_):
    raise audit.Unreachable('no route')

  monkeypatch.setattr(audit, '_pip_audit', nobody)
  assert audit.main([f'--locks={locks}']) == 0
  out = capsys.readouterr().out
  assert out.startswith('audit: skipped') and out.count('\n') == 1
  assert audit.main([f'--locks={locks}', '--required']) == 1
