"""lm-eval in this process: its tasks, on a model of ours."""

import importlib
from typing import Any

from gated.evals.harness.options import Options, define

__all__ = ['Options', 'define', 'part']


def part(name: str) -> Any:
  """A module of this folder that needs lm-eval; ValueError says how to install it."""
  try:
    importlib.import_module('lm_eval.api.model')
  except ImportError as error:
    raise ValueError(
      '--tasks needs the package lm-eval: pip install -r requirements-tasks.txt'
    ) from error
  return importlib.import_module(f'{__name__}.{name}')
