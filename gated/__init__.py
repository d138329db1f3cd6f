"""gated: pretraining language models with gated attention (arXiv 2505.06708).

Arrays end in their logical dimensions, in capitals; every file uses this key.

  B batch      T tokens     S keys' tokens   D width      H query heads   G KV heads
  K head width F ffn width  E experts        V vocabulary L layers        N = B * T
"""

import typing

if typing.TYPE_CHECKING:
  from gated.plan.load import Loaded


def load(path: typing.Any, *, step: str | int = '', cache: str = '') -> 'Loaded':
  """A run's workdir, WORKDIR:STEP or a Hugging Face folder -> the model as an object.

      run = gated.load('runs/demo')
      run.loss('def f(x):'), run.logits('def f(x):'), run.gates('def f(x):')

  See `gated.plan.load.load`.
  """
  # Imported late: `import gated` needs no package.
  from gated.plan import load as loading

  return loading.load(path, step=step, cache=cache)
