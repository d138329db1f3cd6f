"""The remedies for attention sinks inside a layer: their names, and what they exclude."""

from typing import Any

from gated import config, kernels

_NAME = 'config.model.attn'

# Normalizers that run the softmax kernel; they differ in the extra denominator terms.
OVER_SOFTMAX = ('softmax', 'off_by_one', 'sink_logit')
NORMALIZERS = (*OVER_SOFTMAX, *(n for n in kernels.NORMALIZERS if n != 'softmax'))

# Applied to each head's output, before its gate (Table 3).
OUTPUTS = ('none', 'rms_norm', 'silu')


def check(cfg: Any) -> None:
  """Raises ValueError if an attention.Config's remedies cancel or exclude each other."""
  config.one_of(f'{_NAME}.normalizer', cfg.normalizer, NORMALIZERS)
  config.one_of(f'{_NAME}.sink_values', cfg.sink_values, ('learned', 'zero'))
  config.one_of(f'{_NAME}.output', cfg.output, OUTPUTS)
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
  _check_sinks(cfg)
  _check_weights(cfg)
  if cfg.differential:
    _check_differential(cfg)


def _check_sinks(cfg: Any) -> None:
  if cfg.sink_tokens and cfg.normalizer not in OVER_SOFTMAX:
    raise ValueError(
      f'{_NAME}.sink_tokens={cfg.sink_tokens} with {_NAME}.normalizer='
      f'{cfg.normalizer!r}, but sink tokens need a softmax: allowed are '
      f'{", ".join(map(repr, OVER_SOFTMAX))}'
    )
  valued = cfg.sink_tokens and cfg.sink_values == 'learned'
  if cfg.has_sinks and not valued and cfg.output == 'rms_norm':
    raise ValueError(
      f"{_NAME}.output='rms_norm' with sinks without values ({_NAME}.normalizer="
      f'{cfg.normalizer!r}, {_NAME}.sink_tokens={cfg.sink_tokens}): such sinks only '
      "scale the output, and the norm cancels the scale; allowed is output='none' or "
      "'silu'"
    )


def _check_weights(cfg: Any) -> None:
  if cfg.normalizer == 'clipped' and (cfg.clip_gamma, cfg.clip_zeta) == (0, 1):
    raise ValueError(
      f"{_NAME}.normalizer='clipped' with clip_gamma=0 and clip_zeta=1 is the softmax "
      'itself: a clip_gamma below 0 or a clip_zeta above 1 is expected'
    )
  if cfg.global_layers and not cfg.window:
    raise ValueError(
      f'{_NAME}.global_layers={cfg.global_layers!r} with {_NAME}.window=0, but without a '
      'window all layers see the whole row'
    )
  if cfg.rounding == 'backend':
    return
  wrong = [f'normalizer={cfg.normalizer!r}'] * (cfg.normalizer not in OVER_SOFTMAX)
  wrong += [f'backend={cfg.backend!r}'] * (cfg.backend not in ('auto', 'reference'))
  if wrong:
    raise ValueError(
      f'{_NAME}.rounding={cfg.rounding!r} with {_NAME}.{wrong[0]}, but only the softmax '
      f"of the reference can choose its rounding: allowed are backend='auto' or "
      f"'reference', and normalizer={', '.join(map(repr, OVER_SOFTMAX))}"
    )


def _check_differential(cfg: Any) -> None:
  for name in ('heads', 'kv_heads'):
    config.divides(f'{_NAME}.{name}', getattr(cfg, name), 'the maps of differential', 2)
  wrong = [f'normalizer={cfg.normalizer!r}'] * (cfg.normalizer != 'softmax')
  wrong += [f'sink_tokens={cfg.sink_tokens}'] * bool(cfg.sink_tokens)
  if wrong:
    raise ValueError(
      f'{_NAME}.differential=True with {_NAME}.{wrong[0]}, but it is the difference of '
      "two softmaxes: allowed are normalizer='softmax' and sink_tokens=0"
    )
  if cfg.output != 'none':
    raise ValueError(
      f'{_NAME}.differential=True with {_NAME}.output={cfg.output!r}, but it has its own '
      "norm there, which would repeat or cancel it: allowed is output='none'"
    )
