"""Items of RULER with their answers, as documents to train on: JSON lines.

python scripts/ruler_text.py --out=data/needles.jsonl --tasks=niah_single_1 --lengths=1024

A model that is trained on them learns to copy. eval.py --ruler has other items of the
same tasks (docs/evaluation.md). scripts/prepare_data.py makes a dataset of the file.
"""

import argparse
import itertools
import json
import sys
from typing import Any

from gated import storage
from gated.data import tokenizer
from gated.evals import ruler
from gated.run import exit_codes, terminal


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', required=True, help='a file that ends in .jsonl')
  add('--tasks', required=True, help='tasks of RULER, comma-separated')
  add('--lengths', required=True, help='tokens of the items, at most; comma-separated')
  add('--items', default=4000, type=int, help='of each task and length')
  add('--tokenizer', default='bytes', help='bytes (default), or a tokenizer file')
  add('--seed', default=1, type=int, help='default: %(default)s; eval.py has 42')
  return parser.parse_args(argv)


def main(argv: list[str]) -> int:
  args = parse(argv)
  terminal.steady()
  try:
    asked: dict[str, Any] = dict(tasks=tuple(args.tasks.split(',')), limit=args.items)
    options = ruler.Options(ruler=tuple(map(int, args.lengths.split(','))), **asked)
    token = tokenizer.load(args.tokenizer)
    maker = ruler.Maker(tokenizer=token, prefix=(), texts=ruler.local(), seed=args.seed)
    lines = []
    for name, length in itertools.product(options.tasks, options.ruler):
      maker.check(name, length, options.limit)
      for item in maker.items(name, length, options.limit):
        text = token.decode([*item.context, *item.reference]).decode()
        lines.append(json.dumps({'text': text}))
    storage.write(args.out, '\n'.join(lines).encode())
  except (ValueError, OSError) as error:
    print(f'ruler_text.py: {error}', file=sys.stderr)
    return exit_codes.REFUSED
  print(f'{len(lines)} documents in {args.out}')
  return exit_codes.FINISHED


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
