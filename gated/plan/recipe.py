"""A whole recipe: the configs of all rooms, joined and checked against each other."""

import re
from dataclasses import dataclass
from typing import Any

from gated import config, data, evals, model
from gated.devices import mesh
from gated.run import checkpoint, metrics
from gated.train import guard, losses, optim

NAME = re.compile(r'[A-Za-z0-9_][\w.+=,-]{0,99}', re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Paper:
  """What a recipe reproduces; nothing of it acts on the run."""

  table: str  # 'Table 1', or '' for a recipe of none
  row: str  # as a recipe's argument names it
  baseline: str  # the recipe that its parameters are counted against: FILE:ARGUMENT
  added: float  # millions of parameters, as the paper prints them; -1 where it does not
  published: dict[str, float]  # the row's numbers
  assumed: tuple[str, ...]  # what the paper does not say, and is chosen here


@dataclass(frozen=True, kw_only=True)
class Config:
  """`configs/base.py`, whole and checked."""

  name: str
  seed: int
  steps: int
  batch: int
  accum: int
  init_from: str
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
    if not NAME.fullmatch(self.name):
      raise ValueError(
        f'config.name={self.name[:100]!r}, but it is to name a folder: letters, digits '
        'and _.-+=, of them at most 100'
      )


def check_mesh(cfg: Config, on: Any) -> None:
  """Raises ValueError unless a mesh splits every micro-batch, row and layer evenly."""
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

  `config.paper` does not count: it changes nothing in the run.
  """
  return config.digest({knob: c[knob] for knob in c if knob != 'paper'})[:8]
