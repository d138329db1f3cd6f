"""Bitwise repeatability on GPUs: what it asks of XLA, of NCCL and of our own code.

CPUs and TPUs compute a step alike each time. GPUs do not: adding by atomics goes in any
order, XLA takes the kernels that were fastest when it measured them, and NVLink's
switches add in any order too. `ask` puts what prevents that into the environment, where
XLA and NCCL read it as the first device is touched; what computes in another way then
looks there with `asked`.

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
  """What is set where the user says nothing, and what else he may say: () is anything."""

  value: str
  allowed: tuple[str, ...]


FLAGS = {
  # cuDNN's gradient of attention and scatters in a fixed order; no kernel with atomics.
  'xla_gpu_exclude_nondeterministic_ops': Setting('true', ON),
  # Older versions go on to measure kernels, and take the fastest, unless told by these.
  'xla_gpu_deterministic_ops': Setting('true', ON),
  'xla_gpu_autotune_level': Setting('0', ('0',)),
  # Where none is measured, cuBLAS knows better than the first that Triton has.
  'xla_gpu_enable_triton_gemm': Setting('false', ()),
}

VARIABLES = {
  # Switches add in any order (github.com/NVIDIA/nccl/issues/1497).
  'NCCL_NVLS_ENABLE': Setting('0', ('0',)),
  # By itself NCCL takes others for other sizes, numbers of channels and topologies.
  'NCCL_ALGO': Setting('Ring', ('Ring',)),
  'NCCL_PROTO': Setting('Simple', ('Simple', 'LL', 'LL128')),
}


def ask(environ: MutableMapping[str, str] = os.environ) -> None:
  """Adds to the environment what repeatability needs; nothing that is there is changed.

  Call it before anything touches a device. ValueError, naming the flag or the variable,
  if what is there forbids it.
  """
  text = environ.get('XLA_FLAGS', '')
  if text.strip() and not text.strip().startswith('-'):
    raise ValueError(
      f'XLA_FLAGS={text!r} names a file, and --deterministic has flags to add: put the '
      "file's own into XLA_FLAGS"
    )
  there = flags(text)
  for name, setting in FLAGS.items():
    _check(f'--{name}', there.get(name), setting, 'from XLA_FLAGS')
  for name, setting in VARIABLES.items():
    _check(name, environ.get(name), setting, 'from the environment')
  added = [f'--{name}={s.value}' for name, s in FLAGS.items() if name not in there]
  environ['XLA_FLAGS'] = ' '.join([*filter(None, [text.strip()]), *added])
  for name, setting in VARIABLES.items():
    environ.setdefault(name, setting.value)
  _log.info(
    '--deterministic: GPUs take other kernels, slower or faster as the model has it '
    '(bench/deterministic.py); CPUs and TPUs it changes in nothing'
  )


def _check(name: str, value: str | None, setting: Setting, where: str) -> None:
  allowed = [each.lower() for each in setting.allowed]
  if value is not None and allowed and value.lower() not in allowed:
    needs = ' or '.join(repr(each) for each in setting.allowed if each)
    raise ValueError(
      f'{name}={value!r}, but --deterministic needs {needs}: remove one of them {where} '
      'or from the command line'
    )


def flags(text: str) -> dict[str, str]:
  """XLA_FLAGS -> {name: value}, '' for one without a value; the last of several holds."""
  words = [re.fullmatch(r'--?([^=]+)=?(.*)', word) for word in shlex.split(text)]
  return {word[1]: word[2] for word in words if word}


def asked(environ: Mapping[str, str]) -> bool:
  """Whether XLA is told to be deterministic, by us or by the user's own flags."""
  text = environ.get('XLA_FLAGS', '')
  there = flags(text) if text.strip().startswith('-') else {}
  switch = 'xla_gpu_exclude_nondeterministic_ops'
  return there.get(switch, 'false').lower() in ON


def applies(platform: str) -> bool:
  """Whether what is traced for a platform of JAX has to compute in a fixed order."""
  return platform == 'gpu' and asked(os.environ)


def add_rows(table_RD: jax.Array, row_N: jax.Array, value_ND: jax.Array) -> jax.Array:
  """A table, and values by row -> the table with each added to its row, in an order of
  its own; what belongs to a row that the table lacks is dropped.

  Sorted by row, a scan adds up the values of each, and its last sum is the row's. XLA's
  own deterministic scatter adds one row at a time, or sorts every single number.
  """
  order_N = jnp.argsort(row_N, stable=True)
  row_N, value_ND = row_N[order_N], value_ND[order_N]
  new_N = jnp.concatenate([jnp.ones(1, bool), row_N[1:] != row_N[:-1]])

  def add(before, after):
    (new_a, sum_a), (new_b, sum_b) = before, after
    return new_a | new_b, jnp.where(new_b, sum_b, sum_a + sum_b)

  _, sum_ND = jax.lax.associative_scan(add, (new_N[:, None], value_ND))
  every_R = jnp.arange(len(table_RD), dtype=row_N.dtype)
  first_R, end_R = (jnp.searchsorted(row_N, every_R, side=s) for s in ('left', 'right'))
  sum_RD = sum_ND[jnp.maximum(end_R - 1, 0)]
  return table_RD + jnp.where((end_R > first_R)[:, None], sum_RD, 0)
