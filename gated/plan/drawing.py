"""Figures of loaded models, drawn into a workdir."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gated import storage
from gated.probes import attention, gates, page

FORMATS = 'svg', 'png'

Runs = Mapping[str, Any]  # Label -> `Loaded`; the first is that of the workdir.
Reports = Mapping[str, dict[str, Any]]


def check(loaded: Any) -> None:
  """ValueError without matplotlib or a workdir: nothing can be drawn."""
  if not loaded.about:
    raise ValueError(f'figures are drawn into a workdir, but {loaded.path} is not one')
  try:
    importlib.import_module('matplotlib')
  except ImportError as error:
    raise ValueError(f"figures need {error.name}: pip install 'gated[report]'") from error


def probes(runs: Runs, reports: Reports, ids: np.ndarray) -> None:
  """Draws the probes' reports, and maps of a text -> WORKDIR/probes/STEP-*.

  The workdir, the step, the maps of single heads and the page of gates are those of the
  first run. Attention maps show the authors' prompt, and the first `ids`: at most a row
  of the report and at most `attention.LONGEST`.
  """
  label, loaded = next(iter(runs.items()))
  check(loaded)
  from gated.probes import figures, style

  ids = ids[: min(reports[label]['row_length'], attention.LONGEST)]
  try:
    prompt = loaded.tokenizer.encode(figures.PROMPT)[0]
  except ValueError:
    prompt = ids[:16]  # There is no tokenizer.
  tokens, words = _texts(loaded, ids), _texts(loaded, prompt)
  long_maps, maps = (
    {k: run.attention(x) for k, run in runs.items()} for x in (ids, prompt)
  )
  pictures = {
    'sinks': figures.sinks(reports),
    'sparsity': figures.sparsity(reports),
    'attention-long': figures.attention(long_maps, tokens),
    'attention': figures.attention(maps, words),
    'attention-heads': figures.attention_heads(maps[label], words),
  }
  if any(run.cfg.attn.named for run in runs.values()):
    pictures['gates'] = figures.gates(reports)
    pictures['gates-by-layer'] = figures.gates_by_layer(reports)
  html = ''
  for gate in [*loaded.cfg.attn.named.values()][:1]:
    title = f'{label}, step {loaded.step}: gate scores'
    limits = gates.score_range(gate.activation)
    html = page.page(loaded.gates(ids), tokens, title=title, limits=limits)
  if jax.process_index() == 0:
    folder = loaded.path / 'probes'
    for name, figure in pictures.items():
      style.save(figure, folder, f'{loaded.tag}-{name}', FORMATS)
    if html:
      storage.write(folder / f'{loaded.tag}-gates.html', html.encode())


def losses(runs: Runs, reports: Reports, *, folder: str, name: str) -> None:
  """Draws held-out losses -> WORKDIR/FOLDER/NAME-domains, -positions, .svg and .png."""
  loaded = next(iter(runs.values()))
  check(loaded)
  from gated.evals import figures
  from gated.probes import style

  pictures = {'domains': figures.by_domain(reports)}
  curves = {label: report.get('positions') for label, report in reports.items()}
  if all(curves.values()):
    pictures['positions'] = figures.positions(curves)
  for kind, figure in pictures.items():
    if jax.process_index() == 0:
      style.save(figure, loaded.path / folder, f'{name}-{kind}', FORMATS)


def ruler(loaded: Any, reports: Reports, *, name: str, loss_only: bool) -> None:
  """Draws RULER's results -> WORKDIR/evals/NAME-by-length-loss and -score, .svg, .png."""
  check(loaded)
  from gated.evals import figures
  from gated.probes import style

  for shown in ('loss', 'score')[: 2 - loss_only]:
    figure = figures.ruler(reports, shown)
    style.save(figure, loaded.path / 'evals', f'{name}-by-length-{shown}', FORMATS)


def _texts(loaded: Any, ids: np.ndarray) -> list[str]:
  """The text of each token; its id without a tokenizer."""
  try:
    decode = loaded.tokenizer.decode
  except ValueError:
    return [f'[{i}]' for i in ids]
  return [decode([i]).decode(errors='replace') for i in ids]
