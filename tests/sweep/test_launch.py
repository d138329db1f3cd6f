"""Submissions to schedulers: their files and commands pass the scheduler's own parser."""

import dataclasses
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jsonschema
import pytest
import small
import yaml
from faults import process

from gated import storage, sweep
from gated.sweep import judge, launch
from gated.sweep.launch import (
  desk,
  jobset,
  machines,
  point,
  skypilot,
  slurm,
  targets,
  tpu,
  work,
)

cli = importlib.import_module('scripts.sweep')

ROOT = Path(__file__).resolve().parents[2]
SCHEDULERS = ROOT / 'tests/schedulers'
AWKWARD = 'it\'s $HOME `x` "y" $(z) $$ \\ %a'  # Characters that a shell expands.


def sweep_in(folder, count=2, more=(), sha256='ab' * 32):
  """A sweep of `count` points in `folder`."""
  command = ('train.py', '--config=configs/tiny.py', *more)
  return sweep.Sweep(
    folder=storage.path(folder),
    name='lr_sweep',
    recipe='configs/tiny.py',
    overrides=(),
    flags=(),
    points=tuple(
      sweep.Point(f'lr-{i}-abc123', {}, {}, command, {'steps': 280}) for i in range(count)
    ),
    rule=judge.Rule(multiple=1.5, rise=0.5, tail=0.05),
    made={'sha256': sha256, 'python': '3.11.2'},
  )


NEEDS = {
  'slurm': dict(partition='gpu', accelerator='h100:8'),
  'skypilot': dict(accelerator='h100:8'),
  'jobset': dict(queue='multislice-queue', accelerator='v5p:4x4x4'),
  'tpu': dict(zone='us-east5-a', project='mine', accelerator='v5p:4x4x4'),
}
FOLDERS = {'slurm': '/shared/lr sweep'}


def folder_of(on):
  return FOLDERS.get(on, 'gs://bucket/lr_sweep')


def submission(on, folder='', count=2, more=(), sha256='ab' * 32, **options):
  folder = folder or folder_of(on)
  flags = launch.Options(**{'on': on} | NEEDS[on] | options)
  targets.check(flags, folder)
  whole = sweep_in(folder, count, more, sha256)
  return launch.prepare(launch.Work(whole, whole.points, flags))


def jobs_of(s):
  """A submission -> the names of its jobs."""
  return [s.work.job(p) for p in s.work.points]


VARIANTS = {
  'slurm': [
    dict(),
    dict(folder='s3://bucket/x'),
    dict(accelerator='cpu', nodes=2, processes=2, at_once=3, time='1:00:00'),
  ],
  'skypilot': [
    dict(),
    dict(nodes=4, spot=True, infra='aws/us-east-1', folder='s3://bucket/x'),
    dict(accelerator='v6e:4x4', spot=True),
    dict(accelerator='cpu'),
  ],
  'jobset': [
    dict(),
    dict(accelerator='v6e:2x2', slices=3, spot=True, service_account='writer'),
    dict(accelerator='h100:8', nodes=2),
    dict(accelerator='cpu', image='mine:1', namespace='lab'),
  ],
  'tpu': [dict(), dict(spot=True, slices=2, service_account='a@b.c', runtime='v2-beta')],
}
CASES = [(on, variant) for on, variants in VARIANTS.items() for variant in variants]


# --- The job of each host ---


@pytest.fixture(scope='session')
def shellcheck():
  """Asserts that shellcheck accepts a script."""
  program = shutil.which('shellcheck') or ROOT / '.venv/bin/shellcheck'
  if not Path(program).exists():
    pytest.skip('no shellcheck: pip install -r requirements-dev.txt')

  # Single quotes around a dollar protect a point's arguments from expansion.
  literal = ['--exclude=SC2016']
  # `follow` and `trap` call functions by name.
  literal += ['--exclude=SC2329']

  sound = set()

  def check(*scripts):
    for script in {*scripts} - sound:
      command = [program, '--shell=bash', '--severity=style', *literal, '-']
      done = subprocess.run(command, input=script, capture_output=True, text=True)
      assert done.returncode == 0, done.stdout
      # Without it, a script would continue after a failed download.
      assert 'set -euo pipefail' in script
      sound.add(script)

  return check


def shell(s):
  """A submission -> its shell scripts."""
  for name, text in s.files.items():
    if name.endswith('.yaml'):
      task = yaml.safe_load(text)
      yield task['run'] if 'run' in task else expanded(container(task)['command'][2])
    else:
      yield text


@pytest.mark.slow
@pytest.mark.parametrize(('on', 'variant'), CASES)
def test_shellcheck_accepts_every_script(on, variant, shellcheck):
  shellcheck(*shell(submission(on, more=(f'--x={AWKWARD}',), **variant)))


def test_shellcheck_reports_an_unquoted_variable(shellcheck):
  with pytest.raises(AssertionError, match='SC2086'):
    shellcheck(submission('slurm').files['sweep.sbatch'] + '\ncat $code\n')


def arguments(s, on):
  """The arguments of job.sh on the first host, as bash expands them."""
  # A script that prints its arguments replaces the job.
  show = r'printf "%s\0" "$@"; exit 2'
  if on == 'jobset':
    command = container(yaml.safe_load(next(iter(s.files.values()))))['command']
    return [expanded(word) for word in command[4:]]
  text = next(shell(s))
  text = text.replace(work.embedded(), f"job='{show}'\n")
  text = text.replace('follow srun', 'srun()  { shift 4; "$@"; }\nfollow srun')
  text = re.sub(r'log=.*\n', "log=''\n", text)
  env = {'PATH': os.environ['PATH'], 'HOME': '/home/me'}
  env |= {'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '0'}
  done = subprocess.run(['bash', '-c', text], capture_output=True, text=True, env=env)
  return done.stdout.split('\0')[:-1]


@pytest.mark.parametrize('on', launch.TARGETS)
def test_each_host_gets_the_command_and_the_path_of_its_sources(on):
  more = (f'--config.name={AWKWARD}',)
  s = submission(on, more=more)
  words = arguments(s, on)
  code = (
    '/home/me/gated/code.tar.gz' if on == 'skypilot' else f'{folder_of(on)}/code.tar.gz'
  )
  first = s.work.points[0]
  command = [*s.work.swept.command(first)]
  assert words[words.index('--') + 1 :] == command and more[0] in words
  kind = '-cuda' if NEEDS[on]['accelerator'].startswith('h100') else '-tpu'
  requirements = f'requirements.lock,requirements{kind}.lock'
  requirements += '' if on == 'slurm' else ',requirements-cloud.lock'
  processes = 'one' if on in ('slurm', 'skypilot') else 'auto'
  assert set(words[: words.index('--')]) == {
    f'--code={code}',
    f'--sha256={"ab" * 32}',
    f'--requirements={requirements}',
    '--python=3.11',
    f'--workdir={s.work.swept.workdir(first)}',
    f'--processes={processes}',
  }


SOURCES = {
  name: (ROOT / 'gated' / name).read_text()
  for name in (
    'config.py',
    'storage.py',
    'run/lock.py',
    'run/exit_codes.py',
    'run/terminal.py',
    'run/outcome.py',
    'sweep/launch/point.py',
  )
} | {f'{folder}__init__.py': '' for folder in ('', 'run/', 'sweep/', 'sweep/launch/')}


def archived(folder, body):
  """Writes FOLDER/code.tar.gz with `body` as train.py -> its path and digest."""
  sources = folder / 'sources'
  shutil.rmtree(sources, ignore_errors=True)
  texts = {f'gated/{name}': text for name, text in SOURCES.items()}
  texts |= {'train.py': body, 'requirements.lock': '# Nothing.\n'}
  for name, text in texts.items():
    (sources / name).parent.mkdir(parents=True, exist_ok=True)
    (sources / name).write_text(text)
  archive = folder / 'code.tar.gz'
  with tarfile.open(archive, 'w:gz') as tar:
    for path in sorted(sources.iterdir()):
      tar.add(path, path.name)
  return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.fixture
def host(tmp_path):
  """A function that starts job.sh on a host, with `body` as the sweep's train.py."""

  def run(body, *flags, env=None, workdir=None):
    archive, sha256 = archived(tmp_path, body)
    workdir = workdir or tmp_path / 'workdir'
    words = [
      f'--code={archive}',
      f'--sha256={sha256}',
      '--requirements=requirements.lock',
    ]
    words += [f'--python={sys.version_info[0]}.{sys.version_info[1]}']
    words += [f'--workdir={workdir}', f'--cache={tmp_path / "cache"}', '--processes=one']
    if not any(flag.startswith('--interpreter') for flag in flags):
      words += [f'--interpreter={sys.executable}']
    words += [flag for flag in flags if flag != '--interpreter=']
    command = ['bash', '-c', work.JOB, 'job', *words, '--', 'train.py', '--config=a b']
    keep = {k: os.environ[k] for k in ('PATH', 'HOME') if k in os.environ}
    opts = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=keep | (env or {}), **opts)

  return run


def ended(child):
  out, _ = child.communicate(timeout=60)
  return child.returncode, out


@pytest.mark.parametrize(('code', 'expected'), [(3, 0), (4, 4), (7, 7)])
def test_job_returns_the_exit_code_of_the_point_and_0_after_divergence(
  host, code, expected
):
  got, out = ended(host(f'import sys; print(sys.argv[1:]); sys.exit({code})'))
  assert got == expected, out
  assert "['--config=a b']" in out


@pytest.mark.parametrize('code', [3])
def test_an_ended_point_does_not_run_again(host, code, tmp_path):
  (tmp_path / 'workdir').mkdir()
  (tmp_path / 'workdir/outcome.json').write_text(json.dumps({'code': code, 'step': 9}))
  got, out = ended(host('raise SystemExit(5)'))
  assert (got, 'has ended: nothing to do' in out) == (0, True), out


def test_an_unreadable_workdir_stops_the_job(host, tmp_path):
  (tmp_path / 'workdir').mkdir()
  (tmp_path / 'workdir/outcome.json').write_text('{')
  got, out = ended(host('print("ran")'))
  assert got == 1 and 'outcome.json is damaged' in out and 'ran' not in out.splitlines()


def test_sources_with_another_digest_are_refused(host):
  got, out = ended(host('print("ran")', f'--sha256={"0" * 64}'))
  assert got == 2 and 'differs from the submitted sources' in out and 'ran' not in out


def test_failed_downloads_are_tried_three_times(host, tmp_path):
  """gcloud first fails twice, then always."""
  gcloud = tmp_path / 'bin/gcloud'
  gcloud.parent.mkdir()
  gcloud.write_text(
    f'#!/bin/sh\necho x >>{tmp_path}/tries\n'
    f'test "$(grep -c x {tmp_path}/tries)" -gt 2 && cp {tmp_path}/code.tar.gz "$5"\n'
  )
  gcloud.chmod(0o755)
  env = {'PATH': f'{gcloud.parent}:{os.environ["PATH"]}', 'GATED_JOB_PAUSE': '0.01'}
  job = 'print("ran")', '--code=gs://bucket/code.tar.gz'
  got, out = ended(host(*job, env=env))
  assert (got, out.count('retrying'), 'ran' in out) == (0, 2, True), out
  shutil.rmtree(tmp_path / 'cache')
  gcloud.write_text('#!/bin/sh\nexit 1\n')
  got, out = ended(host(*job, env=env))
  assert (got, out.count('retrying'), 'ran' in out) == (1, 2, False), out


def test_sigterm_reaches_the_point_and_job_returns_its_exit_code(host, tmp_path):
  child = host(
    'import pathlib, signal, sys, time\n'
    'signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(4)))\n'
    f'pathlib.Path({str(tmp_path / "up")!r}).touch()\n'
    'while True: time.sleep(0.05)'
  )
  end = time.monotonic() + 30
  while not (tmp_path / 'up').exists():
    assert time.monotonic() < end and child.poll() is None
    time.sleep(0.01)
  child.terminate()
  child.send_signal(15)
  assert ended(child) == (4, '')


def test_job_waits_for_the_lock_of_a_dead_run(host, tmp_path):
  """train.py exits with 2 until the lock is gone."""
  held = tmp_path / 'workdir/lock.json'
  held.parent.mkdir()
  held.write_text('{}')
  body = (
    'import pathlib, sys\n'
    f'held = pathlib.Path({str(held)!r}); tries = held.with_name("tries")\n'
    'tries.write_text(tries.read_text() + "x" if tries.exists() else "x")\n'
    'if len(tries.read_text()) == 3: held.unlink(); sys.exit(0)\n'
    'sys.exit(2)'
  )
  got, out = ended(host(body, env={'GATED_JOB_PAUSE': '0.01'}))
  assert (got, held.with_name('tries').read_text()) == (0, 'xxx'), out


def test_skypilot_hosts_use_the_first_host_as_coordinator(host):
  env = {'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2'}
  env['SKYPILOT_NODE_RANK'] = '1'
  got, out = ended(
    host('import sys; print(*sys.argv[2:])', '--processes=skypilot', env=env)
  )
  flags = '--coordinator=10.0.0.1:8476 --processes=2 --process=1\n'
  assert (got, out) == (0, f'--start_timeout=1800 {flags}')


@pytest.mark.full
def test_a_host_installs_the_requirements_once(host, tmp_path, monkeypatch):
  body = 'import sys; print(sys.prefix)'
  monkeypatch.setitem(
    SOURCES, 'sweep/launch/point.py', 'print("due")'
  )  # The real one needs packages.
  _, first = ended(host(body, '--interpreter='))
  _, second = ended(host(body, '--interpreter='))
  assert first == second and str(tmp_path / 'cache/env-') in first
  mark = next((tmp_path / 'cache').glob('env-*/made'))
  mark.unlink()  # As after a killed installation.
  assert ended(host(body, '--interpreter='))[1] == first
  assert mark.exists()


def test_a_damaged_outcome_is_an_error(tmp_path):
  assert point.state(storage.path(tmp_path)) == 'due'
  (tmp_path / 'outcome.json').write_text('{"code": 4, "step": 1}')
  assert point.state(storage.path(tmp_path)) == 'due'
  (tmp_path / 'outcome.json').write_text('{"code"')
  with pytest.raises(ValueError):
    point.state(storage.path(tmp_path))


# --- The format of each scheduler ---


def container(task):
  pods = task['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  return pods['containers'][0]


def expanded(text):
  """A word of a command after Kubernetes has expanded it.

  k8s.io/kubernetes third_party/forked/golang/expansion: $$ becomes $, $(NAME) a variable.
  """
  out, i = '', 0
  while i < len(text):
    two = text[i : i + 2]
    if two == '$$':
      out, i = out + '$', i + 2
    elif two == '$(' and ')' in text[i:]:
      raise AssertionError(f'Kubernetes variable: {text[i : i + 20]}')
    else:
      out, i = out + text[i], i + 1
  return out


@pytest.mark.parametrize(
  'text', [AWKWARD, '$$$(a)$$', '$', 'a$b$', '$$$', '$(', work.JOB]
)
def test_kubernetes_does_not_change_an_escaped_command(text):
  assert expanded(jobset.escaped(text)) == text


JOBSET = json.loads((SCHEDULERS / 'jobset.json').read_text())
jsonschema.Draft202012Validator.check_schema(JOBSET)


def check_jobset(text):
  jsonschema.Draft202012Validator(JOBSET).validate(yaml.safe_load(text))


@pytest.mark.parametrize('variant', VARIANTS['jobset'])
def test_jobsets_fit_the_published_schema(variant):
  for text in submission('jobset', **variant).files.values():
    check_jobset(text)


@pytest.mark.parametrize(
  ('right', 'wrong'),
  [
    ('replicatedJobs', 'replicatedJob'),
    ('maxRestarts', 'maxRestart'),
    ('backoffLimit', 'backOffLimit'),
    ('completionMode: Indexed', 'completionMode: indexed'),
    ('nodeSelector', 'nodeSelectors'),
    ('onExitCodes', 'onExitCode'),
    ('google.com/tpu: 4', 'google.com/tpu: four'),
    ('kueue.x-k8s.io/queue-name', 'kueue.x-k8s.io/queue'),
    ('v1alpha2', 'v1alpha1'),
  ],
)
def test_the_schema_refuses_a_jobset_with_a_typo(right, wrong):
  text = next(iter(submission('jobset').files.values()))
  assert right in text
  with pytest.raises(jsonschema.ValidationError):
    check_jobset(text.replace(right, wrong))


def test_a_jobset_requests_the_slice_and_its_hosts():
  s = submission('jobset', slices=2, spot=True)
  manifest = yaml.safe_load(s.files[f'{jobs_of(s)[1]}.yaml'])
  pods = manifest['spec']['replicatedJobs'][0]
  job = pods['template']['spec']
  assert (pods['replicas'], job['parallelism'], job['completions']) == (2, 16, 16)
  spec = job['template']['spec']
  assert spec['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '4x4x4',
    'cloud.google.com/gke-spot': 'true',
  }
  assert container(manifest)['resources'] == {'limits': {'google.com/tpu': 4}}
  assert manifest['metadata']['labels']['gated-sweep'] == s.work.label


def test_a_jobset_with_gpus_sets_the_variables_that_locate_its_processes():
  """docs/clusters.md lists these variables."""
  s = submission('jobset', accelerator='h100:8', nodes=2)
  manifest = yaml.safe_load(next(iter(s.files.values())))
  env = {e['name']: e for e in container(manifest)['env']}
  assert {*jobset.VARIABLES, 'PROCESSES_IN_JOB'} < env.keys()
  assert env['PROCESSES_IN_JOB']['value'] == '2'
  page = (ROOT / 'docs/clusters.md').read_text()
  for name in jobset.VARIABLES:
    assert env[name]['valueFrom']['fieldRef']['fieldPath'] in page


def check_gcloud(command):
  """Asserts that the documented flags of gcloud allow a command."""
  table = json.loads((SCHEDULERS / 'gcloud.json').read_text())
  assert command[:4] == ['gcloud', 'compute', 'tpus', 'queued-resources']
  verb, words = command[4], command[5:]
  flags = dict(word[2:].partition('=')[::2] for word in words if word.startswith('--'))
  plain = [word for word in words if not word.startswith('--')]
  assert len(plain) == table['positional'][verb], plain
  allowed = table[verb] | table['wide']
  for name, value in flags.items():
    assert name in allowed, f'--{name}'
    assert bool(value) == (allowed[name] == 'value'), f'--{name}={value}'
  for group in table['required'][verb]:
    assert len(flags.keys() & set(group)) == 1, group
  for name, other in table['together'].items():
    assert name not in flags or other in flags, name
  for name in [*plain, flags.get('node-id', 'a'), flags.get('node-prefix', 'a')]:
    assert re.fullmatch(r'[a-z]([-a-z0-9]{0,61}[a-z0-9])?', name), name


def record_of(s, outputs=()):
  pairs = zip(jobs_of(s), s.work.points, strict=True)
  jobs = [{'job': job, 'point': p.name} for job, p in pairs]
  options = s.work.options.changed()
  names = {'on': s.work.options.on, 'label': s.work.label}
  return names | {'jobs': jobs, 'told': list(outputs), 'options': options}


@pytest.mark.parametrize('variant', VARIANTS['tpu'])
def test_commands_use_documented_flags_of_gcloud(variant):
  s = submission('tpu', **variant)
  record = record_of(s)
  states = {jobs_of(s)[0]: 'SUSPENDED'}
  renewed = tpu.renew(s.work, states)
  assert [c[4] for c in renewed] == ['delete', 'create', 'create']
  for command in [*s.commands, *tpu.delete(record), tpu.listing(record), *renewed]:
    check_gcloud(command)


@pytest.mark.parametrize(
  ('right', 'wrong'),
  [
    ('--zone', '--zones'),
    ('--accelerator-type', '--accelerator'),
    ('--metadata-from-file', '--metadata-from-files'),
    ('--node-id', '--node-name'),
    ('--async', '--async=yes'),
  ],
)
def test_a_gcloud_flag_with_a_typo_is_refused(right, wrong):
  command = submission('tpu').commands[0]
  assert any(right in word for word in command)
  with pytest.raises(AssertionError):
    check_gcloud([word.replace(right, wrong) for word in command])


@pytest.mark.full
def test_the_linter_of_gcloud_accepts_the_commands(tmp_path):
  """The linter needs no account and no network."""
  if not shutil.which('gcloud'):
    pytest.skip('no gcloud here')
  commands = []
  for variant in VARIANTS['tpu']:
    s = submission('tpu', **variant)
    commands += [s.commands[0], tpu.delete(record_of(s))[0], tpu.listing(record_of(s))]
  wrong = [word.replace('--node', '--nodes') for word in commands[0]]
  path = tmp_path / 'commands.json'
  lines = list(dict.fromkeys(map(shlex.join, [*commands, wrong])))
  path.write_text(json.dumps([{'command_string': line} for line in lines]))
  lint = ['gcloud', 'meta', 'lint-gcloud-commands', f'--commands-file={path}']
  env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path)}
  env |= {'CLOUDSDK_CONFIG': str(tmp_path), 'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1'}
  done = subprocess.run(lint, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  *right, typo = json.loads(done.stdout)
  assert [result['error_message'] for result in right if not result['success']] == []
  assert len(right) == len(lines) - 1 and not typo['success']


def test_accelerator_types_count_cores_or_chips():
  type_of = lambda spec: machines.accelerator(spec).type
  assert type_of('v5p:4x4x4') == 'v5p-128' and type_of('v4:2x2x1') == 'v4-8'
  assert type_of('v5e:4x4') == 'v5litepod-16' and type_of('v6e:2x2') == 'v6e-4'
  hosts = lambda spec: machines.accelerator(spec).hosts
  assert (hosts('v5e:2x4'), hosts('v5e:4x4'), hosts('v6e:2x2')) == (1, 4, 1)
  assert (hosts('v5p:2x2x1'), hosts('v4:4x4x4')) == (1, 16)


def test_a_preempted_slice_is_created_again_unless_its_point_has_ended():
  s = submission('tpu', count=4)
  jobs = jobs_of(s)
  states = {jobs[0]: 'ACTIVE', jobs[1]: 'SUSPENDED', jobs[2]: 'WAITING_FOR_RESOURCES'}
  listing = json.dumps(
    [{'name': f'projects/p/q/{k}', 'state': {'state': v}} for k, v in states.items()]
    + [{'name': 'projects/p/q/another', 'state': {'state': 'SUSPENDED'}}]
  )
  called = []

  def call(command):
    called.append(command)
    return listing if command[4] == 'list' else ''

  due = s.work._replace(points=s.work.points[:3])
  assert launch.renew(due, record_of(s), call) == [jobs[1]]
  assert [command[4:6] for command in called[1:]] == [
    ['delete', jobs[1]],
    ['create', jobs[1]],
  ]


# --- SkyPilot ---


@pytest.fixture(scope='session')
def sky(tmp_path_factory):
  """A function that returns tasks and commands as SkyPilot parses them."""
  python = Path(os.environ.get('GATED_SKY_PYTHON') or ROOT / '.venv/sky/bin/python')
  if not python.exists():
    pytest.skip(f'{python} is missing: run `make sky` or set GATED_SKY_PYTHON')
  env = process.environment(tmp_path_factory.mktemp('xla'), 1)
  # SkyPilot writes to the home directory and reports its use.
  env |= {'HOME': str(tmp_path_factory.mktemp('home')), 'PYTHONPATH': ''}
  env |= {'SKYPILOT_DISABLE_USAGE_COLLECTION': '1', 'NO_COLOR': '1'}

  def ask(tasks=(), commands=()):
    request = json.dumps({'tasks': list(tasks), 'commands': list(commands)})
    command = [str(python), str(SCHEDULERS / 'sky_tasks.py')]
    done = subprocess.run(command, input=request, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    return answer['tasks'], answer['commands']

  return ask


@pytest.mark.full
def test_skypilot_parses_tasks_and_commands_without_change(sky):
  submissions = [submission('skypilot', **variant) for variant in VARIANTS['skypilot']]
  texts = [text for s in submissions for text in s.files.values()]
  tasks = [yaml.safe_load(text) for text in texts]
  commands = [
    c[2:] for s in submissions for c in [*s.commands, *skypilot.delete(record_of(s))]
  ]
  commands.append(skypilot.listing({})[2:])
  parsed, words = sky(texts, commands)
  for got, task in zip(parsed, tasks):
    for name in ('name', 'num_nodes', 'run', 'file_mounts'):
      assert got[name] == task[name]
    resources = task['resources']
    assert got['resources'].get('use_spot', False) == resources['use_spot']
    assert got['resources']['labels'] == resources['labels']
    recovery = dict(got['resources']['job_recovery'])
    assert recovery.pop('strategy', None) is None  # The default.
    assert recovery == resources['job_recovery']
    name, _, count = resources.get('accelerators', '').partition(':')
    cards = {name: int(count or 1)} if name else None
    assert got['resources'].get('accelerators') == cards
    assert got['resources'].get('infra', '') == resources.get('infra', '')
  assert all(word['yes'] for word in words[:-1]) and words[-1]['output_format'] == 'json'
  assert words[0]['name'] == tasks[0]['name'] and words[0]['detach_run']

  text = texts[1]
  typos = {
    'num_nodes': 'num_node',
    'accelerators': 'accelerator',
    'use_spot': 'use_spots',
    'file_mounts': 'file_mount',
    'max_restarts_on_errors': 'max_restart_on_errors',
  }
  wrong = [text.replace(f'{a}:', f'{b}:') for a, b in typos.items()]
  assert text not in wrong
  flags = [['launch', '--detached', 'a.yaml'], ['cancel', '--yes', '--names=a']]
  parsed, words = sky(wrong, flags)
  assert all('error' in got for got in [*parsed, *words]), (parsed, words)


def test_the_states_of_skypilot_jobs_are_read():
  s = submission('skypilot')
  first, second = jobs_of(s)
  rows = [
    (second, 'RUNNING'),
    (first, 'RECOVERING'),
    ('other', 'RUNNING'),
    (first, 'FAILED'),
  ]
  queue = json.dumps([{'job_name': a, 'status': b} for a, b in rows], indent=2)
  states = skypilot.states(record_of(s), f'Fetching managed jobs...\n{queue}\n')
  assert states == {second: 'RUNNING', first: 'RECOVERING'}


def test_the_states_of_jobsets_are_read():
  s = submission('jobset')
  first, second = jobs_of(s)
  items = [
    {'metadata': {'name': first}, 'status': {'terminalState': 'Failed', 'restarts': 2}},
    {
      'metadata': {'name': second},
      'status': {'conditions': [{'type': 'Suspended', 'status': 'True'}]},
    },
    {'metadata': {'name': 'c'}},
  ]
  states = jobset.states(record_of(s), json.dumps({'items': items}))
  assert states == {
    first: 'Failed, restarted 2 times',
    second: 'Suspended',
    'c': 'Running',
  }


# --- Refused before the first job ---


@pytest.mark.parametrize(
  ('options', 'folder', 'message'),
  [
    (dict(on='pbs'), '/a', "--on='pbs', but allowed are slurm, skypilot, jobset, tpu"),
    (dict(on='slurm'), '/a', '--on=slurm needs --accelerator=..., --partition=...'),
    (dict(on='tpu', accelerator='v5p:2x2x1'), 'gs://b/a', '--zone=..., --project=...'),
    (dict(on='jobset', accelerator='cpu'), 'gs://b/a', 'needs --queue=...'),
    (
      dict(on='skypilot', accelerator='cpu'),
      '/a',
      '--dir=/a with --on=skypilot: its machines',
    ),
    (dict(NEEDS['tpu'], on='tpu'), 's3://b/a', 'give a bucket, gs://BUCKET/PATH'),
    (
      dict(NEEDS['slurm'], on='slurm', zone='a'),
      '/a',
      '--zone=a with --on=slurm, but it',
    ),
    (dict(NEEDS['slurm'], on='slurm', sbatch=('-C x',)), '/a', "--sbatch='-C x' must be"),
    (dict(NEEDS['slurm'], on='slurm', nodes=0), '/a', '--nodes=0 must be positive'),
    (dict(NEEDS['slurm'], on='slurm', restarts=-1), '/a', '--restarts=-1 must not'),
    (
      dict(NEEDS['slurm'], on='slurm', accelerator='h100'),
      '/a',
      "'h100', but allowed are",
    ),
    (dict(NEEDS['slurm'], on='slurm', accelerator='x:8'), '/a', "'x:8', but allowed are"),
    (
      dict(NEEDS['slurm'], on='slurm', accelerator='v5p:3x3'),
      '/a',
      'is not an available slice',
    ),
    (
      dict(NEEDS['jobset'], on='jobset', nodes=2),
      'gs://b/a',
      'several slices are --slices',
    ),
    (
      dict(NEEDS['jobset'], on='jobset', accelerator='cpu', slices=2),
      'gs://b/a',
      '--slices=2 is for TPUs',
    ),
  ],
)
def test_invalid_options_are_refused(options, folder, message):
  with pytest.raises(ValueError) as refused:
    targets.check(launch.Options(**options), folder)
  assert message in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
  ('on', 'accelerator', 'message'),
  [
    ('slurm', 'v5p:2x2x1', 'with --on=slurm, but allowed are cpu and GPUs'),
    ('tpu', 'h100:8', 'with --on=tpu, but allowed are v4, v5e'),
    ('jobset', 'gh200:1', 'gh200 has no known name on GKE'),
    ('skypilot', 'h100-nvl:4', 'h100-nvl has no known name on SkyPilot'),
  ],
)
def test_an_accelerator_that_a_scheduler_lacks_is_refused(on, accelerator, message):
  with pytest.raises(ValueError, match=message):
    submission(on, accelerator=accelerator)


@pytest.mark.parametrize('on', launch.TARGETS)
def test_a_missing_scheduler_is_refused_with_instructions(on, monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  target = launch.TARGETS[on]
  with pytest.raises(ValueError) as refused:
    targets.check_installed(on)
  assert target.command in str(refused.value) and target.install in str(refused.value)


@pytest.mark.parametrize(
  ('on', 'knobs', 'message'),
  [
    (
      'jobset',
      dict(init_from='/runs/a:3'),
      'config.init_from: /runs/a:3 is a local folder',
    ),
    (
      'tpu',
      dict(data__mixture='/shared/code,gs://b/books'),
      '/shared/code is a local folder',
    ),
    (
      'tpu',
      dict(data__mixture='gs://b/books,/shared/code'),
      '/shared/code is a local folder',
    ),
    ('slurm', dict(data__mixture='/shared/books=7,s3://b/code'), ''),
    ('jobset', dict(data__mixture='gs://b/books', init_from='gs://b/a:latest'), ''),
    ('skypilot', dict(), ''),
  ],
)
def test_data_that_no_job_can_read_is_refused(on, knobs, message):
  try:
    targets.check_reachable(small.recipe(**knobs), on)
    error = ''
  except ValueError as refusal:
    error = str(refusal)
  assert message in error and bool(message) == bool(error)


def test_a_read_only_folder_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match='cannot be written from here'):
    targets.check_writable(str(tmp_path / 'file/below'))
  targets.check_writable(str(tmp_path / 'new'))
  assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.full
def test_the_write_check_leaves_a_bucket_unchanged(remote):
  targets.check_writable(f'{remote}/sweep')
  assert storage.names(f'{remote}/sweep') == []
  with pytest.raises(ValueError, match='cannot be written from here'):
    targets.check_writable('s3://no-such-bucket-of-ours/sweep')


# --- Submitted, listed, deleted ---


def test_accepted_jobs_are_recorded_and_only_they_are_deleted(tmp_path):
  folder = str(tmp_path / 'sweep')
  s = submission('slurm', folder=folder)
  called = []

  def call(command):
    called.append(command)
    return '4711;cluster\n' if command[0] == 'sbatch' else ''

  record = launch.submit(s, call)
  script = Path(called[0][-1])
  assert script.read_text() == s.files['sweep.sbatch']
  assert script.parent == tmp_path / 'sweep/launch'
  assert launch.read(folder) == record
  with pytest.raises(ValueError, match=r'is already submitted \(2 jobs, --on=slurm\)'):
    launch.submit(s, call)
  assert launch.delete(folder, record, call) == []
  assert called[1:] == [['scancel', '--me', f'--name={record["label"]}', '4711']]
  with pytest.raises(ValueError, match='is not submitted'):
    launch.read(folder)


def test_jobs_accepted_before_a_refusal_stay_recorded(remote):
  folder = f'{remote}/sweep'
  s = submission('skypilot', folder=folder, count=3)
  called = []

  def call(command):
    called.append(command)
    if len(called) == 3:
      raise ValueError('sky jobs launch failed: quota')
    return ''

  with pytest.raises(ValueError, match='quota'):
    launch.submit(s, call)
  record = launch.read(folder)
  assert [job['job'] for job in record['jobs']] == jobs_of(s)[:2]
  assert storage.names(f'{folder}/launch') == sorted(s.files)
  del called[:]
  assert launch.delete(folder, record, lambda command: called.append(command) or '') == []
  assert [command[-1] for command in called] == [
    f'--name={job}' for job in jobs_of(s)[:2]
  ]


@pytest.mark.parametrize('on', ['slurm', 'tpu'])
def test_jobs_of_an_interrupted_submission_can_be_deleted(on, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  s = submission(on)
  moved = dataclasses.replace(s.work.swept, folder=storage.path(tmp_path))
  s = s._replace(work=s.work._replace(swept=moved))
  called = []

  def killed(command):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    launch.submit(s, killed)
  record = launch.read(tmp_path)
  assert launch.delete(tmp_path, record, lambda c: called.append(c) or '') == []
  names = {'slurm': f'--name={record["label"]}', 'tpu': record['jobs'][0]['job']}
  assert [names[on] in command for command in called] == [True]


def test_jobs_that_cannot_be_deleted_are_reported_and_stay_recorded(tmp_path):
  folder = str(tmp_path)
  s = submission('slurm', folder=folder)
  record = launch.submit(s, lambda command: '4711')

  def gone(command):
    raise ValueError('scancel 4711 failed: Invalid job id specified')

  def down(command):
    raise ValueError('scancel 4711 failed: Unable to contact slurm controller')

  assert 'Unable to contact' in launch.delete(folder, record, down)[0]
  assert launch.read(folder) == record
  assert launch.delete(folder, record, gone) == []
  assert not (tmp_path / 'launched.json').exists()


def test_two_sweeps_with_the_same_name_have_different_labels():
  assert launch.label('/a/lr_sweep') != launch.label('/b/lr_sweep')
  for folder in ('/a/lr_sweep', 'gs://b/LR Sweep, 2026!/', '/1/2', '/x' * 99):
    assert re.fullmatch(r'[a-z][a-z0-9-]*-[0-9a-f]{7}', launch.label(folder))
    assert len(launch.label(folder)) <= 32


def test_the_error_of_a_failed_command_contains_its_message():
  with pytest.raises(ValueError, match=r'sh -c .* failed: no such partition'):
    launch.call(['sh', '-c', 'echo no such partition >&2; exit 1'])


# --- SLURM's commands, by stand-ins ---


def wait(condition, message, seconds=240, pause=0.05):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, message()
    time.sleep(pause)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """Puts the stand-ins of tests/schedulers first in PATH."""
  monkeypatch.setenv(
    'PATH', f'{SCHEDULERS}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
  )
  monkeypatch.setenv('SLURM_STANDIN', str(tmp_path / 'slurm'))
  env = process.environment(tmp_path / 'xla', 1)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  yield tmp_path / 'slurm'
  for job in (tmp_path / 'slurm').glob('[0-9]*'):  # Left by a failed test.
    launch.call(['scancel', job.name])


def test_sbatch_refuses_an_option_with_a_typo(cluster, tmp_path):
  script = tmp_path / 'a.sbatch'
  text = submission('slurm', folder=str(tmp_path)).files['sweep.sbatch']
  assert '#SBATCH --ntasks-per-node=1' in text
  script.write_text(text.replace('--ntasks-per-node', '--tasks-per-nod'))
  with pytest.raises(ValueError, match='unrecognized arguments: --tasks-per-nod'):
    launch.call(['sbatch', '--parsable', str(script)])


LEAVES = """
import pathlib, signal, sys, time
workdir = next(pathlib.Path(a[10:]) for a in sys.argv if a.startswith('--workdir='))
workdir.mkdir(parents=True, exist_ok=True)

def leave(*_):
  time.sleep(0.3)
  (workdir / 'stopped').touch()
  sys.exit(4)

if (workdir / 'stopped').exists():
  sys.exit(0)
signal.signal(signal.SIGTERM, leave)
(workdir / 'up').touch()
while True:
  time.sleep(0.02)
"""


def begun(tmp_path, body, **options):
  """Submits a point with `body` as train.py to SLURM -> the record, the workdir."""
  folder = tmp_path / 'a sweep'
  folder.mkdir()
  _, sha256 = archived(folder, body)
  cache = str(tmp_path / 'cache')
  local = dict(accelerator='cpu', interpreter=sys.executable, cache=cache) | options
  s = submission('slurm', folder=str(folder), count=1, sha256=sha256, **local)
  return launch.submit(s), Path(s.work.swept.workdir(s.work.points[0]))


def at_the_end(cluster, record):
  """Waits for the end of the only task -> its state."""
  log = lambda: '\n'.join(path.read_text() for path in cluster.parent.rglob('*.log'))
  wait(lambda: not launch.states(record), log, 30, pause=0.2)
  return json.loads((cluster / record['told'][0] / '0.json').read_text())


@pytest.mark.full
def test_a_task_at_its_time_limit_saves_and_is_requeued(cluster, tmp_path):
  record, workdir = begun(tmp_path, LEAVES)
  wait((workdir / 'up').exists, lambda: 'it did not start', 30)
  # SLURM sends this signal because of --signal=B:USR1@120.
  launch.call(['scancel', '--signal=USR1', '--batch', f'{record["told"][0]}_0'])
  task = at_the_end(cluster, record)
  assert (workdir / 'stopped').exists()
  assert (task['state'], task['restarts']) == ('COMPLETED', 1)


@pytest.mark.full
def test_a_deleted_task_saves_and_is_not_requeued(cluster, tmp_path):
  """Its exit code says that it could resume."""
  record, workdir = begun(tmp_path, LEAVES)
  wait((workdir / 'up').exists, lambda: 'it did not start', 30)
  assert launch.delete(workdir.parents[1], record) == []
  task = at_the_end(cluster, record)
  assert (workdir / 'stopped').exists()
  assert (task['state'], task['restarts'], task['code']) == ('CANCELLED', 0, 4)


@pytest.mark.full
def test_a_failed_process_ends_the_processes_that_wait_for_it(
  cluster, tmp_path, monkeypatch
):
  monkeypatch.setattr(slurm, 'PATIENCE', 0.3)
  body = 'import os, time\nif os.environ["SLURM_PROCID"] == "0": raise SystemExit(7)\n'
  record, _ = begun(tmp_path, f'{body}time.sleep(600)', processes=2, restarts=1)
  task = at_the_end(cluster, record)
  assert (task['state'], task['restarts'], task['code']) == ('FAILED', 1, 137)


# --- The commands ---

SWEEP = ('--config=configs/tiny.py', '--axis=optim.lr=1e-3,4e-3')


def call(capsys, *argv):
  """Runs `sweep.py ARGV` -> exit code, output."""
  code = cli.main([str(word) for word in argv])
  output = capsys.readouterr()
  return code, output.out + output.err


FLAGS = {
  on: [f'--{name}={value}' for name, value in {'on': on, **needs}.items()]
  for on, needs in NEEDS.items()
}


def test_a_dry_run_prints_files_and_commands_and_changes_nothing(
  tmp_path, monkeypatch, capsys
):
  def touched(*args, **opts):
    raise AssertionError(f'touched: {args} {opts}')

  for place, name in ((storage, 'write'), (launch.subprocess, 'run')):
    monkeypatch.setattr(place, name, touched)
  folder = tmp_path / 'sweep'
  argv = ['submit', *SWEEP, f'--dir={folder}', *FLAGS['slurm'], '--dry_run']
  code, out = call(capsys, *argv)
  assert code == 0 and list(tmp_path.iterdir()) == []
  assert '#SBATCH --array=0-1\n' in out and '#SBATCH --gpus-per-node=8\n' in out
  assert out.count('--config.optim.lr=0.004') == 1
  assert out.endswith(f'\n\nsbatch --parsable {folder}/launch/sweep.sbatch\n')


@pytest.mark.slow
@pytest.mark.parametrize('on', ['skypilot', 'jobset', 'tpu'])
def test_a_dry_run_for_a_cloud_prints_a_command_for_each_point(
  on, gs, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  folder = f'{gs}/{tmp_path.name}'
  argv = ['submit', *SWEEP, f'--dir={folder}', *FLAGS[on], '--dry_run', '--only=lr=0.004']
  code, out = call(capsys, *argv)
  commands = [
    line for line in out.splitlines() if line.startswith(launch.TARGETS[on].command)
  ]
  assert code == 0 and len(commands) == 1, out
  assert '--config.optim.lr=0.004' in out and f'--workdir={folder}/points/lr0.004' in out
  assert list(tmp_path.iterdir()) == [] and storage.names(folder) == []


def test_a_dry_run_needs_no_bucket(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

  def down(*args):
    raise OSError('gs://bucket/lr: no network')

  monkeypatch.setattr(sweep, 'state', down)
  argv = ['submit', *SWEEP, '--dir=gs://bucket/lr', *FLAGS['tpu']]
  code, out = call(capsys, *argv, '--dry_run')
  assert code == 0 and out.count('\ngcloud compute') == 2
  assert 'gs://bucket/lr cannot be read from here, so every point is shown' in out
  for name in ('check_installed', 'check_writable'):
    monkeypatch.setattr(targets, name, lambda *_: None)
  monkeypatch.setattr(sweep, 'write', lambda swept: swept)
  monkeypatch.setattr(storage, 'exists', lambda path: False)
  code, out = call(capsys, *argv)
  assert (code, out) == (2, 'sweep.py: gs://bucket/lr: no network\n')


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--on=slurm'], '--on=slurm needs --accelerator=..., --partition=...'),
    ([*FLAGS['slurm'], '--queue=a'], '--queue=a with --on=slurm, but it is for jobset'),
    ([*FLAGS['slurm'], '--watch=9'], '--watch=9.0 needs --on=tpu'),
    ([*FLAGS['jobset']], 'give a bucket'),
    ([*FLAGS['slurm'], '--only=lr=1'], '--only=lr=1, but lr has the values'),
    ([*FLAGS['slurm']], 'needs sbatch, which is not installed: run this'),
  ],
)
def test_an_impossible_submission_is_refused_in_one_line(
  argv, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('PATH', '/nowhere')
  code, out = call(capsys, 'submit', *SWEEP, f'--dir={tmp_path / "sweep"}', *argv)
  assert code == 2 and message in out and out.count('\n') == 1
  assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_submission_cannot_be_listed_or_deleted(tmp_path, capsys):
  argv = ['submit', *SWEEP, f'--dir={tmp_path / "sweep"}']
  swept = sweep.write(cli.planned(*cli.parser().parse_known_args(argv)))
  for verb in desk.COMMANDS:
    code, out = call(capsys, verb, swept.folder)
    assert code == 2 and 'is not submitted: launched.json is missing' in out


GCLOUD = """#!/bin/sh
printf '%s ' "$@" >>"$STAND/calls"
echo >>"$STAND/calls"
case "$*" in
  *" list "*) test -e "$STAND/down" && exit 1; cat "$STAND/states" ;;
esac
"""


@pytest.mark.full
def test_lost_slices_are_created_again_until_all_points_have_ended(
  gs, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'gcloud').write_text(GCLOUD)
  (tmp_path / 'gcloud').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  monkeypatch.setenv('STAND', str(tmp_path))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  folder = f'{gs}/{tmp_path.name}'
  argv = ['submit', *SWEEP, f'--dir={folder}', *FLAGS['tpu'], '--spot']

  def calls():
    words = [line.split()[3:5] for line in (tmp_path / 'calls').read_text().splitlines()]
    (tmp_path / 'calls').unlink()
    return [word if word[0] != 'list' else ['list'] for word in words]

  code, out = call(capsys, *argv)
  assert code == 0 and 'submitted 2 jobs to tpu' in out, out
  one, two = (job['job'] for job in launch.read(folder)['jobs'])
  assert calls() == [['create', one], ['create', two]]

  states = {one: 'SUSPENDED', two: 'SUSPENDED', 'another': 'SUSPENDED'}
  rows = [{'name': f'p/q/{k}', 'state': {'state': v}} for k, v in states.items()]
  (tmp_path / 'states').write_text(json.dumps(rows))
  swept = sweep.open(folder)
  ends = lambda p: storage.write(
    swept.workdir(p) / 'outcome.json',
    json.dumps({'code': 0, 'step': 280, 'told': '', 'time': 0.0}).encode(),
  )
  ends(swept.points[1])
  code, out = call(capsys, *argv)
  assert code == 0 and f'1 points have not ended; created again: {one}\n' in out, out
  assert calls() == [['list'], ['delete', one], ['create', one]]
  code, out = call(capsys, *argv, '--project=other')
  assert code == 2 and 'give the same options' in out

  # The network fails, then the last point ends.
  (tmp_path / 'down').touch()
  waits = []
  monkeypatch.setattr(
    desk.time,
    'sleep',
    lambda seconds: (waits.append(seconds), len(waits) == 2 and ends(swept.points[0])),
  )
  code, out = call(capsys, *argv, '--watch=9')
  assert (code, waits) == (0, [9, 9]), out
  assert (
    out.count('trying again in 9.0 s: gcloud') == 2 and 'all points have ended' in out
  )
  calls()
  (tmp_path / 'down').unlink()
  code, out = call(capsys, 'list', folder)
  assert code == 0 and out.count('SUSPENDED') == 2 and out.count('280/280') == 2
  code, out = call(capsys, 'delete', folder)
  assert calls() == [['list'], ['delete', one], ['delete', two]]
  assert code == 0 and 'deleted: 2 jobs' in out


# A model with steps of milliseconds, for two processes with one device each.
SMALL = (
  *('--config.model.width=32', '--config.model.depth=1', '--config.model.ffn=64'),
  *('--config.model.attn.heads=2', '--config.model.attn.kv_heads=1'),
  *('--config.model.attn.head_dim=16', '--config.data.length=64', '--config.batch=2'),
  *('--config.optim.warmup=2', '--config.eval.rows=2', '--config.eval.every=1000'),
  *('--config.checkpoint.every=1000', '--config.log.tensorboard=False'),
)


@pytest.mark.full
def test_a_sweep_runs_under_slurm_with_two_processes_each_and_survives_preemption(
  cluster, tmp_path, capsys
):
  """Two points run one after the other; the first is preempted and resumes."""
  folder, steps = tmp_path / 'a sweep', 100
  argv = ['submit', '--config=configs/tiny.py', *SMALL, f'--dir={folder}', '--on=slurm']
  argv += ['--seeds=2', f'--config.steps={steps}', '--accelerator=cpu']
  argv += ['--processes=2', '--at_once=1', '--partition=all']
  argv += [f'--interpreter={sys.executable}', f'--cache={tmp_path / "cache"}']
  code, out = call(capsys, *argv)
  assert code == 0 and 'submitted 2 jobs to slurm' in out, out
  swept, record = sweep.open(folder), launch.read(folder)
  number = record['told'][0]
  logs = lambda: '\n'.join(
    log.read_text()[-3000:] for p in swept.points if (log := Path(swept.log(p))).exists()
  )
  try:
    # run.json exists just before the first step.
    wait(Path(swept.workdir(swept.points[0]), 'run.json').exists, logs)
    code, out = call(capsys, 'list', folder)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[2] for row in rows] == ['RUNNING', 'PENDING'], out
    launch.call(['scancel', '--signal=USR1', '--batch', f'{number}_0'])
    # Each check starts a process, which slows the tasks.
    wait(lambda: not launch.states(record), logs, pause=1)
  finally:
    code, out = call(capsys, 'delete', folder)
    assert code == 0, out

  assert not (folder / 'launched.json').exists()
  for i, p in enumerate(swept.points):
    workdir = Path(swept.workdir(p))
    task = json.loads((cluster / number / f'{i}.json').read_text())
    assert (task['state'], task['restarts']) == ('COMPLETED', int(i == 0)), logs()
    assert sweep.state(swept.workdir(p), steps)[:2] == ('finished', steps)
    sessions = json.loads((workdir / 'run.json').read_text())['sessions']
    assert [session['processes'] for session in sessions] == [2] * (1 + task['restarts'])
    rows = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = {row['step']: row['loss'] for row in rows if row['kind'] == 'train'}
    assert list(losses) == list(range(1, steps + 1))
    command = sessions[0]['command'][1:]
    assert command == [
      *swept.command(p)[1:],
      '--start_timeout=1800',
      '--coordinator=auto',
    ]
    if i == 0:
      assert 0 < sessions[1]['restored_step'] < steps
  # All points have ended.
  code, out = call(capsys, *argv)
  assert code == 2 and 'nothing to submit, all points have ended' in out
