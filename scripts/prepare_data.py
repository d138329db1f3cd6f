"""Text -> a dataset of packed rows that `config.data.mixture` can name.

python scripts/prepare_data.py --out=data/books --length=4096 --tokenizer=bpe:32768 \
    --domain=books=~/books,~/more.jsonl.gz --domain=code=~/linux --suffixes=.c,.h,.md

Plain text (.txt, .md) and files of --suffixes are one document each; JSON lines (.jsonl,
.jsonl.gz, .jsonl.zst) and .parquet hold one in each --field. Folders are read through.
Killed, it goes on where it was when it is started again.
"""

import argparse
import logging
import os
import sys

from gated.data import prepare


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', required=True, help='the dataset, a folder')
  add('--length', required=True, type=int, help='T; tokens that a row predicts')
  add(
    '--tokenizer',
    required=True,
    help="'bytes', 'bpe:SIZE' to train one, or the path of a tokenizer.json or *.model",
  )
  add(
    '--domain',
    required=True,
    action='append',
    metavar='NAME=PATH[,PATH]',
    help='what to read; once for each domain',
  )
  add(
    '--suffixes',
    default='',
    help='of files read as text, such as .py,.c; in folders only these are read',
  )
  add(
    '--heldout',
    default=0.01,
    type=float,
    help='fraction of documents held out, by a hash of their names',
  )
  add('--field', default='text', help='of JSON lines and Parquet')
  add(
    '--eos', default='', help='end-of-text token, where it is not one of the usual names'
  )
  add('--bos', action='store_true', help='begin documents with a token of their own')
  add('--seed', default=0, type=int, help='of the order of documents')
  add('--shard_rows', default=1 << 16, type=int, help='rows in a file')
  add('--processes', default=os.cpu_count(), type=int)
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  args = parse(argv)
  domains: dict[str, list[str]] = {}
  for text in args.domain:
    name, equals, paths = text.partition('=')
    if not equals or not all(paths.split(',')):
      raise ValueError(f'--domain={text}, but it must be NAME=PATH[,PATH]')
    if name in domains:
      raise ValueError(
        f'--domain={text}: {name!r} is named twice; join its paths by commas'
      )
    domains[name] = [os.path.expanduser(path) for path in paths.split(',')]
  options = prepare.Options(
    length=args.length,
    tokenizer=args.tokenizer,
    eos=args.eos,
    heldout=args.heldout,
    shard_rows=args.shard_rows,
    seed=args.seed,
    bos=args.bos,
    field=args.field,
    suffixes=tuple(suffix for suffix in args.suffixes.split(',') if suffix),
  )
  manifest = prepare.run(args.out, domains, options, processes=args.processes)
  for split, portions in manifest.splits.items():
    for domain, portion in portions.items():
      print(
        f'{split} {domain}: {portion.rows:,} rows, {portion.documents:,} documents, '
        f'{portion.tokens:,} tokens, {portion.bytes:,} bytes'
      )
  print(f'{args.out}: a vocabulary of {manifest.tokenizer.vocab:,}, {manifest.digest}')


if __name__ == '__main__':
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  try:
    main(sys.argv[1:])
  except ValueError as error:
    sys.exit(f'prepare_data: {error}')
