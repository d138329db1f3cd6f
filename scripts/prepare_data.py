"""Text -> a dataset of packed rows that `config.data.mixture` can name.

python scripts/prepare_data.py --out=data/books --length=4096 --tokenizer=bpe:32768 \
    --domain=books=~/books,~/more.jsonl.gz --domain=code=~/linux --suffixes=.c,.h,.md

A text file (.txt, .md, --suffixes) is one document; JSON lines (.jsonl, .ndjson, .json)
and .parquet have one document in each --field. Text and JSON lines may be compressed
(.gz, .zst, .bz2, .xz). Folders are read recursively; links are followed once. A PATH may
be a dataset of the Hugging Face hub: hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT].
docs/data.md lists what is read. After an interruption, the same command continues. Exit
codes: 0 done, 2 refused, 9 a fault of this machine that may pass, such as a full disk.
"""

import argparse
import csv
import json
import logging
import os
import sys

from gated import storage
from gated.data import prepare, shards
from gated.run import exit_codes, terminal


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', required=True, help='folder of the dataset')
  add('--length', required=True, type=int, help='T, the targets per row')
  tokenizers = (
    "'bytes', 'bpe:SIZE' to train one, or the path of a tokenizer.json or *.model"
  )
  add('--tokenizer', required=True, help=tokenizers)
  domains = (
    'files and folders of a domain, as NAME=PATH[,PATH]; repeat per domain. Quote a PATH '
    'that has a comma'
  )
  add('--domain', required=True, action='append', help=domains)
  add(
    '--suffixes',
    default='',
    help='suffixes of text files (.py,.c), the only ones read in folders',
  )
  ids = (
    'auto: the input holds token ids of --tokenizer, not text: .bin of nanoGPT, llm.c or '
    'Megatron, or lists of ids in --field of JSON lines and Parquet. uint16 or uint32: '
    'the type in a .bin without a header'
  )
  add('--ids', default='', help=ids)
  heldout = 'fraction of documents held out, by a hash of their content (--dedup)'
  add('--heldout', default=0.01, type=float, help=heldout)
  add('--field', default='text', help='field of the text in JSON lines and Parquet')
  add('--eos', default='', help='end-of-text token, if its name is unusual')
  bos = 'start every document with the beginning-of-text token, or with TOKEN'
  add('--bos', nargs='?', const=True, default=False, metavar='TOKEN', help=bos)
  encoding = 'of text and JSON lines; default: %(default)s'
  add('--encoding', default=prepare.Options.encoding, help=encoding)
  errors = (
    'unreadable input: stop with the first ten places (the default), or skip and count '
    'it by reason'
  )
  add('--on_error', default=prepare.Options.on_error, help=errors)
  dedup = (
    'exact (the default): one copy of each text over all domains, ignoring white space, '
    'and a split by content, so that no held-out text is in the training data; '
    'near: also one of similar texts (MinHash); none: all texts, and a split by names'
  )
  add('--dedup', default='', help=dedup)
  add('--seed', default=0, type=int, help='seed of the order of documents')
  add('--shard_rows', default=1 << 16, type=int, help='rows per file')
  add('--processes', default=os.cpu_count(), type=int, help='default: all cores')
  return parser.parse_args(argv)


def check_out(out: str) -> None:
  """ValueError unless a dataset can be written there."""
  if '://' in out:
    return  # Refused later.
  if not out:
    raise ValueError('--out= is empty: name a folder, or . for the current one')
  try:
    top = storage.top(out)
    writable = top.is_dir() and os.access(top, os.W_OK | os.X_OK)
  except OSError as error:
    raise ValueError(f'--out={out}: {error.strerror}') from error
  if not writable:
    raise ValueError(f'--out={out}: {top} is not a writable folder')


def default_dedup(out: str) -> str:
  """'exact', or 'none' for a complete dataset that was made without --dedup."""
  if '://' in out:  # Refused later.
    return 'exact'
  try:
    return shards.read_manifest(out).made.get('dedup') or 'none'
  except FileNotFoundError:
    return 'exact'


def main(argv: list[str]) -> None:
  flags = vars(parse(argv))
  out, processes = os.path.expanduser(flags.pop('out')), flags.pop('processes')
  check_out(out)
  domains: dict[str, list[str]] = {}
  for text in flags.pop('domain'):
    name, equals, listed = text.partition('=')
    paths = next(csv.reader([listed]), [])
    if not equals or not paths or not all(paths):
      raise ValueError(f'--domain={text}, but it must be NAME=PATH[,PATH]')
    if name in domains:
      raise ValueError(f'--domain={text}: {name!r} is repeated; join its paths by commas')
    domains[name] = [os.path.expanduser(path) for path in paths]
  flags['dedup'] = flags['dedup'] or default_dedup(out)
  flags['suffixes'] = tuple(filter(None, flags['suffixes'].split(',')))
  with storage.named(out):
    manifest = prepare.run(out, domains, prepare.Options(**flags), processes=processes)
  for split, portions in manifest.splits.items():
    for domain, portion in portions.items():
      print(
        f'{split} {domain}: {portion.rows:,} rows, {portion.documents:,} documents, '
        f'{portion.tokens:,} tokens, {portion.bytes:,} bytes'
      )
  for reason, counts in manifest.made.get('counts', {}).items():
    print(f'{reason.replace("_", " ")}: {json.dumps(counts)}')
  print(f'{out}: a vocabulary of {manifest.tokenizer.vocab:,}, {manifest.digest}')


if __name__ == '__main__':
  terminal.steady(logging.INFO)
  try:
    main(sys.argv[1:])
  except (ValueError, OSError) as error:
    print(f'prepare_data: {error}', file=sys.stderr)
    passing = storage.is_passing(error)  # Such as a full disk.
    sys.exit(exit_codes.FAULT if passing else exit_codes.REFUSED)
