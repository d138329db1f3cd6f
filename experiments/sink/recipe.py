"""Which conditions give an ungated model of 61M parameters an attention sink?

python scripts/campaign.py --minutes=25 --text=DIR sink
python scripts/campaign.py --minutes=3 --scale=test sink
Conditions x arms x seeds. The baseline of each condition is trained first, with one seed.
Once one has a sink, the gated arms are trained under its condition, the search stops, and
the baseline and the elementwise gate get more seeds there.
scale=gpu: 655M tokens a run, about 18 minutes on one H200. scale=test: seconds on a CPU.
"""

import itertools

from configs import axes, base, dense_1b7, rows, table2

CLAIMS = ('C8', 'C9', 'C10', 'C13', 'C15')
BUDGET = {'gpu': 7_500_000_000, 'test': 1_000_000}

SCALES = {
  'gpu': dict(
    steps=10_000,
    batch=64,
    model=dict(vocab=8192, layers='unroll'),
    optim=dict(warmup=200, floor=3e-5),
    data=dict(length=1024),
    eval=dict(every=1000, rows=256),
    checkpoint=dict(every=2500, keep=1),
    log=dict(every=10, probes=1000, indicators=0, tensorboard=False),
  ),
  'test': dict(
    steps=20,
    data=dict(length=128),  # Sink64 needs rows of 64 tokens
    checkpoint=dict(every=20, keep=1),
    log=dict(probes=10, tensorboard=False),
  ),
}

# Knobs that the pilot runs and Gu et al. (arXiv 2410.10781) found to matter, by name. The
# first ones are tried first.
CONDITIONS = {
  'decay0.5-lr8e-3': {'optim.weight_decay': 0.5, 'optim.lr': 8e-3},
  'decay0.5-no_qk_norm': {'optim.weight_decay': 0.5, 'model.attn.qk_norm': False},
  'decay1': {'optim.weight_decay': 1.0},
  'decay0.5-lr8e-3-unmasked': {
    'optim.weight_decay': 0.5,
    'optim.lr': 8e-3,
    'model.mask_documents': False,
  },
  'decay0.5-lr8e-3-no_qk_norm-unmasked': {
    'optim.weight_decay': 0.5,
    'optim.lr': 8e-3,
    'model.attn.qk_norm': False,
    'model.mask_documents': False,
  },
  'decay1-lr8e-3': {'optim.weight_decay': 1.0, 'optim.lr': 8e-3},
  'decay0.3-lr1.6e-2': {'optim.weight_decay': 0.3, 'optim.lr': 1.6e-2},
  'decay0.5-lr8e-3-deep': {
    'optim.weight_decay': 0.5,
    'optim.lr': 8e-3,
    'model.depth': 30,
    'model.width': 384,
    'model.ffn': 1152,
  },
}
TRIED = {'gpu': tuple(CONDITIONS), 'test': tuple(CONDITIONS)[:2]}

ARMS = {name: table2.CHANGES[name] for name in ('baseline', 'elementwise', 'headwise')}

SEEDS = {'gpu': (0, 1, 2), 'test': (0,)}
# The arms that get more seeds, and the conditions that are cells of one setting: they
# differ only in learning rate and weight decay.
FIRST = 'baseline', 'elementwise'
CELLS = 'decay1', 'decay0.5-lr8e-3'

# A sink: at least this Sink64 (Gu et al., k = 0, epsilon 0.3), and this mean attention
# to the first token of a document by queries from position 64 on.
SINK = {'gpu': (0.15, 0.05), 'test': (0.0, 0.0)}


def get_config(arg: str = ''):
  scale = _scale(arg)
  c = dense_1b7.at('28l', 'proxy' if scale == 'gpu' else 'test')
  c.update(SCALES[scale])
  c.name = f'sink-{scale}'
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  scale = _scale(arg)
  points = []
  for seed, arm, name in itertools.product(SEEDS[scale], ARMS, TRIED[scale]):
    labels = {'condition': name, 'arm': arm}
    changes = CONDITIONS[name] | _arm(name, arm, scale)
    if seed:  # The names of earlier results have no seed.
      labels['seed'], changes['seed'] = str(seed), seed
    points.append(axes.Point(labels, changes))
  return points


def choose(points, results) -> list[str]:
  """The baselines until one has a sink; then the gated arms and more seeds there.

  If its condition is one of CELLS, the FIRST arms also run in the others of them.
  """
  baselines = [r for r in results if r.labels['arm'] == 'baseline' and has_sink(r)]
  if not baselines:
    search = [p for p in points if 'seed' not in p.labels]
    return [p.name for p in search if p.labels['arm'] == 'baseline']
  best = max(baselines, key=lambda r: r.probe('sink_rate_64')).labels['condition']

  def wanted(point) -> bool:
    arm, condition = point.labels['arm'], point.labels['condition']
    if condition == best:
      return arm in FIRST or 'seed' not in point.labels
    same_setting = {best, condition} <= {*CELLS}
    return same_setting and arm in FIRST and 'seed' not in point.labels

  chosen = sorted(filter(wanted, points), key=lambda p: p.labels['condition'] != best)
  return [p.name for p in chosen]


def has_sink(result) -> bool:
  """Whether a result meets both conditions of SINK."""
  rate, attention = SINK[result.scale]
  return result.finished and (
    result.probe('sink_rate_64') >= rate and first_token_attention(result) >= attention
  )


def first_token_attention(result) -> float:
  """F-Attn of queries from 64 on: of each document's first token if they are masked."""
  masked = result.config['model']['mask_documents']
  name = 'first_token_attention_documents' if masked else 'first_token_attention'
  return result.probe(f'{name}_from_64')


def _arm(condition: str, arm: str, scale: str) -> dict:
  """An arm under a condition -> its changed knobs; the FFN is narrowed to match."""
  c = get_config(f'scale={scale}')
  for knob, value in CONDITIONS[condition].items():
    if knob.startswith('model.'):
      c.update_from_flattened_dict({knob: value})
  narrow = table2.MATCHES['128' if scale == 'gpu' else 'exact']
  rows.change(c, ARMS[arm])
  ffn = narrow(c.model.ffn, table2.surplus(c.model))
  changes = {f'model.{knob}': value for knob, value in ARMS[arm].items()}
  return changes | ({'model.ffn': ffn} if ffn != c.model.ffn else {})


def _scale(arg: str) -> str:
  return base.arguments(arg, scale=tuple(SCALES))['scale']
