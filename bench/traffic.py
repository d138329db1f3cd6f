"""The bytes that a train step moves on a GPU, by kernel, without a GPU.

  python bench/traffic.py configs/dense_1b7.py:28l batch=8 model.depth=4
  python bench/traffic.py --top=60 configs/moe_15b.py batch=8 model.depth=2 ...

XLA compiles the step for one H200, here: that needs JAX's CUDA plugin, from `pip install
"jax[cuda12]"` in the version of JAX here. The recipe and its overrides are as for
train_step.py. A kernel's bytes are those of its operands and results, each counted once,
and of a part that it slices, the part; kernels of a loop count as often as they run. No
time is measured. Without a GPU, XLA cannot try variants of a kernel, so products are
cuBLAS's.
"""

import argparse
import collections
import os
import re
from typing import NamedTuple

import timing
from jax._src import xla_bridge
from jax.experimental import topologies
from step_profile import kind, places
from train_step import recipe_or_exit

from gated.plan import Plan
from gated.plan.prepare import fitted

TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 19 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 62914560
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
FLAGS = '--xla_gpu_enable_triton_gemm=false'
# Instructions that run no kernel.
FREE = 'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'
PART = 'slice', 'dynamic-slice', 'gather'  # They read a part of their first operand.
TYPES = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
LINE = re.compile(r'^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$', re.M)


class Instruction(NamedTuple):
  name: str
  shape: str  # of the result
  operation: str
  operands: list[str]  # names; of a parameter, its number
  rest: str  # the text after the operands' bracket


def devices():
  """One H200 that is not here."""
  ours = xla_bridge.canonicalize_platform

  def canonical(name):  # JAX refuses the name of a platform without devices.
    try:
      return ours(name)
    except RuntimeError:
      return {'gpu': 'cuda'}.get(name, name)

  xla_bridge.canonicalize_platform = canonical
  target = dict(target_config=TARGET, topology='1x1x1')
  return list(topologies.get_topology_desc(platform='cuda', **target).devices)


def size(shape: str) -> int:
  """The text of a shape, or of a tuple of them -> bytes."""
  total = 0
  for name, bits, dims in TYPES.findall(shape):
    count = 8 if name == 'pred' else int(bits)
    for dim in filter(None, dims.split(',')):
      count *= int(dim)
    total += count // 8
  return total


def computations(hlo: str) -> dict[str, list[Instruction]]:
  """A compiled program -> the instructions of each computation; '' is the whole step."""
  found = {}
  for entry, name, body in re.findall(
    r'^(ENTRY )?%?([\w.-]+) \(.*?\{$(.*?)^\}$', hlo, re.M | re.S
  ):
    lines = []
    for own, shape, operation, rest in LINE.findall(body):
      operands, _, after = rest.partition(')')
      operands = re.findall(r'[\w.-]+', operands)
      lines.append(Instruction(own, shape, operation, operands, after))
    found['' if entry else name] = lines
  return found


def moved(one: Instruction, sizes: dict[str, int], body: list[Instruction]) -> int:
  """The bytes that a kernel reads and writes; of a fusion, `body` is what it fuses."""
  inside = {i.name: size(i.shape) for i in body}
  total, written = 0, sizes[one.name]
  parameters = {i.operands[0]: i.name for i in body if i.operation == 'parameter'}
  for number, operand in enumerate(one.operands):
    own = parameters.get(str(number))
    users = [i for i in body if own in i.operands[:1]]
    others = [i for i in body if own in i.operands[1:]]
    if users and not others and all(i.operation in PART for i in users):
      total += sum(inside[i.name] for i in users)
    elif len(users) == 1 and not others and users[0].operation == 'dynamic-update-slice':
      # It writes a part of its first operand, in place.
      written += inside[users[0].operands[1]] - sizes.get(operand, 0)
    elif operand not in one.operands[:number]:
      total += sizes.get(operand, 0)
  return total + written


def kernels(hlo: str):
  """A program -> (names, call target, shape, bytes, times run) of each kernel."""
  all_of = computations(hlo)

  def walk(lines, times):
    sizes = {i.name: size(i.shape) for i in lines}
    for one in lines:
      attribute = lambda key, one=one: (re.findall(key, one.rest) or [''])[0]
      if one.operation == 'while':
        trips = int(attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
        yield from walk(all_of[attribute(r'body=%([\w.-]+)')], times * trips)
      elif one.operation not in FREE:
        body = all_of.get(attribute(r'calls=%([\w.-]+)'), [])
        # A fusion can hold a call and the slices that it reads.
        calls = [i for i in (one, *body) if 'custom_call_target' in i.rest]
        target = (
          re.findall('custom_call_target="([^"]*)"', calls[0].rest) if calls else []
        )
        names = [one.name, *(i.name for i in calls)]
        shape = re.sub(r'\{[^}]*\}', '', one.shape)
        yield names, ''.join(target), shape, moved(one, sizes, body), times

  yield from walk(all_of[''], 1)


def report(hlo: str, top: int) -> None:
  """Prints GB by kind, then of the kernels that move most; equal ones are one line."""
  where, kinds, lines = places(hlo), collections.Counter(), collections.Counter()
  counts = collections.Counter()
  for names, target, shape, bytes_, times in kernels(hlo):
    place = next(filter(None, map(where.get, names)), names[0])
    own = kind(target, place) if target else kind(names[0], 'fusion')
    kinds[own] += times * bytes_
    lines[own, place, shape] += times * bytes_
    counts[own, place, shape] += times
  print(f'{kinds.total() / 1e9:9.2f} GB  in all')
  for name, bytes_ in kinds.most_common():
    print(f'{bytes_ / 1e9:9.2f} GB  {name}')
  for label, bytes_ in lines.most_common(top):
    own, place, shape = label
    what = f'{own:9} {place[:70]:70} {shape[:60]}'
    print(f'{bytes_ / 1e9:9.3f} GB {counts[label]:4} x  {what}')


def main():
  parser = timing.options(__doc__, documents=1, top=40)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help='KNOB=VALUE ...')
  a = parser.parse_args()
  # XLA reads them when a backend is first used.
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FLAGS}'
  cfg = recipe_or_exit(parser, a.recipe, a.overrides)
  cfg = fitted(cfg, a.documents, float(a.documents))
  try:
    absent = devices()
  except NotImplementedError as problem:
    parser.error(f'{problem}: JAX finds no CUDA plugin; see the first lines of --help')
  step = Plan(cfg, devices=absent).train_step().compile()
  print(' '.join([a.recipe, *a.overrides]), f'{a.documents} documents a row', sep=', ')
  memory = step.memory_analysis()
  print(f'{memory.temp_size_in_bytes / 2**30:9.2f} GiB of temporaries')
  report(step.as_text(), a.top)


if __name__ == '__main__':
  main()
