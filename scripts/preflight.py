"""What a recipe would be, before a machine is asked for: its parameters, part by part.

  python scripts/preflight.py --config=configs/table1.py:g1_headwise --count

Prints a table and, as its last line, the same as JSON. Only shapes are computed: no
parameter is ever allocated. `added` is over the baseline that the recipe names, as that
stands in its file. Exit code 2: refused.
"""

import importlib
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import base
from gated import config, metrics, model, plan

REFUSED = 2

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.', lock_config=True)
_COUNT = flags.DEFINE_bool('count', False, 'Count parameters, part by part.')


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
  folder = Path(__file__).resolve().parents[1] / 'configs'
  if name not in {path.stem for path in folder.glob('*.py')}:
    raise ValueError(f'config.paper.baseline={recipe!r}, but {folder} has no {name}.py')
  c = importlib.import_module(f'configs.{name}').get_config(arg).to_dict()
  return model.count(
    model.abstract(config.build(model.Config, c['model'], 'config.model'))
  )


def table(c: dict, counts: dict) -> str:
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


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is told in one line, naming the knob."""
  try:
    config.check_command(argv, config.flatten(base.get_config().to_dict()))
    left = flags.FLAGS(argv)
    if len(left) > 1:
      raise ValueError(f'unknown argument {left[1]!r}')
    if _CONFIG.value is None or not _CONFIG.value.name:
      raise ValueError('--config=configs/RECIPE.py is missing')
    if not _COUNT.value:
      raise ValueError('--count is missing; compiling for a topology is not here yet')
    return left
  except Exception as error:
    print(f'preflight.py: {config.plain(error)}', file=sys.stderr)
    sys.exit(REFUSED)


def main(argv: list[str]) -> int:
  jax.config.update('jax_platforms', 'cpu')  # Shapes need no accelerator.
  c = _CONFIG.value.to_dict()
  try:
    counts = count(c)
  except (ValueError, NotImplementedError) as error:
    print(f'preflight.py: {error}', file=sys.stderr)
    return REFUSED
  print(table(c, counts))
  print(metrics.dumps(counts, indent=None))
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
