"""The bytes that a train step moves on a GPU, by kernel, without a GPU.

  python bench/traffic.py configs/dense_1b7.py:28l batch=8 model.depth=4
  python bench/traffic.py --top=60 configs/moe_15b.py batch=8 model.depth=2 ...

XLA compiles the step for one H200, here: that needs JAX's CUDA plugin, from `pip install
"jax[cuda12]"` in the version of JAX here. The recipe and its overrides are as for
train_step.py. A kernel's bytes are those of its operands and results, each counted once:
a part of an array counts as all of it, and the body of a loop is not looked into. No time
is measured. Without a GPU, XLA cannot try variants of a kernel, so products are cuBLAS's.
"""

import argparse
import collections
import os
import re

os.environ['CUDA_VISIBLE_DEVICES'] = ''
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_gpu_enable_triton_gemm=false'
)

import timing
from jax._src import xla_bridge
from jax.experimental import topologies
from step_profile import kind, places
from train_step import recipe

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
# Instructions of a program that run no kernel.
FREE = 'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all'
WIDTH = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


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
  for name, bits, dims in WIDTH.findall(shape):
    count = 8 if name == 'pred' else int(bits)
    for dim in filter(None, dims.split(',')):
      count *= int(dim)
    total += count // 8
  return total


def kernels(hlo: str):
  """A compiled program -> (operation, call target, shape of result, bytes) of each."""
  entry = hlo.partition('\nENTRY ')[2].partition('\n}')[0]
  line = re.compile(r'^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$', re.M)
  sizes = {}
  for name, shape, operation, rest in line.findall(entry):
    sizes[name] = size(shape)
    if operation not in FREE:
      operands = set(re.findall(r'%([\w.-]+)', rest.partition('), ')[0]))
      target = re.search('custom_call_target="([^"]*)"', rest)
      moved = sizes[name] + sum(sizes.get(o, 0) for o in operands)
      yield name, target[1] if target else '', re.sub(r'\{[^}]*\}', '', shape), moved


def report(hlo: str, top: int) -> None:
  """Prints GB by kind, then of the kernels that move most; equal ones are one line."""
  where, kinds, lines = places(hlo), collections.Counter(), collections.Counter()
  times = collections.Counter()
  for name, target, shape, moved in kernels(hlo):
    own = kind(target or 'fusion', '')
    kinds[own] += moved
    label = own, where.get(name) or name, shape
    lines[label] += moved
    times[label] += 1
  for name, moved in kinds.most_common():
    print(f'{moved / 1e9:9.2f} GB  {name}')
  for label, moved in lines.most_common(top):
    own, place, shape = label
    what = f'{own:9} {place[:70]:70} {shape[:60]}'
    print(f'{moved / 1e9:9.3f} GB {times[label]:4} x  {what}')


def main():
  parser = timing.options(__doc__, documents=1, top=40)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help='KNOB=VALUE ...')
  a = parser.parse_args()
  cfg = fitted(recipe(a.recipe, a.overrides), a.documents, float(a.documents))
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
