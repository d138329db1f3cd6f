"""Adds a gate to a trained baseline, in several ways: claim C21.

python train.py --config=configs/table2.py:28l_4e-3_baseline,scale=test --workdir=/RUN
python scripts/sweep.py run --config=configs/retrofit.py:scale=test,seeds=1 \\
  --config.init_from=/RUN
python scripts/sweep.py run --config=configs/retrofit.py --config.init_from=DIR \\
  --config.model_from=DIR --config.data.mixture=TEXT     (DIR: a Hugging Face folder)
Trains the baseline further: ways to add a gate x seeds. The model is Table 2's of 28
layers at this scale; weights of another shape need their knobs
(--config.model.width=...). The authors saw no gain from a gate that was added late
(appendix A.7, qiuzh20/gated_attention#10). Steps count from the start of this run.
scale=proxy (the default): 33M tokens a run; scale=test: seconds a run.
"""

from configs import axes, base, dense_1b7, rivals

ARGUMENTS = dict(
  scale=('proxy', 'paper', 'test'),
  gate=('elementwise', 'headwise'),
  seeds=('3', '1', '2', '4', '5'),
)


def get_config(arg: str = ''):
  chosen = base.arguments(arg, **ARGUMENTS)
  c = dense_1b7.at('28l', chosen['scale'])
  c.update(rivals.SCALES[chosen['scale']])
  c.name = f'retrofit-{chosen["gate"]}-{chosen["scale"]}'
  c.init_from = 'BASELINE'  # Refused: --config.init_from must name a folder.
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  chosen = base.arguments(arg, **ARGUMENTS)
  steps = get_config(arg).steps
  knobs = lambda **gate: {f'model.attn.gate.{k}': v for k, v in gate.items()}
  gate = knobs(**base.GATES[chosen['gate']])
  # 2 sigmoid(0) = 1: the first step is that of the baseline.
  zero = gate | knobs(activation='2sigmoid', init='zero')
  ways = axes.choice(
    'way',
    continued={},
    zero=zero,
    random=gate,
    open=gate | knobs(bias=True, bias_init=4.0),
    staged=gate | knobs(opens=(steps // 10, steps // 2)),
    gates_first=zero | {'optim.gates_first': steps // 10},
    rate_10=zero | knobs(lr=10.0),
  )
  return axes.product(ways, axes.seeds(int(chosen['seeds'])))
