"""Converts a run's checkpoint, or a Hugging Face folder, to a new Hugging Face folder.

  python scripts/convert_hf.py --from=runs/dense:20000 --to=export --dtype=bfloat16
  python scripts/convert_hf.py --from=export --to=other --packing=per_head

A step is a number, latest (the default) or best. The tokenizer is converted too, so that
transformers gives the same ids. No file is overwritten. Exit code 2:
invalid arguments or an unsupported model.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gated
from gated import hf
from gated.data import tokenizer
from gated.data.progress import Progress
from gated.plan.load import Loaded
from gated.run import terminal
from gated.run.exit_codes import REFUSED

# Keys of config.json outside the model that the new folder keeps.
KEPT = ('max_position_embeddings', 'bos_token_id', 'eos_token_id', 'pad_token_id')
# The files of a tokenizer in a Hugging Face folder; transformers reads them together.
TOKENIZERS = (
  'tokenizer.json',
  'tokenizer.model',
  'spiece.model',
  'vocab.json',
  'vocab.txt',
)
FILES = (
  *TOKENIZERS,
  'merges.txt',
  'added_tokens.json',
  'special_tokens_map.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'generation_config.json',
)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  source = 'a workdir of train.py, or a Hugging Face folder'
  add('--from', required=True, dest='source', metavar='DIR[:STEP]', help=source)
  add('--step', default='', help='the same as :STEP')
  add('--to', required=True, type=lambda p: Path(p).expanduser(), help='the new folder')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='dtype of the tensors; default: that of the source',
  )
  yarn = 'writes YaRN into config.json: a factor and fields, as in eval.py'
  add('--yarn', default='', metavar='FACTOR', help=yarn)
  add('--shard_gib', default=2.0, type=float, help='maximum size of a file, in GiB')
  add(
    '--packing',
    default='grouped',
    choices=('grouped', 'per_head'),
    help="layout of the gate in q_proj: grouped as in the authors' code, with a file of "
    'code for transformers; per_head writes a dense model with an elementwise gate as '
    'Qwen3-Next, which transformers opens without that file',
  )
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
  """The arguments -> the written folder; a ValueError names the invalid flag."""
  size = args.shard_gib * 2**30
  if not (size > 0 and math.isfinite(size)):
    raise ValueError(f'--shard_gib={args.shard_gib} must be positive and finite')
  try:
    hf.files.check_new(args.to)
  except ValueError as error:
    raise ValueError(f'--to={error}') from error
  try:
    source = gated.load(args.source, step=args.step)
  except ValueError as error:
    raise ValueError(f'--from={error}') from error
  try:
    source = source.stretched(args.yarn)
  except ValueError as error:
    raise ValueError(f'--yarn={args.yarn}: {error}') from error
  # Raises ValueError for an unsupported model before reading its weights.
  hf.knobs.write(source.cfg, args.packing, source.cfg.numerics.weights, {})
  keys, copies = _describe(source)
  hf.save(
    source.model,
    args.to,
    dtype=args.dtype,
    shard_bytes=int(size),
    packing=args.packing,
    also=keys,
  )
  for name, path in copies.items():
    shutil.copyfile(path, args.to / name)
  token = _tokenizer(source) if source.about else None
  if source.about and token and token.path:
    begins = source.about['data'].get('ends', {}).get('begins', False)
    for warning in hf.tokens.write(token, args.to, begins=begins):
      print(f'convert_hf.py: {warning}', file=sys.stderr)
  return args.to


def _describe(source: Loaded) -> tuple[dict[str, Any], dict[str, Path]]:
  """A model -> keys of config.json beside the shapes, and files to copy."""
  copies: dict[str, Path] = {}
  if source.about:
    ends = source.about['data'].get('ends', {})  # Older checkpoints have none.
    if token := _tokenizer(source, warn=True):
      ends = {'eos': token.eos} | ({'bos': token.bos} if token.bos_token else {})
    keys = {f'{end}_token_id': ends[end] for end in ('eos', 'bos') if end in ends}
    keys['max_position_embeddings'] = source.about['config']['data']['length']
  else:
    folder = Path(source.path)
    content = hf.files.read_json(folder / hf.files.CONFIG)
    keys = {key: content[key] for key in KEPT if content.get(key) is not None}
    paths = {name: hf.files.inside(folder, name) for name in FILES}
    copies = {name: path for name, path in paths.items() if path.is_file()}
    if not copies.keys() & {*TOKENIZERS}:
      _warn(f'{folder} has none of {", ".join(TOKENIZERS)}')
  if source.cfg.attn.yarn.factor != 1:
    keys.pop('max_position_embeddings', None)  # YaRN sets it.
  return keys, copies


def _tokenizer(source: Loaded, *, warn: bool = False) -> tokenizer.Tokenizer | None:
  """The tokenizer of a run; None if it is gone with its dataset."""
  try:
    token = source.tokenizer
  except (OSError, ValueError) as error:
    if warn:
      _warn(str(error))
    return None
  if warn and not token.path:
    _warn(f'{token.name!r} has no file; its ids are bytes, and {token.eos} ends a text')
  return token


def _warn(reason: str) -> None:
  print(f'convert_hf.py: no tokenizer: {reason}', file=sys.stderr)


def main(argv: list[str]) -> int:
  args = parse(argv)
  try:
    with Progress('converting'):
      line = run(args)
    print(line)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'convert_hf.py: {error}', file=sys.stderr)
    return REFUSED
  return 0


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main(sys.argv[1:]))
