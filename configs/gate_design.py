"""How to build a gate: weight decay, initial value, input width; and G1 + G2 together.

python scripts/sweep.py run --config=configs/gate_design.py:scale=test,seeds=1
python scripts/sweep.py run --config=configs/gate_design.py --config.data.mixture=DIR
python scripts/sweep.py run --config=configs/gate_design.py:positions
Grids of the 28-layer model of Table 2 with a headwise gate (G1), all with the same FFN:
  design     a baseline, and decay x init x inputs. In a large run of Marin, the gates of
             layer 0 closed, and weight decay became the default (marin#8818, #8833). In
             modded-nanogpt, 12 input dims beat 768 (#117).
  positions  a baseline, G1, G2, both, and both with G1 opened late, elementwise.
The report has each variant's loss; `log.probes` adds gate scores and first-token
attention. scale=proxy (the default): 62M parameters, 33M tokens a run, about 2 minutes
each on one H200; it needs prepared text with a vocabulary of at most 8192. scale=test:
seconds a run.
"""

from configs import axes, base, dense_1b7, rivals

ARGUMENTS = dict(scale=('proxy', 'paper', 'test'), seeds=('3', '1', '2', '4', '5'))

# (weight decay of the gate, numbers of inputs).
VALUES = {
  'paper': ((0.0, 0.1), (12, 128)),
  'proxy': ((0.0, 0.1, 1.0), (12, 64)),
  'test': ((0.0, 10.0), (4,)),  # In 40 steps, a decay of 1 has no visible effect.
}
GATE = 'model.attn.gate'
HEADWISE = {f'{GATE}.position': 'sdpa', f'{GATE}.granularity': 'headwise'}
INITS = {
  'half': {},
  'open': {f'{GATE}.bias': True, f'{GATE}.bias_init': 4.0},
  'closed': {f'{GATE}.bias': True, f'{GATE}.bias_init': -4.0},
}


def get_config(arg: str = ''):
  chosen = base.arguments(arg, 'design', 'positions', **ARGUMENTS)
  c = dense_1b7.at('28l', chosen['scale'])
  c.update(rivals.SCALES[chosen['scale']])
  c.name = f'gate-{chosen[""]}-{chosen["scale"]}'
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  chosen = base.arguments(arg, 'design', 'positions', **ARGUMENTS)
  grid = design if chosen[''] == 'design' else positions
  return axes.product(grid(chosen['scale']), axes.seeds(int(chosen['seeds'])))


def design(scale: str) -> list[axes.Point]:
  decays, sizes = VALUES[scale]
  inputs = ['all', *(f'{kind}:{n}' for n in sizes for kind in ('first', 'rank'))]
  gates = axes.product(
    axes.choice('variant', headwise=HEADWISE),
    axes.axis(f'{GATE}.weight_decay', decays, 'decay'),
    axes.choice('init', **INITS),
    axes.axis(f'{GATE}.inputs', inputs),
  )
  return axes.chain(axes.choice('variant', baseline={}), gates)


def positions(scale: str) -> list[axes.Point]:
  steps = get_config(f'scale={scale}').steps
  g1, both = {f'{GATE}.position': 'sdpa'}, {'model.attn.gates': 'sdpa; value'}
  late = f'sdpa opens={steps // 4},{steps // 2}; value'
  return axes.choice(
    'variant',
    baseline={},
    g1=g1,
    g2={f'{GATE}.position': 'value'},
    g1_g2=both,
    g1_late_g2={'model.attn.gates': late},
  )
