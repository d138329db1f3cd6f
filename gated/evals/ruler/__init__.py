"""RULER (arXiv 2404.06654) from local texts: 13 tasks of long context, at any length."""

from gated.evals.ruler.items import Item, Maker
from gated.evals.ruler.options import Options, define
from gated.evals.ruler.scores import means, score, summarize, table
from gated.evals.ruler.tasks import TASKS
from gated.evals.ruler.texts import local

__all__ = [
  'TASKS',
  'Item',
  'Maker',
  'Options',
  'define',
  'local',
  'means',
  'score',
  'summarize',
  'table',
]
