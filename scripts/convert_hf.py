"""Writes a run's weights, or a Hugging Face folder, as a new Hugging Face folder.

  python scripts/convert_hf.py --from=runs/dense:20000 --to=export --dtype=bfloat16
  python scripts/convert_hf.py --from=export --to=other --packing=per_head

A run's latest step is converted, or the step after the colon: a number or best. Nothing
is overwritten. Exit code 2: refused.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gated import config, hf, model, plan
from gated.data import mixture, shards
from gated.run import checkpoint
from gated.run.exit_codes import REFUSED

# Keys of config.json outside the model that the new folder keeps.
KEPT = ('max_position_embeddings', 'bos_token_id', 'eos_token_id', 'pad_token_id')
TOKENIZER = 'tokenizer.json'


class Source(NamedTuple):
  """A model to convert."""

  params: model.Transformer
  keys: dict[str, Any]  # of config.json, outside the model
  tokenizer: Path | None


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  source = 'a workdir of train.py, or a Hugging Face folder'
  add('--from', required=True, dest='source', metavar='DIR[:STEP]', help=source)
  add('--to', required=True, type=Path, help='the new folder')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='of the files; default: that of the source, or float32 for Qwen3-Next',
  )
  add('--shard_gib', default=2.0, type=float, help='GiB per file')
  add(
    '--packing',
    default='grouped',
    choices=('grouped', 'per_head'),
    help="layout of the gate in q_proj: grouped as in the authors' code; per_head writes "
    'a dense model with an elementwise gate as Qwen3-Next, which transformers opens',
  )
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
  """The arguments -> the written folder; a ValueError names the flag at fault."""
  size = args.shard_gib * 2**30
  if not (size > 0 and math.isfinite(size)):
    raise ValueError(f'--shard_gib={args.shard_gib} must be positive and finite')
  try:
    hf.files.check_new(args.to)
  except ValueError as error:
    raise ValueError(f'--to={error}') from error
  source = _open(args.source, args.packing)
  hf.save(
    source.params,
    args.to,
    dtype=args.dtype,
    shard_bytes=int(size),
    packing=args.packing,
    also=source.keys,
  )
  if source.tokenizer:
    shutil.copyfile(source.tokenizer, args.to / TOKENIZER)
  return args.to


def _open(text: str, packing: str) -> Source:
  """'DIR[:STEP]' -> the model, from a run or a Hugging Face folder."""
  place, step = text, ''
  if not Path(text).is_dir():
    place, _, step = text.rpartition(':')
  folder = Path(place)
  if not place or not folder.is_dir():
    raise ValueError(f'--from={text}: no such folder')
  if (folder / 'checkpoints').is_dir():
    params, keys, tokenizer = _open_run(folder, step, packing)
  elif not hf.is_checkpoint(folder):
    raise ValueError(
      f'--from={text}: neither a workdir, nor a folder of config.json and *.safetensors'
    )
  elif step:
    raise ValueError(f'--from={text}: {place} is not a workdir, so it has no steps')
  else:
    content = hf.files.read_json(folder / hf.files.CONFIG)
    keys = {key: content[key] for key in KEPT if content.get(key) is not None}
    file = hf.files.inside(folder, TOKENIZER)
    params, tokenizer = hf.load(folder), file if file.is_file() else None
  if params.cfg.attn.yarn.factor != 1:
    keys.pop('max_position_embeddings', None)  # YaRN sets it.
  return Source(params, keys, tokenizer)


def _open_run(workdir: Path, step: str, packing: str) -> Source:
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    at = saved.pick(step or 'latest', '--from=DIR:STEP')
    about = saved.about(at)
    cfg = config.build(model.Config, about['config']['model'], 'config.model')
    # Refuses an unsupported model before it reads the weights.
    hf.knobs.write(cfg, packing, cfg.numerics.weights, {})
    params = saved.restore_model(at, plan.reading(cfg)[1])
  keys, tokenizer = _tokenizer(about)
  keys['max_position_embeddings'] = about['config']['data']['length']
  return Source(params, keys, tokenizer)


def _tokenizer(about: dict) -> tuple[dict[str, Any], Path | None]:
  """A checkpoint's manifest -> keys of config.json, and tokenizer.json if intact."""
  folder = mixture.terms(about['config']['data']['mixture'])[0].directory
  try:
    tokenizer = shards.read_manifest(folder).tokenizer
  except (OSError, ValueError):
    return {}, None
  if tokenizer['sha256'] != about['data']['tokenizer']:
    return {}, None
  name = tokenizer['name']
  file = Path(shards.inside(folder, name)) if name.endswith('.json') else None
  return {'eos_token_id': tokenizer['eos']}, file


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
