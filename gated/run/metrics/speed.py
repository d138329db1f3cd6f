"""How fast a run is: step time, tokens/s, MFU, device memory, a profiler window."""

import contextlib
import time
from collections.abc import Generator
from typing import Any, Self

import jax

from gated import storage
from gated.devices import chips


def peak(device: jax.Device) -> float | None:
  """Device -> its peak in dense bf16 FLOP/s; None for a CPU, or where no one knows it.

  MFU is told against bf16 whatever the dtype.
  """
  chip = chips.of(device.device_kind)
  return None if chip is None or chip.name == 'cpu' else chip.flops


class Timer:
  """Wall time of steps -> tokens/s, model FLOP/s and MFU.

  MFU = flops_per_token * tokens/s / (peak * devices): only what the model's arithmetic
  needs, forward and backward, no recomputation; `flops_per_token` comes from the model,
  which counts causal attention half. Without a known `peak` (None) there is no MFU.
  """

  def __init__(
    self,
    *,
    tokens_per_step: int,
    flops_per_token: float,
    peak: float | None,
    devices: int,
  ):
    self._tokens, self._flops = tokens_per_step, flops_per_token
    self._peak = None if peak is None else peak * devices
    self._mark: float | None = None
    self._clear()

  def tick(self) -> None:
    """Marks that one more step is known to have ended.

    The first only starts the clock: what lies before it holds the compilation.
    """
    now = time.perf_counter()
    if self._mark is not None:
      self._steps += 1
      self._seconds += now - self._mark
    else:
      self._clear()
    self._mark = now

  @contextlib.contextmanager
  def data(self) -> Generator[None, None, None]:
    """Counts the time inside as a wait for data, which is part of the step."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def pause(self) -> Generator[None, None, None]:
    """Takes the time inside (an evaluation, a blocking save) out of the step."""
    start = time.perf_counter()
    try:
      yield
    finally:
      if self._mark is not None:
        self._mark += time.perf_counter() - start

  def read(self) -> dict[str, float]:
    """-> means over the steps since the last read; {} where none has ended.

    step_seconds, data_seconds, tokens_per_second, flops_per_second and, over all
    devices, mfu.
    """
    if not self._steps:
      return {}
    seconds = self._seconds / self._steps
    rate = self._tokens / seconds
    report = {
      'step_seconds': seconds,
      'data_seconds': self._waited / self._steps,
      'tokens_per_second': rate,
      'flops_per_second': rate * self._flops,
    }
    if self._peak is not None:
      report['mfu'] = rate * self._flops / self._peak
    self._clear()
    return report

  def _clear(self) -> None:
    self._steps, self._seconds, self._waited = 0, 0.0, 0.0


def memory() -> dict[str, int]:
  """-> bytes in use and their peak, on the fullest of this process's devices.

  {} where the platform does not tell (a CPU).
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  known = [s for s in stats if s]
  if not known:
    return {}
  return {
    'memory_bytes': max(s['bytes_in_use'] for s in known),
    'memory_peak_bytes': max(s['peak_bytes_in_use'] for s in known),
  }


def check_remote(workdir: storage.PathLike, *, profile_first: int) -> None:
  """ValueError if steps are to be traced and the workdir lies in an object store."""
  if profile_first >= 0 and storage.is_remote(workdir):
    raise ValueError(
      f'config.log.profile_first={profile_first}, but traces need a local --workdir, and '
      f'{workdir} is none: let it be -1'
    )


class Profile:
  """Traces steps `first` to `last` into WORKDIR/profile, for XProf or Perfetto.

  Off when `first` is negative or the process is not `enabled`. A run that resumes inside
  the window traces the rest of it; one that ends inside leaves what it has.
  """

  def __init__(self, workdir: storage.PathLike, first: int, last: int, *, enabled: bool):
    if first >= 0 and last < first:
      raise ValueError(f'the profiler window {first} to {last} ends before it starts')
    check_remote(workdir, profile_first=first)
    self._folder = str(storage.Path(workdir) / 'profile')
    self._first, self._last = first, last
    self._wanted = enabled and first >= 0
    self._tracing = False
    self._step: Any = None

  def before(self, step: int) -> None:
    """Call as a step is about to be dispatched."""
    if self._wanted and self._first <= step <= self._last:
      if not self._tracing:
        jax.profiler.start_trace(self._folder)
        self._tracing = True
      self._step = jax.profiler.StepTraceAnnotation('train', step_num=step)
      self._step.__enter__()

  def after(self, step: int, result: Any) -> None:
    """Call with what the step returned: the last one is waited for, then written."""
    if self._tracing:
      if step >= self._last:
        jax.block_until_ready(result)
        self.close()
      else:
        self._leave_step()

  def close(self) -> None:
    """Ends the trace, if one runs."""
    if self._tracing:
      self._leave_step()
      jax.profiler.stop_trace()
      self._tracing = self._wanted = False

  def _leave_step(self) -> None:
    if self._step is not None:
      self._step.__exit__(None, None, None)
      self._step = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()
