"""Items of RULER with their answers, and numbers twice, as documents to train on.

python scripts/ruler_text.py --out=data/needles.jsonl --tasks=niah_single_1 --lengths=1024
python scripts/ruler_text.py --out=data/copies.jsonl --copies=40000

A small model that is trained on both learns to copy in minutes (docs/evaluation.md).
eval.py --ruler has other items of the same tasks. Files are JSON lines, of which
scripts/prepare_data.py makes a dataset.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
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
  add('--tasks', default='', help='tasks of RULER, comma-separated')
  add('--lengths', default='', help='tokens of the items, at most; comma-separated')
  add('--items', default=4000, type=int, help='of each task and length')
  add('--copies', default=0, type=int, help='documents of 1 to 6 numbers, twice')
  add('--tokenizer', default='bytes', help='bytes (default), or a tokenizer file')
  add('--seed', default=1, type=int, help='default: %(default)s; eval.py has 42')
  args = parser.parse_args(argv)
  if bool(args.tasks) != bool(args.lengths) or not (args.tasks or args.copies > 0):
    parser.error('--tasks with --lengths, or --copies above 0, is needed')
  return args


def items(args: argparse.Namespace) -> Iterator[str]:
  """-> items of the tasks, with their answers; ValueError if one does not fit."""
  asked: dict[str, Any] = dict(tasks=tuple(args.tasks.split(',')), limit=args.items)
  options = ruler.Options(ruler=tuple(map(int, args.lengths.split(','))), **asked)
  token = tokenizer.load(args.tokenizer)
  maker = ruler.Maker(tokenizer=token, prefix=(), texts=ruler.local(), seed=args.seed)
  for name, length in itertools.product(options.tasks, options.ruler):
    maker.check(name, length, options.limit)
    for item in maker.items(name, length, options.limit):
      yield token.decode([*item.context, *item.reference]).decode()


def copies(count: int, seed: int) -> Iterator[str]:
  """-> documents of a line of numbers and the same line again.

  Half of their tokens can be copied, but only a few of those of a needle.
  """
  draw = random.Random(seed)
  for _ in range(count):
    line = ' '.join(
      str(draw.randint(10**6, 10**7 - 1)) for _ in range(draw.randint(1, 6))
    )
    yield f'{line}\n{line}'


def main(argv: list[str]) -> int:
  args = parse(argv)
  terminal.steady()
  try:
    texts = [*(items(args) if args.tasks else ()), *copies(args.copies, args.seed)]
    lines = [json.dumps({'text': text}) for text in texts]
    storage.write(args.out, '\n'.join(lines).encode())
  except (ValueError, OSError) as error:
    print(f'ruler_text.py: {error}', file=sys.stderr)
    return exit_codes.REFUSED
  print(f'{len(lines)} documents in {args.out}')
  return exit_codes.FINISHED


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
