"""Made-up results for tests of the ledger."""

import json
import math

from configs import base, dense_1b7
from gated.evidence import ledger
from gated.evidence.arms import ARMS, SIZES
from gated.evidence.claims import CLAIMS
from gated.evidence.result import Result

EVERY = {'made': tuple(claim.name for claim in CLAIMS)}
RATES, DECAYS, SEEDS = (2e-3, 4e-3), (0.1, 0.5), (0, 1, 2)
# What all seeds of a pair have in common, and what an arm has of its own, in nats.
SHARED, OWN = (0.0, 0.02, -0.015), (0.001, -0.001, 0.0)
LAYERS = 18


def recipe(arm='baseline', **knobs):
  """An arm of ARMS and changed knobs, as model__depth=2 -> a resolved recipe."""
  c = json.loads(START)
  for knob, value in ARMS[arm].items():
    knob = f'model.{knob}'
    put(c, knob, value(get(c, knob)) if callable(value) else value)
  for knob, value in knobs.items():
    put(c, knob.replace('__', '.'), value)
  return c


_recipe = dense_1b7.at('28l', 'proxy')
_recipe.data.length = 1024
_recipe.paper.assumed = ()
START = json.dumps(_recipe.to_dict())
DEFAULTS = base.get_config().to_dict()


def get(c, knob):
  for key in knob.split('.'):
    c = c[key]
  return c


def put(c, knob, value):
  *path, last = knob.split('.')
  group = get(c, '.'.join(path)) if path else c
  assert last in group
  group[last] = value


def entry(value, layers=None):
  return {'value': value, 'layers': [value] * LAYERS if layers is None else layers}


def probes(f_attn=0.2, sink=0.3, m_act=2000.0, gate=None, onset=5):
  """The probes of a model with a sink and massive activations from layer `onset` on."""
  jump = [m_act if i >= onset else 1.0 for i in range(LAYERS)]
  first = [2 * f_attn if i > onset else 0.0 for i in range(LAYERS)]
  numbers = {
    'first_token_attention_documents_from_64': entry(f_attn, first),
    'first_token_attention_from_64': entry(f_attn / 10),
    'sink_rate_64': entry(sink),
    'm_act': entry(m_act),
    'm_act_max': entry(m_act),
    'm_act_median': entry(m_act / 500),
    'kurtosis': entry(3 + m_act / 10),
    'points': {'ffn_branch': {'max': entry(m_act, jump)}},
    'gate_mean': entry(gate),
  }
  if gate is not None:
    numbers |= {
      'gate_below_0.1': entry(1 - 2 * gate),
      'gate_histogram': {'value': [9, 1, 1], 'edges': [0.0, 0.05, 0.5, 1.0]},
    }
    for limit in ('1e-2', '1e-3'):
      numbers[f'output_below_{limit}'] = entry(0.4)
      numbers[f'output_below_{limit}_scaled'] = entry(0.3)
  return numbers


def made(arm='baseline', *, lr=4e-3, decay=0.5, seed=0, loss=1.4, knobs=None, **fields):
  """One result; a loss of NaN is a diverged run."""
  config = recipe(arm, **(knobs or {}))
  config['seed'] = seed
  config['optim'] |= {'lr': lr, 'weight_decay': decay}
  finished = math.isfinite(loss)
  known = {
    'experiment': 'made',
    'scale': 'gpu',
    'point': f'{arm}-{lr}-{decay}-{seed}-{sorted((knobs or {}).items())}',
    'labels': {},
    'changes': {},
    'config': config,
    'state': 'finished' if finished else 'diverged',
    'steps': config['steps'],
    'tokens': 1,
    'parameters': 61_000_000,
    'loss': loss,
    'spikes': 0.0,
    'probes': probes() if finished else {},
    'curves': {},
    'data': 'f00d',
    'code': 'c0de',
    'machine': '1 x NVIDIA H200',
    'versions': {},
    'seconds': 1.0,
    'tokens_per_second': 1.0,
    'command': '',
  }
  return Result(**known | fields)


def grid(
  arm='baseline', *, loss=1.4, best=(4e-3, 0.5), penalty=0.05, seeds=SEEDS, **more
):
  """An arm at every rate and decay with seed 0, and with all seeds at its best cell."""
  results = []
  for lr in RATES:
    for decay in DECAYS:
      here = (lr, decay) == best
      for seed in seeds if here else seeds[:1]:
        own = OWN[seed % 3] * (1 if arm == 'baseline' else -1)
        value = loss + (0 if here else penalty) + SHARED[seed % 3] + own
        results.append(made(arm, lr=lr, decay=decay, seed=seed, loss=value, **more))
  return results


def row(name, results, serves=EVERY):
  """Results -> the ledger's row of a claim."""
  return next(r for r in ledger.rows(results, serves) if r.claim.name == name)


__all__ = ['ARMS', 'DEFAULTS', 'SIZES', 'grid', 'made', 'probes', 'recipe', 'row']
