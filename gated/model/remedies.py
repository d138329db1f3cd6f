"""The remedies for attention sinks inside a layer: their names, and their conflicts."""

from typing import Any

from gated import config, kernels

_NAME = 'config.model.attn'

# Normalizers that run the softmax kernel; they differ in the extra denominator terms.
OVER_SOFTMAX = ('softmax', 'off_by_one', 'sink_logit')
NORMALIZERS = (*OVER_SOFTMAX, *(n for n in kernels.NORMALIZERS if n != 'softmax'))

# Applied to each head's output, before its gate (Table 3).
OUTPUTS = ('none', 'rms_norm', 'silu')

# V-scale (arXiv 2603.17771) of the values, before their gate: the kinds of its constant.
VALUE_SCALES = ('none', 'fixed', 'learned')

_SOFTMAX = f'allowed are normalizer={", ".join(map(repr, OVER_SOFTMAX))}'

# (knobs, whether they exclude each other, the reason and what is allowed).
CONFLICTS = (
  (
    'sink_tokens normalizer',
    lambda c: c.sink_tokens and c.normalizer not in OVER_SOFTMAX,
    f'sink tokens need a softmax: {_SOFTMAX}',
  ),
  (
    'output normalizer sink_tokens',
    lambda c: c.output == 'rms_norm' and c.has_sinks and not c.has_sink_values,
    "the norm cancels sinks without values: allowed are output='none' and 'silu'",
  ),
  (
    'normalizer clip_gamma clip_zeta',
    lambda c: c.normalizer == 'clipped' and (c.clip_gamma, c.clip_zeta) == (0, 1),
    'this is the softmax itself: a clip_gamma below 0 or a clip_zeta above 1 is expected',
  ),
  (
    'normalizer_layers normalizer',
    lambda c: c.normalizer_layers and c.normalizer == 'softmax',
    'all layers have the softmax already',
  ),
  (
    'normalizer_layers sink_tokens',
    lambda c: c.normalizer_layers and c.sink_tokens,
    'sink tokens are in all layers',
  ),
  (
    'global_layers window',
    lambda c: c.global_layers and not c.window,
    'without a window all layers see the whole row',
  ),
  (
    'rounding normalizer',
    lambda c: c.rounding != 'backend' and c.normalizer not in OVER_SOFTMAX,
    f'only the softmax has this knob: {_SOFTMAX}',
  ),
  (
    'rounding backend',
    lambda c: c.rounding != 'backend' and c.backend not in ('auto', 'reference'),
    "only the reference has this knob: allowed are backend='auto' and 'reference'",
  ),
  (
    'differential normalizer sink_tokens',
    lambda c: c.differential and (c.normalizer != 'softmax' or c.sink_tokens),
    "both of its maps are plain softmaxes: allowed are normalizer='softmax' and "
    'sink_tokens=0',
  ),
  (
    'differential output',
    lambda c: c.differential and c.output != 'none',
    "differential attention has its own norm: allowed is output='none'",
  ),
)


def check(cfg: Any) -> None:
  """Raises ValueError if an attention.Config's remedies cancel or exclude each other."""
  config.one_of(f'{_NAME}.normalizer', cfg.normalizer, NORMALIZERS)
  config.one_of(f'{_NAME}.sink_values', cfg.sink_values, ('learned', 'zero'))
  config.one_of(f'{_NAME}.output', cfg.output, OUTPUTS)
  config.one_of(f'{_NAME}.value_scale', cfg.value_scale, VALUE_SCALES)
  config.one_of(f'{_NAME}.rounding', cfg.rounding, ('backend', *kernels.ROUNDINGS))
  for name, low, high in (
    ('sink_tokens', 0, 1 << 16),
    ('logit_cap', 0.0, 1e9),
    ('window', 0, 1 << 30),
    ('clip_gamma', -1.0, 0.0),
    ('clip_zeta', 1.0, 2.0),
    ('elastic_tau', -1e3, 1e3),
  ):
    config.within(f'{_NAME}.{name}', getattr(cfg, name), low, high)
  for name in ('heads', 'kv_heads') if cfg.differential else ():
    config.divides(f'{_NAME}.{name}', getattr(cfg, name), 'the maps of differential', 2)
  for knobs, excluded, reason in CONFLICTS:
    if excluded(cfg):
      pairs = (f'{_NAME}.{knob}={getattr(cfg, knob)!r}' for knob in knobs.split())
      raise ValueError(f'{" with ".join(pairs)}, but {reason}')
