"""What the device does in each millisecond of a train step, by kind and by kernel.

  python bench/step_profile.py configs/dense_1b7.py:28l batch=8
  python bench/step_profile.py --top=40 configs/dense_1b7.py:28l,scale=proxy batch=64 ...

The recipe and its overrides are as for train_step.py. Three steps are traced after two
others. A fusion is elementwise work and sums; `no kernel` is the time in which none ran.
Kernels are added up by pass (fwd, back), last operation and the functions that it is in.
"""

import argparse
import collections
import glob
import itertools
import re
import tempfile

import jax
import numpy as np
import timing
from train_step import random_batch, recipe_or_exit

from gated.devices import mesh
from gated.plan import Plan
from gated.plan.prepare import fitted

STEPS = 3

# Kind -> what the names of its kernels contain. The first match counts.
KINDS = {
  'attention': 'fmha|flash|sdpa|attention|cudnn',
  'matmul': 'gemm|nvjet|cutlass|cublas|matmul|dot|grouped|ynn',
  'copy': 'memcpy|memset|copy',
  'fusion': 'fusion|reduce|transpose|scatter|gather|sort|broadcast|convert',
}


def kind(kernel: str, op: str) -> str:
  """The names of a kernel and of its HLO operation -> its kind."""
  for name, pattern in KINDS.items():
    if re.search(pattern, kernel, re.IGNORECASE) or re.search(pattern, op, re.IGNORECASE):
      return name
  return 'other'


def places(hlo: str) -> dict[str, str]:
  """A compiled program -> {operation: the functions that it was traced in}."""
  functions = dict(re.findall(r'^(\d+) "(.*)"$', section(hlo, 'FunctionNames'), re.M))
  location = r'^(\d+) \{.*?function_name_id=(\d+)'
  located = dict(re.findall(location, section(hlo, 'FileLocations'), re.M))
  frame = r'^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?'
  frames = {
    i: (functions.get(located.get(at, ''), ''), above)
    for i, at, above in re.findall(frame, section(hlo, 'StackFrames'), re.M)
  }
  line = (
    r'%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"(?:[^}]*stack_frame_id=(\d+))?'
  )
  return {
    op: ' '.join(
      ['back' if 'transpose(' in path else 'fwd', path.split('/')[-1], *calls(frames, at)]
    )
    for op, path, at in re.findall(line, hlo)
  }


def section(hlo: str, name: str) -> str:
  """The text of one of the tables at the start of a program."""
  return hlo.partition(f'\n{name}\n')[2].partition('\n\n')[0]


def calls(frames: dict[str, tuple[str, str]], at: str) -> list[str]:
  """The last four functions of a stack, outermost last."""
  names = []
  while at in frames and frames[at][1] != at:
    name, at = frames[at]
    names.append(name.rpartition('.')[2] if '<' not in name else name)
  return names[:4]


def traced(step, state, batches, folder: str):
  """Runs steps -> (kernel, HLO operation, start, length in ms) of each event."""
  for batch in batches[:2]:
    state, values = step(state, batch)
  jax.block_until_ready(values)
  with jax.profiler.trace(folder):
    for batch in batches[:STEPS]:
      state, values = step(state, batch)
    jax.block_until_ready(values)
  file = sorted(glob.glob(f'{folder}/plugins/profile/*/*.xplane.pb'))[-1]
  for plane in jax.profiler.ProfileData.from_file(file).planes:
    if not plane.name.startswith(('/device:GPU:0', '/host:CPU')):
      continue
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if 'hlo_op' in stats or 'Stream' in line.name:
          op = str(stats.get('hlo_op', ''))
          yield event.name, op, event.start_ns / 1e6, event.duration_ns / 1e6


def busy(events) -> float:
  """-> the ms in which at least one kernel ran."""
  total, end = 0.0, -1.0
  for _, _, start, length in sorted(events, key=lambda event: event[2]):
    total += max(0.0, start + length - max(end, start))
    end = max(end, start + length)
  return total


def main():
  parser = timing.options(__doc__, documents=1, top=40)
  parser.add_argument('recipe', help='configs/RECIPE.py:ARGUMENT')
  parser.add_argument('overrides', nargs=argparse.REMAINDER, help='KNOB=VALUE ...')
  a = parser.parse_args()
  cfg = recipe_or_exit(parser, a.recipe, a.overrides)
  cfg = fitted(cfg, a.documents, float(a.documents))
  plan = Plan(cfg)
  step = plan.train_step().compile()
  rng = np.random.default_rng(0)
  batches = [random_batch(cfg, a.documents, rng) for _ in range(STEPS)]
  batches = [mesh.place(batch, plan.mesh, cfg.batch) for batch in batches]
  with tempfile.TemporaryDirectory() as folder:
    events = list(traced(step, plan.init(), batches, folder))
  settings = [a.recipe, *a.overrides, f'{a.documents} documents a row']
  print(timing.title(' '.join(settings)))
  report(events, places(step.as_text()), a.top)


def report(events, where: dict[str, str], top: int):
  """Prints ms a step by kind, then of the kernels that took the most."""
  kinds, kernels = collections.Counter(), collections.defaultdict(lambda: [0.0, 0])
  for kernel, op, _, length in events:
    name = kind(kernel, op)
    kinds[name] += length / STEPS
    row = kernels[name, where.get(op) or f'{kernel[:60]} {op}'.strip()]
    row[0] += length / STEPS
    row[1] += 1
  first = min(start for _, _, start, _ in events)
  span = (max(start + length for *_, start, length in events) - first) / STEPS
  kinds['no kernel'] = span - busy(events) / STEPS
  print(f'{span:9.2f} ms a step, {len(events) / STEPS:.0f} kernels')
  for name, ms in kinds.most_common():
    print(f'{ms:9.2f} {100 * ms / span:5.1f}%  {name}')
  ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
  for (name, label), (ms, count) in itertools.islice(ranked, top):
    print(f'{ms:9.3f} {count / STEPS:6.0f} x  {name:9} {label[:110]}')


if __name__ == '__main__':
  main()
