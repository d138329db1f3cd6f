"""How long a function takes, as the scripts beside this one measure it."""

import statistics
import time

import jax


def milliseconds(f, *args) -> float:
  """The median of ten means over five calls, after one that compiles."""
  f = jax.jit(f)
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(10):
    start = time.perf_counter()
    for _ in range(5):
      out = f(*args)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / 5)
  return 1e3 * statistics.median(times)
