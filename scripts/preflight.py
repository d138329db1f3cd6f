"""What a run would need, before a machine is asked for: memory, time, parameters.

  python scripts/preflight.py --config=configs/moe_15b.py --topology=v5p:4x4x4
  python scripts/preflight.py --config=configs/moe_15b.py --topology=h100:64
  python scripts/preflight.py --config=configs/tiny.py --topology=here
  python scripts/preflight.py --config=configs/table1.py:g1_headwise --count

For a slice of TPUs the real train step is compiled, by the TPUs' own compiler and without
one of them: `make tpu` installs it, and .venv/tpu/bin/python then runs this file.
`--slices=2` takes two such slices; `--estimate` leaves the compiler out. For GPUs, or a
number of CPUs, the same table is an estimate by arithmetic, and says so; on the machine
itself `here` compiles. `--suggest` tries meshes, remat policies and
micro-batches by arithmetic, leaving axes that are above 1 as they are, and prints those
that fit, best first. `--count` counts parameters, part by part.

Knobs go as everywhere: --config.mesh.expert=8 --config.accum=16. Recipes at the paper's
scale unroll their layers, which takes long to compile: --config.model.layers=scan does
not. Bytes, FLOPs and traffic are of one chip and one step. Prints a table and, as its
last line, the same as JSON, which --json=FILE keeps.

  python scripts/preflight.py --golden                 all cases of tests/golden/preflight
  python scripts/preflight.py --golden --only=NAME,... those
  python scripts/preflight.py --golden --write         and keeps what is found

compiles the kept cases anew, and tells what has grown by more than a twentieth.

Exit code 1: does not fit, or a kept case is not met. 2: refused.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import config, model, plan
from gated.devices.chips import GIB
from gated.pods import preflight
from gated.pods.preflight import golden, table
from gated.run import metrics

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests/golden/preflight'

# Of what fits, so many ways are printed; the JSON has all.
MOST = 10

NO_FIT, REFUSED = 1, 2

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True)
_COUNT = flags.DEFINE_bool('count', False, 'Count parameters, part by part.')
_TOPOLOGY = flags.DEFINE_string('topology', '', 'CHIP:SHAPE, CHIP:COUNT or here.')
_SLICES = flags.DEFINE_integer('slices', 1, 'So many slices of the topology.')
_ESTIMATE = flags.DEFINE_bool('estimate', False, 'By arithmetic, without a compiler.')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'Meshes and micro-batches that fit.')
_JSON = flags.DEFINE_string('json', '', 'A file to write the report to.')
_GOLDEN = flags.DEFINE_bool('golden', False, 'Compile the kept cases anew.')
_ONLY = flags.DEFINE_list('only', [], 'Of the kept cases, those.')
_WRITE = flags.DEFINE_bool('write', False, 'Keep what is found of the kept cases.')


def count(c: dict) -> dict:
  """A resolved recipe -> its parameters by part, and those over its baseline."""
  cfg = config.build(plan.Config, c, 'config')
  parts = model.parts(cfg.model)
  against = cfg.paper.baseline
  added = parts['total'] - _total(against) if against else None
  printed = None if cfg.paper.added < 0 else round(cfg.paper.added * 1e6)
  flops = model.flops_per_token(cfg.model, cfg.data.length)
  return parts | dict(added=added, paper_added=printed, flops_per_token=flops)


def _total(recipe: str) -> int:
  """'table1.py:baseline,scale=proxy', in configs/ -> its model's parameters."""
  name, _, arg = recipe.partition('.py:')
  folder = ROOT / 'configs'
  if name not in {path.stem for path in folder.glob('*.py')}:
    raise ValueError(f'config.paper.baseline={recipe!r}, but {folder} has no {name}.py')
  c = importlib.import_module(f'configs.{name}').get_config(arg).to_dict()
  return model.count(
    model.abstract(config.build(model.Config, c['model'], 'config.model'))
  )


def counted(c: dict, counts: dict) -> str:
  """The counts -> lines to read."""
  paper, total = c['paper'], counts['total']
  rows = {part: counts[part] for part in ('embedding', 'attention', 'gate', 'experts')}
  rows['all others'] = total - sum(rows.values())
  rows |= {'total': total, 'active': counts['active']}
  lines = [c['name']]
  lines += [f'  {k:12}{v:18,}{v / total:8.2%}' for k, v in rows.items()]
  if counts['added'] is not None:
    printed = counts['paper_added']
    said = 'prints none' if printed is None else f'prints {plan.amount(printed)}'
    lines.append(f'  {"added":12}{counts["added"]:18,}  over {paper["baseline"]}')
    lines.append(f'  {"":12}{"the paper":>18}  {said}')
  lines.append(f'  {"FLOPs/token":12}{counts["flops_per_token"]:18.4g}')
  published = ', '.join(f'{k} {v:g}' for k, v in paper['published'].items())
  lines += [f'  published: {published}'] if published else []
  lines += [f'  assumed: {text}' for text in paper['assumed']]
  return '\n'.join(lines)


def alone() -> None:
  """Before JAX looks for devices: none is taken, and the TPUs' compiler needs none.

  It asks no cloud where it is, and does not mind another of its kind. What it takes for
  the machine that it is on has no bearing on what it compiles for.
  """
  jax.config.update('jax_platforms', 'cpu')
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
  }


def report(c: dict) -> dict:
  """A resolved recipe -> what it would need on the machine that was asked for."""
  machine = preflight.machine(_TOPOLOGY.value, _SLICES.value)
  cfg = config.build(plan.Config, c, 'config')
  if _SUGGEST.value:
    ways = preflight.suggestions(cfg, machine)
    fits = bool(ways) and ways[0]['chips'] == machine.count
    return {'suggestions': ways, 'fits': fits}
  if machine.compiles and not _ESTIMATE.value:
    return preflight.compiled_for(cfg, machine)
  return preflight.by_arithmetic(cfg, machine)


def check_golden(only: list[str], write: bool) -> int:
  """Compiles kept cases, each in a process of its own -> an exit code."""
  paths = {path.stem: path for path in sorted(GOLDEN.glob('*.json'))}
  unknown = set(only) - set(paths)
  if unknown:
    raise ValueError(f'--only={sorted(unknown)[0]}, but cases are {", ".join(paths)}')
  bad = 0
  for name in only or paths:
    case = json.loads(paths[name].read_text())
    with tempfile.TemporaryDirectory() as folder:
      file = Path(folder) / 'report.json'
      command = [sys.executable, __file__, *case['flags'], f'--json={file}']
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      if not file.exists():
        print(f'{name}: exit code {done.returncode}\n{done.stderr[-2000:]}')
        bad += 1
        continue
      new = json.loads(file.read_text())
    if write and 'flops' in new:
      case['found'] = golden.kept(new)
      paths[name].write_text(metrics.dumps(case, indent=2) + '\n')
    faults = golden.faults(case, new)
    bad += bool(faults)
    print(
      '\n'.join([f'{name}: {_short(new)}', *(f'  ! {f}' for f in faults)]), flush=True
    )
  return NO_FIT if bad else 0


def _short(new: dict) -> str:
  gib = new['memory']['total'] / GIB
  if 'flops' not in new:
    return f'{gib:.2f} GiB do not fit'
  return f'{gib:.2f} GiB, {new["spare"]:.1%} to spare, {new["compile_seconds"]:.0f} s'


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is told in one line, naming the knob."""
  try:
    config.check_command(argv, config.flatten(base.get_config().to_dict()))
    left = flags.FLAGS(argv)
    if len(left) > 1:
      raise ValueError(f'unknown argument {left[1]!r}')
    if _GOLDEN.value:
      return left
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing')
    if not _COUNT.value and not _TOPOLOGY.value:
      raise ValueError('--topology=CHIP:SHAPE or --count is missing')
    return left
  except Exception as error:
    print(f'preflight.py: {config.plain(error)}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  if _TOPOLOGY.value != preflight.HERE:
    alone()
  try:
    if _GOLDEN.value:
      return check_golden(_ONLY.value, _WRITE.value)
    c = _CONFIG.value.to_dict()
    if _COUNT.value:
      found = count(c)
      print(counted(c, found))
    else:
      found = report(c)
      ways = found.get('suggestions')
      lines = table.lines(found) if ways is None else table.suggested(ways, MOST)
      print('\n'.join(lines))
  except (ValueError, NotImplementedError) as error:
    print(f'preflight.py: {error}', file=sys.stderr)
    return REFUSED
  text = metrics.dumps(found, indent=None)
  if _JSON.value:
    Path(_JSON.value).write_text(text + '\n')
  print(text)
  return 0 if found.get('fits', True) else NO_FIT


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
