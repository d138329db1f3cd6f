"""Converts a run's checkpoint, or a Hugging Face folder, to a new Hugging Face folder.

  python scripts/convert_hf.py --from=runs/dense:20000 --to=export --dtype=bfloat16
  python scripts/convert_hf.py --from=export --to=other --packing=per_head

A step is a number, latest (the default) or best. No file is overwritten. Exit code 2:
invalid arguments or an unsupported model.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gated
from gated import hf, storage
from gated.data import mixture, shards
from gated.plan.load import Loaded
from gated.run.exit_codes import REFUSED

# Keys of config.json outside the model that the new folder keeps.
KEPT = ('max_position_embeddings', 'bos_token_id', 'eos_token_id', 'pad_token_id')
TOKENIZER = 'tokenizer.json'


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  source = 'a workdir of train.py, or a Hugging Face folder'
  add('--from', required=True, dest='source', metavar='DIR[:STEP]', help=source)
  add('--step', default='', help='instead of :STEP')
  add('--to', required=True, type=Path, help='the new folder')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='dtype of the tensors; default: as in the source, or float32 for Qwen3-Next',
  )
  add('--shard_gib', default=2.0, type=float, help='largest file, in GiB')
  add(
    '--packing',
    default='grouped',
    choices=('grouped', 'per_head'),
    help="layout of the gate in q_proj: grouped as in the authors' code; per_head writes "
    'a dense model with an elementwise gate as Qwen3-Next, which transformers opens',
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
  # Refuses an unsupported model before reading its weights.
  hf.knobs.write(source.cfg, args.packing, source.cfg.numerics.weights, {})
  keys, tokenizer = _describe(source)
  hf.save(
    source.model,
    args.to,
    dtype=args.dtype,
    shard_bytes=int(size),
    packing=args.packing,
    also=keys,
  )
  if tokenizer:
    shutil.copyfile(tokenizer, args.to / TOKENIZER)
  return args.to


def _describe(source: Loaded) -> tuple[dict[str, Any], Path | None]:
  """A model -> (keys of config.json outside the model, its tokenizer.json if any)."""
  if source.about:
    keys, tokenizer = _tokenizer(source.about)
    keys['max_position_embeddings'] = source.about['config']['data']['length']
  else:
    folder = Path(source.path)
    content = hf.files.read_json(folder / hf.files.CONFIG)
    keys = {key: content[key] for key in KEPT if content.get(key) is not None}
    file = hf.files.inside(folder, TOKENIZER)
    tokenizer = file if file.is_file() else None
  if source.cfg.attn.yarn.factor != 1:
    keys.pop('max_position_embeddings', None)  # YaRN sets it.
  return keys, tokenizer


def _tokenizer(about: dict) -> tuple[dict[str, Any], Path | None]:
  """A checkpoint's metadata -> (keys of config.json, tokenizer.json).

  Both are empty if the dataset is missing or has another tokenizer now.
  """
  folder = mixture.terms(about['config']['data']['mixture'])[0].directory
  try:
    tokenizer = shards.read_manifest(folder).tokenizer
  except (OSError, ValueError):
    return {}, None
  if tokenizer.sha256 != about['data']['tokenizer']:
    return {}, None
  name = tokenizer.name
  file = Path(storage.inside(folder, name)) if name.endswith('.json') else None
  return {'eos_token_id': tokenizer.eos}, file


def main(argv: list[str]) -> int:
  args = parse(argv)
  try:
    print(run(args))
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'convert_hf.py: {error}', file=sys.stderr)
    return REFUSED
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
