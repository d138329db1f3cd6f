"""Shared parts of the benchmarks: options, the first line, times and relative errors."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
  """A parser with one option for each default, of the default's type."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, value in defaults.items():
    typed = dict(type=type(value), help=f'default: {value}')
    how = dict(action='store_true') if value is False else typed
    parser.add_argument(f'--{name}', default=value, **how)
  return parser


def title(settings: Any) -> str:
  """The first line of a benchmark: the devices, the version of JAX and the settings."""
  devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  return f'{devices}, jax {jax.__version__}, {settings}'


def milliseconds(
  run: Callable, *args: Any, wait: Callable = jax.block_until_ready
) -> float:
  """The median of ten means over five calls, after one call that compiles."""
  wait(run(*args))
  times = []
  for _ in range(10):
    start = time.perf_counter()
    for _ in range(5):
      result = run(*args)
    wait(result)
    times.append((time.perf_counter() - start) / 5)
  return 1e3 * statistics.median(times)


def relative_error(actual: Any, expected: Any) -> float:
  """||actual - expected|| / ||expected||, in float32."""
  actual, expected = (np.asarray(array, np.float32) for array in (actual, expected))
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
