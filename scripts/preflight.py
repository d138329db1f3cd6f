"""The needs of a run on another machine: memory, time, parameters.

  python scripts/preflight.py --config=configs/moe_15b.py --topology=v5p:4x4x4
  python scripts/preflight.py --config=configs/moe_15b.py --topology=h100:64
  python scripts/preflight.py --config=configs/tiny.py --topology=here
  python scripts/preflight.py --config=configs/table1.py:g1_headwise --count

For TPUs, their compiler compiles the real train step, without a TPU (`make tpu` installs
it; run this script with .venv/tpu/bin/python); `here` compiles for the devices of this
machine. For GPUs and CPUs, or with --estimate, the report is an estimate by
arithmetic. --suggest lists the meshes, remat policies and micro-batches that fit by
arithmetic, best first; axes above 1 keep their size.

Recipes at the paper's scale unroll their layers; --config.model.layers=scan compiles
faster. Bytes, FLOPs and traffic are per chip and step. The last line is JSON, which
--json=FILE also writes.

Exit codes: 1 if the recipe does not fit, 2 for a wrong command line.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from configs import base
from gated import config, model, plan, storage
from gated.data.progress import Progress
from gated.plan import command
from gated.pods import preflight
from gated.pods.preflight import table
from gated.run import metrics, terminal
from gated.train import transfer

ROOT = Path(__file__).resolve().parents[1]

# At most this many suggestions are printed; the JSON has all.
MOST = 10

NO_FIT, REFUSED = 1, 2

_CONFIG = command.define_recipe(flags, config_flags)
_COUNT = flags.DEFINE_bool('count', False, 'Count the parameters by part.')
_TOPOLOGY = flags.DEFINE_string('topology', '', 'CHIP:SHAPE, CHIP:COUNT or here.')
_SLICES = flags.DEFINE_integer('slices', 1, 'Number of TPU slices.')
_ESTIMATE = flags.DEFINE_bool('estimate', False, 'Estimate by arithmetic alone.')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'List meshes and micro-batches that fit.')
_JSON = flags.DEFINE_string('json', '', 'A file to write the report to.')


def count(c: dict) -> dict:
  """A resolved recipe -> its parameters by part, and those over its baseline."""
  cfg = config.build(plan.Config, c, 'config')
  parts = model.parts(cfg.model)
  baseline = cfg.paper.baseline
  added = parts['total'] - _total(baseline) if baseline else None
  printed = None if cfg.paper.added < 0 else round(cfg.paper.added * 1e6)
  flops = model.flops_per_token(cfg.model, cfg.data.length)
  named = cfg.model.attn.named
  describe = lambda name: f'{named[name].position} x {len(cfg.model.gated[name])}'
  parts['gates'] = {describe(name): n for name, n in parts['gates'].items()}
  growth = transfer.growth(cfg.optim, cfg.model)
  scaled = {} if growth is None else {'mup': str(growth)}
  return parts | dict(added=added, paper_added=printed, flops_per_token=flops) | scaled


def _total(recipe: str) -> int:
  """'table1.py:baseline,scale=proxy', in configs/ -> its model's parameters."""
  name, _, arg = recipe.partition('.py:')
  if not (ROOT / f'configs/{name}.py').is_file():
    raise ValueError(f'config.paper.baseline={recipe!r}, but configs/ has no {name}.py')
  c = importlib.import_module(f'configs.{name}').get_config(arg).to_dict()
  return model.parts(config.build(model.Config, c['model'], 'config.model'))['total']


def counted(c: dict, counts: dict) -> list[str]:
  """The counts -> lines of text."""
  paper, total = c['paper'], counts['total']
  rows = {part: counts[part] for part in ('embedding', 'attention', 'gate', 'experts')}
  rows['all others'] = total - sum(rows.values())
  rows |= {'total': total, 'active': counts['active']}
  lines = [c['name']]
  for name, size in rows.items():
    lines.append(f'  {name:12}{size:18,}{size / total:8.2%}')
    each = counts['gates'].items() if name == 'gate' else ()
    lines += [f'    {own:10}{n:18,}{n / total:8.2%}' for own, n in each]
  if counts['added'] is not None:
    printed = counts['paper_added']
    text = 'prints none' if printed is None else f'prints {plan.amount(printed)}'
    lines.append(f'  {"added":12}{counts["added"]:18,}  over {paper["baseline"]}')
    lines.append(f'  {"":12}{"the paper":>18}  {text}')
  lines.append(f'  {"FLOPs/token":12}{counts["flops_per_token"]:18.4g}')
  lines += [f'  {"muP":12}{counts["mup"]}'] if 'mup' in counts else []
  published = ', '.join(f'{k} {v:g}' for k, v in paper['published'].items())
  lines += [f'  published: {published}'] if published else []
  return lines + [f'  assumed: {text}' for text in paper['assumed']]


def report(c: dict) -> tuple[dict[str, Any], list[str]]:
  """A resolved recipe -> its report for --topology, and lines of text."""
  machine = preflight.machine(_TOPOLOGY.value, _SLICES.value)
  cfg = config.build(plan.Config, c, 'config')
  if _SUGGEST.value:
    suggestions = preflight.suggestions(cfg, machine)
    fits = bool(suggestions) and suggestions[0]['chips'] == machine.count
    lines = table.suggested(suggestions, MOST)
    return {'suggestions': suggestions, 'fits': fits}, lines
  compiles = machine.compiles and not _ESTIMATE.value
  make = preflight.compiled_for if compiles else preflight.by_arithmetic
  result = make(cfg, machine)
  return result, table.lines(result)


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; exits with one line that names the wrong flag or knob."""
  try:
    command.parse(argv, flags.FLAGS, base, __doc__)
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing')
    if not _COUNT.value and not _TOPOLOGY.value:
      raise ValueError('--topology=CHIP:SHAPE or --count is missing')
    return argv[:1]
  except ValueError as error:
    print(f'preflight.py: {error}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  if _TOPOLOGY.value != preflight.HERE:
    # JAX opens no accelerator, and libtpu does not query the cloud's metadata server.
    jax.config.update('jax_platforms', 'cpu')
    os.environ |= {
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': 'v5p-8',
    }
  try:
    c = _CONFIG.value.to_dict()
    if _COUNT.value:
      result = count(c)
      lines = counted(c, result)
    else:
      with Progress('estimating'):
        result, lines = report(c)
  except (ValueError, NotImplementedError) as error:
    print(f'preflight.py: {error}', file=sys.stderr)
    return REFUSED
  text = metrics.dumps(result, indent=None)
  print('\n'.join([*lines, text]))
  if _JSON.value:
    try:
      storage.write(storage.path(_JSON.value), f'{text}\n'.encode())
    except (ValueError, OSError) as error:
      print(f'preflight.py: --json={_JSON.value}: {error}', file=sys.stderr)
      return REFUSED
  return NO_FIT if result.get('fits') is False else 0


if __name__ == '__main__':
  terminal.steady()
  app.run(main, flags_parser=parse)
