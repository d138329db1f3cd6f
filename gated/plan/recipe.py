"""A whole recipe: the configs of all modules, joined and checked against each other."""

import re
from dataclasses import dataclass
from typing import Any

from gated import config, data, evals, model
from gated.devices import mesh
from gated.run import checkpoint, metrics
from gated.train import guard, losses, optim, qk_clip, transfer

NAME = re.compile(r'[A-Za-z0-9_][\w.+=,-]{0,99}', re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Paper:
  """The published row that a recipe reproduces; it has no effect on the run."""

  table: str  # such as 'table1'; '' for a recipe outside the paper's tables
  row: str  # the argument that selects the row
  baseline: str  # the recipe without the `added` parameters: FILE:ARGUMENT
  added: float  # published extra parameters in millions; -1 for none published
  published: dict[str, float]  # published metrics by name
  assumed: tuple[str, ...]  # our choices where the paper is silent


@dataclass(frozen=True, kw_only=True)
class Config:
  """All knobs of `configs/base.py`, checked."""

  name: str
  seed: int
  steps: int
  batch: int
  accum: int
  init_from: str
  model_from: str  # already applied to `model`, by `command.parse`
  model: model.Config
  loss: losses.Config
  optim: optim.Config
  data: data.Config
  mesh: mesh.Config
  eval: evals.Config
  checkpoint: checkpoint.Config
  stability: guard.Config
  log: metrics.Config
  paper: Paper

  def __post_init__(self):
    if not 0 <= self.seed < 2**31:
      raise ValueError(f'config.seed={self.seed}, but it must be in [0, 2**31)')
    for name in ('steps', 'batch', 'accum'):
      config.at_least(f'config.{name}', getattr(self, name), 1)
    if self.steps >= 2**31:
      raise ValueError(f'config.steps={self.steps}, but it must be below 2**31')
    config.divides('config.batch', self.batch, 'config.accum', self.accum)
    qk_clip.check(self.optim.qk_clip, self.model)
    for name, gate in ({'gate': self.model.attn.gate} | self.model.attn.named).items():
      if gate.opens[1] > self.steps:
        raise ValueError(
          f'{self.model.attn.knob(name)}.opens={gate.opens}, but the run has only '
          f'config.steps={self.steps}'
        )
    transfer.growth(self.optim, self.model)
    if not NAME.fullmatch(self.name):
      raise ValueError(
        f'config.name={self.name[:100]!r}, but a folder is named after it: allowed '
        'are at most 100 letters, digits and _.-+='
      )


def check_mesh(cfg: Config, on: Any) -> None:
  """Raises ValueError unless the mesh splits every micro-batch, row and layer evenly."""
  ways = mesh.ways('batch', on)
  if (cfg.batch // cfg.accum) % ways:
    sizes = ' * '.join(f'config.mesh.{a}={on.shape[a]}' for a in mesh.RULES['batch'])
    raise ValueError(
      f'config.batch={cfg.batch} must be a multiple of config.accum={cfg.accum} * {sizes}'
    )
  mesh.check('tokens', cfg.data.length, on)
  for axis in ('heads', 'kv_heads'):
    mesh.check(axis, getattr(cfg.model.attn, axis), on)
  for axis, size in (('embed', cfg.model.width), ('ffn', cfg.model.ffn)):
    mesh.check(axis, size, on)
  if cfg.model.moe.experts:
    mesh.check('experts', cfg.model.moe.experts, on)
  mesh.check('vocab', cfg.model.vocab, on)


def digest(c: dict) -> str:
  """A resolved recipe -> 8 hexadecimal digits that name its default workdir.

  The digest omits `config.paper`, which has no effect on the run.
  """
  kept = config.earlier({knob: c[knob] for knob in c if knob != 'paper'})
  return config.digest(kept)[:8]
