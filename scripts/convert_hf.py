"""A run's weights -> a folder that transformers and hf.load read; or another such folder.

  python scripts/convert_hf.py --from=runs/dense:20000 --to=export --dtype=bfloat16
  python scripts/convert_hf.py --from=export --to=other --packing=per_head

The step of a run is its latest unless named after a colon (best is allowed). Nothing is
overwritten. Exit code 2: refused.
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

REFUSED = 2
# What a config.json may say beside the model, and another one takes over.
KEPT = ('max_position_embeddings', 'bos_token_id', 'eos_token_id', 'pad_token_id')
TOKENIZER = 'tokenizer.json'


class Source(NamedTuple):
  """What is to be written."""

  params: model.Transformer
  also: dict[str, Any]  # Further keys of config.json.
  tokenizer: Path | None


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--from',
    required=True,
    dest='source',
    metavar='DIR[:STEP]',
    help='a workdir of train.py, or a Hugging Face folder',
  )
  add('--to', required=True, type=Path, help='the new folder')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='of the files; default: as they are, but float32 for what was Qwen3-Next',
  )
  add('--shard_gib', default=2.0, type=float, help='GiB in a file')
  add(
    '--packing',
    default='grouped',
    choices=('grouped', 'per_head'),
    help="where a gate lies in q_proj: grouped, as in the authors' code; per_head writes "
    'a dense model with an elementwise gate as Qwen3-Next, which transformers opens',
  )
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
  """The arguments -> the folder written; ValueError for what cannot be."""
  size = args.shard_gib * 2**30
  if not (size > 0 and math.isfinite(size)):
    raise ValueError(
      f'--shard_gib={args.shard_gib}, but a positive, finite number is expected'
    )
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
    also=source.also,
  )
  if source.tokenizer:
    shutil.copyfile(source.tokenizer, args.to / TOKENIZER)
  return args.to


def _open(text: str, packing: str) -> Source:
  """'DIR[:STEP]' -> what lies there."""
  place, step = text, ''
  if not Path(text).is_dir():
    place, _, step = text.rpartition(':')
  folder = Path(place)
  if not place or not folder.is_dir():
    raise ValueError(f'--from={text}: there is no such folder')
  if (folder / 'checkpoints').is_dir():
    return _from_run(folder, step, packing)
  if not hf.is_checkpoint(folder):
    raise ValueError(
      f'--from={text}: neither a workdir, nor a folder of config.json and *.safetensors'
    )
  if step:
    raise ValueError(f'--from={text}: {place} is no workdir, so it has no steps')
  said = hf.files.read_json(folder / hf.files.CONFIG)
  also = {key: said[key] for key in KEPT if key in said and said[key] is not None}
  beside, params = hf.files.inside(folder, TOKENIZER), hf.load(folder)
  also = _unstretched(params.cfg, also)
  return Source(params, also, beside if beside.is_file() else None)


def _from_run(workdir: Path, step: str, packing: str) -> Source:
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    at = saved.pick(step or 'latest', '--from=DIR:STEP')
    about = saved.about(at)
    cfg = config.build(model.Config, about['config']['model'], 'config.model')
    hf.knobs.write(cfg, packing, cfg.numerics.weights, {})  # Refuses before it reads.
    params = saved.restore_model(at, plan.reading(cfg)[1])
  length = {'max_position_embeddings': about['config']['data']['length']}
  stated, file = _tokenizer(about)
  return Source(params, _unstretched(cfg, stated | length), file)


def _unstretched(cfg: model.Config, also: dict[str, Any]) -> dict[str, Any]:
  """Without the length, where YaRN has set it."""
  plain = cfg.attn.yarn.factor == 1
  return {k: v for k, v in also.items() if plain or k != 'max_position_embeddings'}


def _tokenizer(about: dict) -> tuple[dict[str, Any], Path | None]:
  """What a run's dataset says of its tokenizer, and its file, if they are still there."""
  folder = mixture.terms(about['config']['data']['mixture'])[0].directory
  try:
    stated = shards.read_manifest(folder).tokenizer
  except (OSError, ValueError):
    return {}, None
  if stated['sha256'] != about['data']['tokenizer']:
    return {}, None
  file = Path(shards.inside(folder, stated['name']))
  known = {'eos_token_id': stated['eos']}
  return known, file if stated['name'].endswith('.json') else None


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
