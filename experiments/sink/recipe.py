"""Which conditions give an ungated model of 61M parameters an attention sink?

python scripts/campaign.py --minutes=25 --text=DIR sink
python scripts/campaign.py --minutes=3 --scale=test sink
Conditions x arms x seeds. The baseline of each condition is trained first, with one seed.
Once one has a sink, the gated arms are trained under its condition, the search stops, and
the baseline and the elementwise gate get more seeds.
scale=gpu: 655M tokens a run, about 18 minutes on one H200. scale=test: seconds on a CPU.
"""

from collections.abc import Iterable

from configs import axes, base, dense_1b7, rows, table2

CLAIMS = ('C8', 'C9', 'C10', 'C13', 'C15')
BUDGET = {'gpu': 8_000_000_000, 'test': 1_000_000}

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

# The arms that get more seeds. The baseline's first seed was probed only in training, so
# it has a further one.
SEEDS = {'baseline': (1, 2, 3), 'elementwise': (1, 2)}
# Conditions that are cells of one setting: they differ in learning rate and weight decay.
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
  points = [
    axes.Point({'condition': name, 'arm': arm}, CONDITIONS[name] | _arm(name, arm, scale))
    for arm in ARMS
    for name in TRIED[scale]
  ]
  # The first seed has no label.
  seeds = [(p, seed) for p in points for seed in SEEDS.get(p.labels['arm'], ())]
  return points + [
    axes.Point(p.labels | {'seed': str(seed)}, p.changes | {'seed': seed})
    for p, seed in (seeds if scale == 'gpu' else ())
  ]


def choose(points, results) -> list[str]:
  """The baselines until one has a sink; then the gated arms there, then more seeds.

  If its condition is one of CELLS, the arms of SEEDS run in all of these first, and get
  more seeds in their best one; the elementwise gate also gets them in the baseline's.
  """
  baselines = [r for r in results if r.labels['arm'] == 'baseline' and has_sink(r)]
  first = [p for p in points if 'seed' not in p.labels]
  if not baselines:
    return [p.name for p in first if p.labels['arm'] == 'baseline']
  sink = max(baselines, key=lambda r: r.probe('sink_rate_64')).labels['condition']
  cells = CELLS if sink in CELLS else (sink,)
  names = [p.name for p in first if p.labels['condition'] == sink]
  best: set[str] = set()
  for arm in SEEDS:
    names += [p.name for p in first if _is(p, arm, cells)]
    ended = [r for r in results if _is(r, arm, cells) and 'seed' not in r.labels]
    stable = [r for r in ended if r.finished]
    if stable and len(ended) == len(cells):
      best.add(min(stable, key=lambda r: r.loss).labels['condition'])
      names += [p.name for p in points if _is(p, arm, best)]
  return [*dict.fromkeys(names)]


def _is(labelled, arm: str, conditions: Iterable[str]) -> bool:
  """Whether a point or a result is of an arm under one of the conditions."""
  return labelled.labels['arm'] == arm and labelled.labels['condition'] in conditions


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
