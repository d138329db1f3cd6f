"""Bitwise repeatability on GPUs: settings of XLA and NCCL, and ordered sums.

CPUs and TPUs repeat a step bit for bit. GPUs do not: atomics and NVLink's switches add in
any order, and XLA's autotuning chooses kernels by measured time. `enable` prevents this
with environment variables, which XLA and NCCL read when the first device is used. Our own
code reads them through `enabled`.

R rows of a table  D width  N values to add
"""

import logging
import os
import re
import shlex
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

_log = logging.getLogger('gated')

ON = 'true', '1', ''


class Setting(NamedTuple):
  """The default, and the allowed values of the user's own setting; () allows any."""

  value: str
  allowed: tuple[str, ...]


FLAGS = {
  # cuDNN's attention gradient and scatters add in a fixed order; atomics are excluded.
  'xla_gpu_exclude_nondeterministic_ops': Setting('true', ON),
  # Older versions of XLA autotune kernels unless these forbid it.
  'xla_gpu_deterministic_ops': Setting('true', ON),
  'xla_gpu_autotune_level': Setting('0', ('0',)),
  # Without autotuning, cuBLAS chooses a faster kernel than Triton's first candidate.
  'xla_gpu_enable_triton_gemm': Setting('false', ()),
}

VARIABLES = {
  # Switches add in any order (github.com/NVIDIA/nccl/issues/1497).
  'NCCL_NVLS_ENABLE': Setting('0', ('0',)),
  # NCCL's default depends on message size, number of channels and topology.
  'NCCL_ALGO': Setting('Ring', ('Ring',)),
  'NCCL_PROTO': Setting('Simple', ('Simple', 'LL', 'LL128')),
}


def enable(environ: MutableMapping[str, str] = os.environ) -> None:
  """Adds the missing flags and variables to the environment; keeps existing ones.

  Call it before anything touches a device. ValueError, naming the flag or the variable,
  if an existing value is not allowed.
  """
  text = environ.get('XLA_FLAGS', '')
  if text.strip() and not text.strip().startswith('-'):
    raise ValueError(
      f'XLA_FLAGS={text!r} names a file, but --deterministic must add flags: move the '
      "file's flags into XLA_FLAGS"
    )
  present = flags(text)
  for name, setting in FLAGS.items():
    _check(f'--{name}', present.get(name), setting, 'from XLA_FLAGS')
  for name, setting in VARIABLES.items():
    _check(name, environ.get(name), setting, 'from the environment')
  added = [f'--{name}={s.value}' for name, s in FLAGS.items() if name not in present]
  environ['XLA_FLAGS'] = ' '.join([*filter(None, [text.strip()]), *added])
  for name, setting in VARIABLES.items():
    environ.setdefault(name, setting.value)
  _log.info(
    '--deterministic: GPUs use other kernels, slower or faster depending on the model '
    '(bench/deterministic.py); CPUs and TPUs are not affected'
  )


def _check(name: str, value: str | None, setting: Setting, source: str) -> None:
  allowed = [option.lower() for option in setting.allowed]
  if value is not None and allowed and value.lower() not in allowed:
    needs = ' or '.join(repr(option) for option in setting.allowed if option)
    raise ValueError(
      f'{name}={value!r}, but --deterministic needs {needs}: remove it {source} '
      'or omit --deterministic'
    )


def flags(text: str) -> dict[str, str]:
  """XLA_FLAGS -> {name: value}, '' for a flag without a value; the last one wins."""
  words = [re.fullmatch(r'--?([^=]+)=?(.*)', word) for word in shlex.split(text)]
  return {word[1]: word[2] for word in words if word}


def enabled(environ: Mapping[str, str]) -> bool:
  """Whether XLA runs deterministically, by `enable` or by the user's own flags."""
  text = environ.get('XLA_FLAGS', '')
  present = flags(text) if text.strip().startswith('-') else {}
  switch = 'xla_gpu_exclude_nondeterministic_ops'
  return present.get(switch, 'false').lower() in ON


def applies(platform: str) -> bool:
  """Whether code traced for a JAX platform must add in a fixed order."""
  return platform == 'gpu' and enabled(os.environ)


def add_rows(table_RD: jax.Array, row_N: jax.Array, value_ND: jax.Array) -> jax.Array:
  """Adds each value to its row of the table in a fixed order; drops rows outside of it.

  The values are sorted by row and added by a segmented scan; a row's last partial sum is
  its total. XLA's own deterministic scatter is slower: it adds one row at a time, or
  sorts all numbers.
  """
  order_N = jnp.argsort(row_N, stable=True)
  row_N, value_ND = row_N[order_N], value_ND[order_N]
  new_N = jnp.concatenate([jnp.ones(1, bool), row_N[1:] != row_N[:-1]])

  def add(before, after):
    (new_a, sum_a), (new_b, sum_b) = before, after
    return new_a | new_b, jnp.where(new_b, sum_b, sum_a + sum_b)

  _, sum_ND = jax.lax.associative_scan(add, (new_N[:, None], value_ND))
  id_R = jnp.arange(len(table_RD), dtype=row_N.dtype)
  first_R, end_R = (jnp.searchsorted(row_N, id_R, side=s) for s in ('left', 'right'))
  sum_RD = sum_ND[jnp.maximum(end_R - 1, 0)]
  return table_RD + jnp.where((end_R > first_R)[:, None], sum_RD, 0)
