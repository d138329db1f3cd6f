"""The corpus of experiments/text, on made-up archives."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from gated.data import prepare
from scripts import make_text

ROOT = Path(__file__).resolve().parents[1]
CODE = ''.join(
  f'def area_{i}(width, height):\n  return width * height\n' for i in range(9)
)
PROSE = (
  'The gate multiplies the output of the attention by a score for each of the heads.\n\n'
  'It is a small change, and the score is computed from the input of the same layer.\n\n'
  'This page is for readers that want to know which of the variants is the best one.\n\n'
  'The others are in the tables, with the loss and the number of steps of the runs.\n'
)
LICENCE = 'Licensed under the Apache License, Version 2.0, with the usual conditions.\n'


def wheel(path, files):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, text in files.items():
      archive.writestr(name, text)


def sdist(path, files, links=()):
  with tarfile.open(path, 'w:gz') as archive:
    for name, text in files.items():
      data = text.encode()
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))
    for name, target in links:
      entry = tarfile.TarInfo(name)
      entry.type, entry.linkname = tarfile.SYMTYPE, target
      archive.addfile(entry)


def pin(folder, archives):
  """Lists every archive by its present digest."""
  folder.mkdir(exist_ok=True)
  for file, ending in (('wheels.txt', '*.whl'), ('sources.txt', '*.gz')):
    lines = [
      f'{path.name.split("-")[0]}==1.0 --hash=sha256:'
      f'{hashlib.sha256(path.read_bytes()).hexdigest()}\n'
      for path in sorted(archives.glob(ending))
    ]
    (folder / file).write_text('--no-binary=those\n\n# Pinned.\n' + ''.join(lines))


@pytest.fixture
def room(tmp_path):
  """A folder with archives and their lists; call it to make the corpus."""

  class Room:
    folder, archives, out = (tmp_path / name for name in ('lists', 'archives', 'out'))

    def make(self):
      pin(self.folder, self.archives)
      return self.run()

    def run(self):
      return make_text.make(str(self.folder), str(self.archives), str(self.out), 1)

    def texts(self, domain):
      files = sorted((self.out / domain).glob('*.jsonl'))
      lines = [line for file in files for line in file.read_text().splitlines()]
      return {entry['name']: entry['text'] for entry in map(json.loads, lines)}

  Room.archives.mkdir()
  return Room()


def test_code_and_prose_become_two_domains(room):
  wheel(room.archives / 'area-1.0.whl', {'area/sizes.py': CODE, 'area/logo.png': CODE})
  sdist(room.archives / 'gate-1.0.tar.gz', {'gate-1.0/docs/gate.rst': PROSE})
  manifest = room.make()
  assert room.texts('code') == {'area/area/sizes.py': CODE}
  assert room.texts('prose') == {'gate/gate-1.0/docs/gate.rst': PROSE}
  size = len(CODE.encode())
  assert manifest['domains']['code']['documents'] == 1
  assert manifest['domains']['code']['bytes'] == size
  assert manifest == json.loads((room.out / 'manifest.json').read_text())


def test_the_same_archives_give_the_same_bytes(room):
  files = {f'area/part_{i}.py': CODE.replace('area', f'side_{i}') for i in range(20)}
  wheel(room.archives / 'area-1.0.whl', files | {'area/README.md': PROSE})
  room.make()
  content = lambda: {
    path.relative_to(room.out): path.read_bytes()
    for path in room.out.rglob('*')
    if path.is_file()
  }
  first = content()
  shutil.rmtree(room.out)
  flags = [f'--{name}={getattr(room, name)}' for name in ('folder', 'archives', 'out')]
  script = [sys.executable, 'scripts/make_text.py', *flags, '--processes=2']
  printed = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
  assert printed.stdout.startswith('code: 20 documents, ')
  assert content() == first and len(first) == 3


def test_a_document_is_kept_once_whatever_its_white_space(room):
  wide = CODE.replace('  return', '\treturn  ')
  wheel(room.archives / 'area-1.0.whl', {'a.py': CODE, 'b.py': wide, 'c.txt': PROSE})
  sdist(room.archives / 'zone-1.0.tar.gz', {'d.py': CODE, 'e.md': PROSE + '\n\n'})
  manifest = room.make()
  counts = {domain: part['documents'] for domain, part in manifest['domains'].items()}
  assert counts == {'code': 1, 'prose': 1}


def test_a_paragraph_of_prose_is_kept_once(room):
  more = 'The second page adds a paragraph of its own, which is not in any other page.\n'
  pages = {'a.rst': PROSE, 'b.rst': PROSE + '\n' + more * 4}
  wheel(room.archives / 'gate-1.0.whl', pages)
  room.make()
  kept = '\n\n'.join(room.texts('prose').values())
  for paragraph in PROSE.split('\n\n'):
    assert kept.count(paragraph.strip()) == 1
  assert kept.count(more * 4) == 1


def test_licences_are_left_out_by_name_and_by_paragraph(room):
  files = {
    'LICENSE.txt': PROSE.replace('gate', 'grantee'),
    'docs/COPYING.rst': PROSE.replace('gate', 'holder'),
    'docs/page.rst': f'{LICENCE}\n{PROSE}',
  }
  wheel(room.archives / 'gate-1.0.whl', files)
  room.make()
  assert room.texts('prose') == {'gate/docs/page.rst': PROSE}


@pytest.mark.parametrize(
  'name, text',
  [
    ('short.py', 'x = 1\n'),
    ('binary.py', CODE + '\0'),
    ('latin.py', '# caf\udce9\n' + CODE),
    ('made.py', '# Generated by a compiler\n' + CODE),
    ('line.py', CODE + 'x = "' + 'word ' * 300 + '"\n'),
    ('table.py', 'x = [\n' + '  1.25, 3.75, 2.50, 8.00,\n' * 50 + ']\n'),
    ('large.py', CODE * 2000),
    ('german.md', 'Das Tor multipliziert die Ausgabe der Schicht mit einem Wert. ' * 9),
    ('names.txt', 'aardvark\nbadger\ncapybara\n' * 30),
    ('broken.json', '{"documentation": ' + PROSE),
  ],
)
def test_data_and_generated_files_are_left_out(room, name, text):
  with zipfile.ZipFile(room.archives / 'area-1.0.whl', 'w') as archive:
    archive.writestr('good.py', CODE)
    archive.writestr(name, text.encode(errors='surrogateescape'))
  room.make()
  assert {*room.texts('code'), *room.texts('prose')} == {'area/good.py'}


def test_documentation_strings_of_json_are_prose_without_tags(room):
  first, *rest = PROSE.strip().split('\n\n')
  fields = [{'description': f'<p>{text}</p>'} for text in rest]
  service = {'documentation': f'<b>{first}</b> &amp; more', 'shapes': fields, 'size': 3}
  wheel(room.archives / 'cloud-1.0.whl', {'cloud/service.json': json.dumps(service)})
  room.make()
  expected = '\n\n'.join([f'{first} & more', *rest]) + '\n'
  assert room.texts('prose') == {'cloud/cloud/service.json': expected}


def test_an_archive_stops_at_its_share(room, monkeypatch):
  monkeypatch.setitem(make_text.SHARES, 'code', 3 * len(CODE))
  files = {f'part_{i}.py': CODE.replace('area', f'a{i:03}') for i in range(9)}
  wheel(room.archives / 'area-1.0.whl', files)
  assert room.make()['domains']['code']['documents'] == 3


def test_a_link_is_skipped(room):
  links = [('gate/b.rst', '/etc/passwd'), ('gate/c.rst', 'a.rst')]
  sdist(room.archives / 'gate-1.0.tar.gz', {'gate/a.rst': PROSE}, links)
  room.make()
  assert [*room.texts('prose')] == ['gate/gate/a.rst']


@pytest.mark.parametrize('name', ['../evil.py', '/evil.py', 'a/../../evil.py', 'a\\b.py'])
def test_a_name_that_leaves_its_archive_is_refused(room, name):
  sdist(room.archives / 'evil-1.0.tar.gz', {name: CODE})
  with pytest.raises(ValueError, match=re.escape(f'{name!r} leaves the archive')):
    room.make()
  assert not room.out.exists()


def test_a_changed_archive_is_refused_before_work_with_the_download(room):
  wheel(room.archives / 'area-1.0.whl', {'a.py': CODE})
  wheel(room.archives / 'gate-1.0.whl', {'b.py': CODE})
  pin(room.folder, room.archives)
  wheel(room.archives / 'gate-1.0.whl', {'b.py': CODE + '\n'})
  with pytest.raises(ValueError, match=r'1 of 2 archives .* changed: gate==1.0. ') as e:
    room.run()
  command = (
    f'pip download --no-deps --require-hashes --dest={room.archives} --only-binary'
  )
  assert command in str(e.value)
  assert not room.out.exists() and not Path(f'{room.out}.partial').exists()


def test_a_list_without_hashes_is_refused(room):
  pin(room.folder, room.archives)
  (room.folder / 'wheels.txt').write_text('area==1.0\n')
  with pytest.raises(ValueError, match=r"wheels.txt:1: 'area==1.0' is no NAME==VERSION"):
    room.run()


def test_a_corpus_that_differs_from_the_committed_manifest_is_refused(room):
  wheel(room.archives / 'area-1.0.whl', {'a.py': CODE})
  manifest = room.make()
  shutil.rmtree(room.out)
  (room.folder / 'manifest.json').write_text(json.dumps(manifest))
  assert room.run() == manifest
  with pytest.raises(ValueError, match=r'--out=.* exists'):
    room.run()
  shutil.rmtree(room.out)
  manifest['domains']['code']['bytes'] += 1
  (room.folder / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='not the same corpus'):
    room.run()
  assert not room.out.exists()


def test_the_corpus_becomes_a_dataset_of_two_domains(room, tmp_path):
  wheel(room.archives / 'area-1.0.whl', {'a.py': CODE, 'b.rst': PROSE})
  room.make()
  options = prepare.Options(
    length=32,
    tokenizer='bytes',
    eos='',
    heldout=0,
    shard_rows=1 << 16,
    seed=0,
    bos=False,
    field='text',
    suffixes=(),
  )
  domains = {domain: [str(room.out / domain)] for domain in make_text.DOMAINS}
  manifest = prepare.run(str(tmp_path / 'dataset'), domains, options, processes=1)
  sizes = {name: part.bytes for name, part in manifest.splits['train'].items()}
  # The first byte of a document is no target.
  assert sizes == {'code': len(CODE) - 1, 'prose': len(PROSE) - 1}


def test_the_committed_lists_and_manifest_agree():
  folder = ROOT / 'experiments/text'
  manifest = json.loads((folder / 'manifest.json').read_text())
  lines = [
    line
    for file in make_text.LISTS
    for line in (folder / file).read_text().splitlines()
    if not line.startswith('--')
  ]
  pins = [make_text.PIN.fullmatch(line) for line in lines]
  assert all(pins)
  listed = [(p['name'], p['version'], p['archive']) for p in manifest['packages']]
  assert [pin.groups() for pin in pins if pin] == listed
  assert len({name for name, _, _ in listed}) == len(listed)
  total = sum(part['bytes'] for part in manifest['domains'].values())
  largest = max(p['code']['bytes'] + p['prose']['bytes'] for p in manifest['packages'])
  assert largest <= 0.15 * total


def test_make_text_downloads_the_wheels_of_the_printed_platform():
  rules = (ROOT / 'Makefile').read_text().replace('\\\n', ' ')
  options = re.search(r'^CP311 := (.*)$', rules, re.MULTILINE)
  assert options and {*options[1].split()} == {*make_text.WHEELS.split()}
