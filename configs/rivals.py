"""All remedies for attention sinks beside the gate (claim C25), and rounding (C24).

python scripts/sweep.py run --config=configs/rivals.py:scale=test
python scripts/sweep.py run --config=configs/rivals.py --config.data.mixture=DIR
python scripts/sweep.py run --config=configs/rivals.py:rounding,scale=test
Remedies x learning rates x seeds of Table 2's 28-layer model, one change each. The report
has each remedy's loss, divergence and speed, and with `log.probes` its first-token
attention, sink rate and massive activations. optimizer=muon trains all with Muon, the
optimizer that QK-clip was made for.

'rounding' tests whether the rounding of fused bfloat16 kernels causes divergence (arXiv
2510.04212): float32, bfloat16 with that rounding, and bfloat16 with its bias repaired,
each with and without a gate, all without QK-norm, which hides the effect. It needs the
quadratic reference, so rows of at most 4096 tokens.

The FFN of gated models is narrower by the gate's parameters, as in Table 2; the other
remedies add few parameters.
scale=proxy (the default): 62M parameters, 33M tokens a run; it needs prepared text with a
vocabulary of at most 8192. scale=test: seconds a run.
"""

from configs import axes, base, dense_1b7, lr_sweep, table2

SCALES = {
  'paper': dict(log=dict(probes=5000)),
  'proxy': lr_sweep.SCALES['proxy'] | dict(log=dict(indicators=20, probes=250)),
  'test': dict(
    steps=40,
    optim=dict(warmup=5),
    eval=dict(every=40),
    checkpoint=dict(every=40),
    model=dict(norm_rank=2),  # The default 16 would add 15% to the parameters.
    log=dict(indicators=10, probes=20, tensorboard=False),
  ),
}
# The limits of QK-clip and of the soft cap; test models have logits of about 3.
LIMITS = {'paper': (100.0, 50.0), 'proxy': (100.0, 50.0), 'test': (2.0, 2.0)}
RATES = {'paper': (4e-3, 8e-3), 'proxy': (2e-3, 4e-3, 8e-3), 'test': (1e-2,)}


def _model(**knobs) -> dict:
  return {f'model.{knob.replace("__", ".")}': value for knob, value in knobs.items()}


def remedies(length: int, scale: str) -> dict[str, dict]:
  """Tokens of a row and a scale -> the changed knobs of each remedy."""
  tau, cap = LIMITS[scale]
  # A quarter of a row in every second layer.
  window = _model(attn__window=length // 4, attn__global_layers='every:2')
  sink_logit = _model(attn__normalizer='sink_logit')
  plain = _model(attn__qk_norm=False)
  # gamma = -4 / T, the authors' choice for models of several lengths.
  clipped = _model(attn__normalizer='clipped', attn__clip_gamma=-4.0 / length)
  gate = _model(attn__gate__position='sdpa')
  return {
    'baseline': {},
    'elementwise': gate,
    'headwise': gate | _model(attn__gate__granularity='headwise'),
    'value_state': _model(attn__gate__position='value', attn__gate__source='value'),
    # In the softmax and around it.
    'sink_token': _model(attn__sink_tokens=1),
    'sink_logit': sink_logit,
    'off_by_one': _model(attn__normalizer='off_by_one'),
    'sigmoid': _model(attn__normalizer='sigmoid'),
    'softpick': _model(attn__normalizer='softpick'),
    'clipped': clipped,
    'elastic': _model(attn__normalizer='elastic'),
    'differential': _model(attn__differential=True),
    'sdpa_rmsnorm': _model(attn__output='rms_norm'),
    'v_scale': _model(attn__value_scale='learned'),
    'window': window,
    'window_sink_logit': window | sink_logit,
    # Limits of the logits.
    'no_qk_norm': plain,
    'qk_clip': plain | {'optim.qk_clip': tau},
    'logit_cap': plain | _model(attn__logit_cap=cap),
    # In the residual stream.
    'sandwich': _model(branch_norm='rms'),
    'gated_norm': _model(norm='gated'),
    'pre_affine': _model(norm='pre_affine'),
    'dyt': _model(norm='dyt'),
  }


FLASH = {'model.numerics.compute': 'bfloat16', 'model.attn.rounding': 'flash'}
ROUNDING = {
  'float32': {'model.numerics.compute': 'float32'},
  'flash': FLASH,
  'repaired': FLASH | {'model.attn.rounding': 'repaired'},
}
ARGUMENTS = dict(
  scale=('proxy', 'paper', 'test'),
  optimizer=('adamw', 'muon'),
  seeds=('3', '1', '2', '4', '5'),
)


def get_config(arg: str = ''):
  chosen = base.arguments(arg, 'remedies', 'rounding', **ARGUMENTS)
  c = dense_1b7.at('28l', chosen['scale'])
  c.update(SCALES[chosen['scale']])
  c.optim.name = chosen['optimizer']
  names = ['rivals', chosen[''], chosen['scale']]
  c.name = '-'.join(names + ['muon'] * (chosen['optimizer'] == 'muon'))
  if chosen[''] == 'rounding':
    c.model.attn.qk_norm = False
  return c


def get_grid(arg: str = '') -> list[axes.Point]:
  chosen = base.arguments(arg, 'remedies', 'rounding', **ARGUMENTS)
  c = get_config(arg)
  named = remedies(c.data.length, chosen['scale'])
  for name in ('elementwise', 'headwise'):
    # Narrowed by the gate's parameters, as in Table 2.
    m = c.model.copy_and_resolve_references()
    m.attn.gate.update(base.GATES[name])
    named[name] = named[name] | _model(
      ffn=table2.MATCHES['exact'](m.ffn, table2.surplus(m))
    )
  rates = axes.axis('optim.lr', RATES[chosen['scale']])
  tuned = rates, axes.seeds(int(chosen['seeds']))
  if chosen[''] == 'remedies':
    return axes.product(axes.choice('variant', **named), *tuned)
  gated = {name: named[name] for name in ('baseline', 'elementwise')}
  arithmetic = axes.choice('rounding', **ROUNDING)
  return axes.product(axes.choice('variant', **gated), arithmetic, *tuned)
