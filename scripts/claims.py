"""Writes docs/claims.md, the ledger of claims, from the committed results.

  python scripts/claims.py            writes the page
  python scripts/claims.py --status   prints a line for each claim

It reads experiments/*/results/gpu/ and the claims that each recipe.py serves.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
  sys.path.append(str(ROOT))  # For experiments/, which is not installed.

from gated import storage  # noqa: E402
from gated.evidence import ledger, result  # noqa: E402
from gated.run import terminal  # noqa: E402

PAGE = ROOT / 'docs/claims.md'


def rows() -> list[ledger.Row]:
  """-> the rows of this checkout's results."""
  names = sorted(path.parent.name for path in ROOT.glob('experiments/*/recipe.py'))
  recipes = {n: importlib.import_module(f'experiments.{n}.recipe') for n in names}
  serves = {n: (*r.CLAIMS, *getattr(r, 'SHARED', ())) for n, r in recipes.items()}
  return ledger.rows(result.everywhere(storage.path(ROOT), ledger.SCALE), serves)


def main(argv: Sequence[str] | None = None) -> int:
  layout = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser('claims.py', None, __doc__, formatter_class=layout)
  parser.add_argument('--status', action='store_true', help='print each status')
  args = parser.parse_args(argv)
  try:
    table = rows()
  except ValueError as error:
    print(f'claims.py: {error}', file=sys.stderr)
    return 2
  if args.status:
    for row in table:
      print(f'{row.claim.name:4}{row.status:14}{row.reason}')
  else:
    PAGE.write_text(ledger.page(table))
    print(PAGE.relative_to(ROOT))
  return 0


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main())
