"""Rows of the fault table: odd names of data and outputs, and texts of strangers."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults import process
from faults.process import Done
from faults.world import SMALL, Outcome, Row, Tally, World


class Case(NamedTuple):
  """A command, and how it ends."""

  fault: str
  args: Sequence[Any]
  code: int = 0
  says: str = ''  # A part of stderr, or of stdout for code 0.
  makes: str = ''  # A file that exists afterwards, relative to the current folder.


def _counted(tally: Tally, cases: Sequence[Case], done: Sequence[Done], cwd: Path):
  for case, end in zip(cases, done, strict=True):
    with tally.one(case.fault):
      end.expect(case.code)
      assert 'Traceback' not in end.err, end.tail()
      assert case.says in (end.err if case.code else end.out), end.tail()
      assert not case.makes or (cwd / case.makes).exists(), f'{case.makes} is missing'


def _texts(folder: Path) -> None:
  folder.mkdir(parents=True)
  for i in range(12):
    (folder / f'{i}.txt').write_text(f'document {i} of some words, long enough.\n' * 9)


# 50

LONG = 'x' * 255
ODD = ("it's a {name}; $HOME", 'new\nline', '-x', LONG, 'a[b]*?', 'back\\slash')
ODD += ('quote"d', '\x1b[31mred', 'com,ma', 'col:on', 'eq=ual', 'at@5', '%20', '#hash')
PREPARE = ('scripts/prepare_data.py', '--length=128', '--tokenizer=bytes')
PREPARE += ('--processes=1', '--heldout=0.4')


def _quoted(path: str) -> str:
  """A path in --domain: CSV."""
  return '"' + path.replace('"', '""') + '"' if re.search(r'[,"\n]', path) else path


def _datasets() -> list[Case]:
  cases = []
  for i, name in enumerate(ODD):
    domain = f'--domain=a={_quoted(f"in/{name}")}'
    made = f'sets/{name}/manifest.json'
    cases += [
      Case(f'data in {name:.12}', [*PREPARE, f'--out=of-{i}', domain]),
      Case(
        f'a dataset {name:.12}',
        [*PREPARE, f'--out=sets/{name}', '--domain=a=plain'],
        makes=made,
      ),
    ]
  tilde = [*PREPARE, '--domain=a=~/texts']
  return [
    *cases,
    Case('~ in --domain and --out', [*tilde, '--out=~/set'], makes='home/set'),
    Case('a folder called ~', [*tilde, '--out=./~'], makes='~/manifest.json'),
    Case(
      'trailing slashes',
      [*PREPARE, '--out=slash///', '--domain=a=plain//'],
      makes='slash/manifest.json',
    ),
    Case(
      'symbolic links', [*PREPARE, '--out=link/set', '--domain=a=link'], makes='plain/set'
    ),
    Case(
      '256 bytes in --out',
      [*PREPARE, f'--out=none/{LONG}x', '--domain=a=plain'],
      code=2,
      says='File name too long',
    ),
    Case(
      'an empty --out', [*PREPARE, '--out=', '--domain=a=plain'], code=2, says='--out'
    ),
    Case(
      'a missing ~user', [*PREPARE, '--out=o', '--domain=a=~nobody0/x'], 2, '--domain=a='
    ),
  ]


def odd_data(world: World, times: int) -> Outcome:
  """prepare_data reads and writes a folder of any name, or refuses it."""
  tally, cwd, cases = Tally(), world.path('cwd'), _datasets()[: 9 * times]
  for folder in ('plain', 'home/texts', *(f'in/{name}' for name in ODD)):
    _texts(cwd / folder)
  (cwd / 'link').symlink_to('plain')
  done = world.many(cases_args(cases), cwd=cwd, env={'HOME': str(cwd / 'home')})
  _counted(tally, cases, done, cwd)
  with tally.one('nothing else was made'):
    assert not (cwd / 'none').exists()
    assert sorted(os.listdir(cwd / 'home')) == ['set', 'texts']
  return tally.outcome()


def cases_args(cases: Sequence[Case]) -> list[Sequence[Any]]:
  return [case.args for case in cases]


# 51

CONTROL = '\x1b]0;owned\x07\x1b[2J\x9b31m'
RAW = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')


def dry(*flags: str) -> list[str]:
  knobs = [f'--config.{name}={value}' for name, value in SMALL.items()]
  recipe = process.ROOT / 'configs/tiny.py'
  return ['train.py', f'--config={recipe}', *knobs, '--dry_run', *flags]


def _outputs() -> list[Case]:
  convert, plot = 'scripts/convert_hf.py', 'scripts/plot.py'
  odd, mixture = "it's a {name} [b]*", '--config.data.mixture='
  flags = '--rows=4', '--bigram_rows=16', '--xz_bytes=999'
  return [
    Case('mixture=~/set', dry('--workdir=new', f'{mixture}~/set')),
    Case('a quoted mixture', dry('--workdir=new', f'{mixture}"sets/{odd}"=2')),
    Case('mixture=set///', dry('--workdir=new', f'{mixture}set///')),
    Case('init_from=~/run', dry('--workdir=new', '--config.init_from=~/run')),
    Case('init_from=run//', dry('--workdir=new', '--config.init_from=run//')),
    Case('resume ~/run', dry('--workdir=~/run')),
    Case('resume run///', dry('--workdir=run///')),
    Case('workdir=file/run', dry('--workdir=file/run'), 2, '--workdir=file/run'),
    Case('eval of ~/run', ['eval.py', '--workdir=~/run', *flags], says='nats'),
    Case('eval of run//', ['eval.py', '--workdir=run//', *flags], says='nats'),
    Case('eval of a link', ['eval.py', f'--workdir=links/{odd}', *flags], says='nats'),
    Case('eval of -x', ['eval.py', '--workdir', '-x', *flags], 2, 'eval.py: '),
    Case('convert ~', [convert, '--from=~/run', '--to=~/hf'], makes='home/hf'),
    Case('convert to an odd name', [convert, '--from=run/', f'--to={odd}'], makes=odd),
    Case('convert into a file', [convert, '--from=run', '--to=file/x'], 2, 'file'),
    Case('plot into ~', [plot, '~/run', '--out=~/plots'], makes='home/plots'),
    Case('plot into an odd name', [plot, 'run/', f'--out=p/{odd}'], makes=f'p/{odd}'),
    Case('plot into a file', [plot, 'run', '--out=file'], 2, 'file'),
    Case(
      'preflight writes ~/p.json',
      [
        'scripts/preflight.py',
        f'--config={process.ROOT}/configs/tiny.py',
        '--count',
        '--json=~/p.json',
      ],
      makes='home/p.json',
    ),
    Case(
      'preflight cannot write',
      [
        'scripts/preflight.py',
        f'--config={process.ROOT}/configs/tiny.py',
        '--count',
        '--json=file/p.json',
      ],
      2,
      '--json=file/p.json',
    ),
    Case('no sweep in ~/no', ['scripts/sweep.py', 'status', '~/no'], 2, 'no'),
    Case('replay ~', ['scripts/replay.py', '--workdir=~/run'], 2, 'replay.py: '),
  ]


def odd_outputs(world: World, times: int) -> Outcome:
  """The other programs read and write folders of any name, or refuse them."""
  tally, cwd = Tally(), world.path('cwd')
  cases = _outputs()[: 12 * times]
  home, odd = cwd / 'home', "it's a {name} [b]*"
  _texts(cwd / 'plain')
  (cwd / 'links').mkdir()
  (cwd / 'file').write_text('in the way\n')
  world.finish(cwd / 'run')
  first = [*PREPARE, '--out=set', '--domain=a=plain']
  world.many([first], cwd=cwd)[0].expect(0)
  for copy in (f'sets/{odd}', 'home/set'):
    shutil.copytree(cwd / 'set', cwd / copy)
  for link in (home / 'run', cwd / 'links' / odd):
    link.symlink_to(cwd / 'run')
  done = world.many(cases_args(cases), cwd=cwd, env={'HOME': str(home)})
  _counted(tally, cases, done, cwd)
  with tally.one('no folder is called ~'):
    assert not (cwd / '~').exists()
  return tally.outcome()


# 52


def control_characters(world: World, times: int) -> Outcome:
  """No file of a stranger reaches the terminal with its control characters."""
  tally, cwd = Tally(), world.path('cwd')
  world.finish(cwd / 'run')
  _texts(cwd / f'in{CONTROL}'.replace('/', ''))
  faults = {
    'the reason in outcome.json': _outcome,
    'a line of metrics.jsonl': _metrics,
    'the command in run.json': _command,
  }
  commands = {
    'plot.py': ['scripts/plot.py', 'copy', '--out=plots'],
    'train.py': dry('--workdir=copy'),
    'eval.py': ['eval.py', '--workdir=copy', '--rows=2', '--yardsticks=none'],
    'compare': ['scripts/sweep.py', 'compare', 'run', 'copy'],
  }
  for fault, change in list(faults.items())[:times]:
    shutil.rmtree(cwd / 'copy', ignore_errors=True)
    shutil.copytree(cwd / 'run', cwd / 'copy')
    change(cwd / 'copy')
    done = world.many(list(commands.values()), cwd=cwd)
    for program, end in zip(commands, done, strict=True):
      with tally.one(f'{fault}, {program}'):
        assert end.code in (0, 2, 3), end.tail()
        assert 'Traceback' not in end.err, end.tail()
        assert not RAW.search(end.out + end.err), repr(end.out + end.err)[-300:]
  with tally.one('the name of a text'):
    domain = f'--domain=a=in{CONTROL}/none'
    [end] = world.many([[*PREPARE, '--out=o', domain]], cwd=cwd)
    end.expect(2)
    assert not RAW.search(end.out + end.err), repr(end.err)
  return tally.outcome()


def _outcome(workdir: Path) -> None:
  told = {'code': 7, 'step': 3, 'told': f'full {CONTROL}', 'time': 0.0}
  (workdir / 'outcome.json').write_text(json.dumps(told))


def _metrics(workdir: Path) -> None:
  with (workdir / 'metrics.jsonl').open('ab') as file:
    file.write(f'{{"step": "{CONTROL}"}}\n'.encode())


def _command(workdir: Path) -> None:
  path = workdir / 'run.json'
  with contextlib.suppress(FileNotFoundError):
    run = json.loads(path.read_text())
    run['sessions'][-1]['command'] = [f'train.py {CONTROL}']
    run['config']['name'] = f'tiny{CONTROL}'
    path.write_text(json.dumps(run))


ROWS_D = [
  Row('50', 'odd names of texts and datasets', odd_data, 4, 0),
  Row('51', 'odd names of what the other programs read and write', odd_outputs, 2, 0),
  Row('52', 'control characters in files of strangers', control_characters, 3, 0),
]
