"""The speed of a run: step time, tokens/s, MFU, device memory, and a profiler window."""

import contextlib
import time
from collections.abc import Generator
from typing import Any

import jax

from gated import storage
from gated.devices import chips


def peak(device: jax.Device) -> float | None:
  """Device -> its peak in dense bf16 FLOP/s; None for a CPU or an unknown chip.

  MFU refers to bf16 whatever the dtype.
  """
  chip = chips.of(device.device_kind)
  return None if chip is None or chip.name == 'cpu' else chip.flops


class Timer:
  """Wall time of steps -> tokens/s, model FLOP/s and MFU.

  MFU = flops_per_token * tokens/s / (peak * devices): only the model's arithmetic,
  forward and backward, without recomputation, and in attention only the pairs that attend
  (`model.flops_per_token`). If `peak` is None, the report has no MFU.
  """

  def __init__(
    self,
    *,
    tokens_per_step: int,
    peak: float | None,
    devices: int,
  ):
    self._tokens = tokens_per_step
    self._peak = None if peak is None else peak * devices
    self._mark: float | None = None
    self._clear()

  def tick(self, flops_per_token: float) -> None:
    """Marks the end of a step; the first call (after compiling) starts the clock."""
    now = time.perf_counter()
    if self._mark is None:
      self._clear()
    else:
      self._steps += 1
      self._flops += flops_per_token
      self._seconds += now - self._mark
    self._mark = now

  @contextlib.contextmanager
  def data(self) -> Generator[None]:
    """Counts the time inside as waiting for data, which is part of the step."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def pause(self) -> Generator[None]:
    """Excludes the time inside (an evaluation, a blocking save) from the step."""
    start = time.perf_counter()
    try:
      yield
    finally:
      if self._mark is not None:
        self._mark += time.perf_counter() - start

  def read(self) -> dict[str, float]:
    """-> means over the steps since the last read; {} if none has ended.

    step_seconds, data_seconds, tokens_per_second, flops_per_second and, over all
    devices, mfu.
    """
    if not self._steps:
      return {}
    seconds = self._seconds / self._steps
    rate = self._tokens / seconds
    flops = rate * self._flops / self._steps
    report = {
      'step_seconds': seconds,
      'data_seconds': self._waited / self._steps,
      'tokens_per_second': rate,
      'flops_per_second': flops,
    }
    if self._peak is not None:
      report['mfu'] = flops / self._peak
    self._clear()
    return report

  def _clear(self) -> None:
    self._steps, self._seconds, self._waited, self._flops = 0, 0.0, 0.0, 0.0


def memory() -> dict[str, int]:
  """-> bytes in use and their peak, on the fullest of this process's devices.

  {} if the platform does not report them (a CPU).
  """
  stats = [s for device in jax.local_devices() if (s := device.memory_stats())]
  names = {'memory_bytes': 'bytes_in_use', 'memory_peak_bytes': 'peak_bytes_in_use'}
  return {name: max(s[key] for s in stats) for name, key in names.items() if stats}


def check_remote(workdir: storage.PathLike, *, profile_first: int) -> None:
  """Raises ValueError if steps are to be traced into an object store."""
  if profile_first >= 0 and storage.is_remote(workdir):
    raise ValueError(
      f'config.log.profile_first={profile_first}, but traces need a local --workdir, and '
      f'{workdir} is not local: set it to -1'
    )


class Profile(contextlib.ExitStack):
  """Traces steps `first` to `last` into WORKDIR/profile, for XProf or Perfetto.

  Off if `first` is negative or the process is not `enabled`. A run that starts inside the
  window traces the rest of it; a run that ends inside it keeps the trace so far.
  """

  def __init__(self, workdir: storage.PathLike, first: int, last: int, *, enabled: bool):
    super().__init__()
    self._folder = str(storage.Path(workdir) / 'profile')
    self._window = range(first, last + 1) if enabled and first >= 0 else range(0)
    self._tracing = False
    self._step = contextlib.ExitStack()

  def before(self, step: int) -> None:
    """Call it before a step is dispatched."""
    if step not in self._window:
      return
    if not self._tracing:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
      self.callback(self._stop)
    annotation: Any = jax.profiler.StepTraceAnnotation('train', step_num=step)
    self._step.enter_context(annotation)

  def after(self, step: int, result: Any) -> None:
    """Call it with the result of the step; the last step is awaited and written."""
    if not self._tracing:
      return
    if step + 1 in self._window:
      self._step.close()
    else:
      jax.block_until_ready(result)
      self.close()

  def _stop(self) -> None:
    self._step.close()
    jax.profiler.stop_trace()
    self._tracing = False
