"""Recomputes a bad step of a run, also in float32: is the data or the precision at fault?

  python scripts/replay.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=57

Restores the newest checkpoint that leads to a step of spikes.jsonl and trains up to it
with the run's own train step. On the same machines and versions, the loss equals the
run's to the last bit. The float32 pass starts from the same state, with weights and
matrix products in float32. Writes nothing. Exit code 2: refused.
"""

import argparse
import dataclasses
import functools
import heapq
import itertools
import logging
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from gated import config, data, model, storage
from gated import plan as plans
from gated.devices import mesh, processes, trees
from gated.run import checkpoint, events, metrics, terminal
from gated.run import workdir as workdirs
from gated.run.exit_codes import REFUSED
from gated.train import guard, step

LETTERS, LARGEST = 80, 3  # Letters shown of a row; parameters shown by gradient norm.
FIELDS = {'step': int, 'data_step': int, 'action': str, 'why': str, 'records': list}
FIELDS |= {'loss': float, 'grad_norm': float}

_log = logging.getLogger('gated')


class Replay(NamedTuple):
  """A step to recompute."""

  event: dict  # its line in spikes.jsonl
  plan: plans.Plan
  corpus: data.Corpus
  step: Any  # the run's own train step, lowered
  start: int  # the restored step; 0 for the run's first state
  state: step.State  # at `start`, with the data step that the run continued from


def prepare(args: argparse.Namespace) -> Replay:
  """The command line -> Replay; a ValueError names the flag or file at fault."""
  args.workdir, args.step = workdirs.split_step(args.workdir, args.step)
  workdir = storage.path(args.workdir)
  if not storage.exists(workdir / 'run.json'):
    raise ValueError(f'--workdir={args.workdir} holds no run: run.json is missing')
  config.at_least('--rows', args.rows, 1)
  history = read_events(workdir)
  event = find(history, args)
  recipe_dict, sha256 = recipe(workdir, event['step'])
  recipe_dict['data'] |= {'workers': 0, 'cache': args.cache}
  plan = plans.Plan(config.build(plans.Config, recipe_dict, 'config'))
  corpus = data.open(plan.cfg.data, **plan.reads)
  if not corpus.fingerprint['sha256'].startswith(sha256):
    raise ValueError(
      f'config.data.mixture={plan.cfg.data.mixture!r} has changed since the run was '
      'trained (another dataset or Python version)'
    )
  check_records(event, corpus, args.workdir)
  lowered = plan.train_step()
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    start, state = restore(saved, plan, event, history)
  return Replay(event, plan, corpus, lowered, start, state)


def read_events(workdir: storage.Path) -> list[dict]:
  """A workdir -> the events of spikes.jsonl; ValueError for a missing or wrong field."""
  history = events.read(workdir)
  for event in history:
    for name, kind in FIELDS.items():
      if not isinstance(event.get(name), kind):
        fault = f'step {event["step"]} has {name}={event.get(name)!r}'
        raise ValueError(f'--workdir={workdir}: {events.NAME} is damaged: {fault}'[:300])
  return history


def find(history: list[dict], args: argparse.Namespace) -> dict:
  """The last event of --step and, if given, of --data_step."""
  candidates = history
  for flag in ('step', 'data_step'):
    value = getattr(args, flag)
    matches = [e for e in candidates if value in ('', 'latest', str(e[flag]))]
    if not matches:
      listed = ', '.join(map(str, sorted({e[flag] for e in candidates}))) or 'no events'
      named = f'--{flag}={value or "latest"}'
      raise ValueError(f'{named} is not in {events.NAME}, which has {listed}')
    candidates = matches
  return candidates[-1]


def recipe(workdir: storage.Path, at: int) -> tuple[dict, str]:
  """A workdir and a step -> its recipe, and the first digits of its data's SHA-256.

  This is the recipe of run.json, without the changes of later sessions.
  """
  try:
    run = storage.read_json(workdir / 'run.json', workdirs.LIMIT)
    c, sha256 = dict(run['config']), run['data']['sha256']
    known = config.flatten(c)
    for session in reversed(run['sessions']):
      if session['restored_step'] < at:
        break
      for knob, (before, _) in session['changed'].items():
        if knob == 'data':
          sha256 = before
        elif knob in known:
          *groups, last = knob.split('.')[1:]
          functools.reduce(lambda group, key: group[key], groups, c)[last] = before
    return c | {'data': dict(c['data'])}, str(sha256)
  except (OSError, ValueError, KeyError, TypeError) as error:
    message = f'--workdir={workdir}: run.json cannot be used: {error!r}'
    raise ValueError(message[:300]) from error


def check_records(event: dict, corpus: data.Corpus, workdir: str) -> None:
  """Raises ValueError for the first row of the batch that is not the event's record."""
  pairs = itertools.zip_longest(event['records'], corpus.record_ids(event['data_step']))
  for row, (recorded, current) in enumerate(pairs):
    if recorded != current:
      place = f'--workdir={workdir}: {events.NAME}, step {event["step"]}'
      raise ValueError(f'{place}: row {row} was {recorded}, but is {current}'[:500])


def restore(
  saved: checkpoint.Reader, plan: plans.Plan, event: dict, history: list[dict]
) -> tuple[int, step.State]:
  """-> the newest step that leads to the event, and its state with the data step set.

  After a step, the run read the next batch, or, if it rolled back to that step, the batch
  after the bad one.
  """
  before, tried = event['step'] - 1, {}
  steps = saved.steps()
  initial = [] if plan.cfg.init_from or 0 in steps else [0]
  for at in [*(at for at in reversed(steps) if at <= before), *initial]:
    try:
      if at in steps:
        saved.verify(at)
      state = saved.restore(at, plan.state) if at in steps else plan.init()
    except checkpoint.Damaged as error:
      _log.warning('skipped: %s', error)
      continue
    tried[at] = int(state.data_step)
    rollbacks = [e for e in history if e['action'] == 'rollback' and e['step'] > at]
    start = event['data_step'] - (before - at)
    if start in (tried[at], *(e['data_step'] + 1 for e in rollbacks)):
      placed = jax.device_put(np.int32(start), state.data_step.sharding)
      return at, dataclasses.replace(state, data_step=placed)
    del state
  listed = ', '.join(f'{at} (data step {d})' for at, d in tried.items()) or 'none'
  raise ValueError(
    f'--step={event["step"]}: no checkpoint leads to it at data step '
    f'{event["data_step"]}; earlier ones: {listed}; all steps: {steps}'
  )


def replay(run: Replay, rows: int) -> dict:
  """-> the step as recorded, recomputed, and in float32, ready for JSON."""
  event, plan, corpus, _, start, state = run
  cfg, steps = plan.cfg, event['step'] - 1 - start
  _log.info('step %d: %s', event['step'], event['why'])
  _log.info('training %d steps from step %d to reach it', steps, start)
  train = run.step.compile()
  batches = corpus.train(int(state.data_step), mesh.rows(plan.mesh, cfg.batch))
  for _ in range(steps):
    state, _ = train(state, mesh.place(next(batches), plan.mesh, cfg.batch))
  batch = mesh.place(next(batches), plan.mesh, cfg.batch)
  wide_plan = plans.Plan(widened(cfg))
  leaves = trees.flatten(state)
  leaves |= {k: v.astype(jnp.float32) for k, v in leaves.items() if k[:6] == 'model.'}
  wide = trees.unflatten(wide_plan.state, leaves)
  report = {'recorded': {name: event[name] for name in ('loss', 'grad_norm')}}
  losses = {}
  for name, p, s in (('float32', wide_plan, wide), ('recomputed', plan, state)):
    with jax.set_mesh(p.mesh):
      report[name] = summary(*jax.device_get(inspect(p)(s, batch)))
    losses[name] = row_losses(p, s.model, corpus, event['data_step'])
  # The run's own step comes last, because it donates the state. Only this step gives the
  # bits of the run.
  _, values = train(state, batch)
  report['recomputed'] |= summary(jax.device_get(values), {})
  bits = lambda name: [repr(report[name][k]) for k in ('loss', 'grad_norm')]
  return {
    **{name: event[name] for name in ('step', 'data_step', 'why')},
    'restored_step': start,
    'same_bits': bits('recorded') == bits('recomputed'),
    'verdict': verdict(**report),
    'worst': worst(losses, event, corpus, rows),
    **report,
  }


def widened(cfg: plans.Config) -> plans.Config:
  """A recipe -> the same recipe in float32, with kernels that support float32."""
  replace = dataclasses.replace
  kinds = dict(weights='float32', compute='float32', matmul='compute')
  numerics = replace(cfg.model.numerics, **kinds)
  attn, experts = (replace(c, backend='auto') for c in (cfg.model.attn, cfg.model.moe))
  return replace(cfg, model=replace(cfg.model, numerics=numerics, attn=attn, moe=experts))


def inspect(plan: plans.Plan) -> Callable:
  """-> a jitted (state, batch) -> (the step's metrics, gradient norms by parameter).

  The norm of a parameter that stacks the layers is an array with an entry per layer.
  """

  def norm(name, g):
    axes = tuple(range(1 if name.startswith('blocks.') else 0, g.ndim))
    return jnp.sqrt(jnp.square(g.astype(jnp.float32)).sum(axes))

  def run(state, batch):
    cfg = plan.cfg
    gradients = step.gradients(state.model, batch, accum=cfg.accum, loss=cfg.loss)
    _, values = step.update(state, gradients, tx=plan.tx, schedule=plan.schedule)
    return values, {k: norm(k, g) for k, g in trees.flatten(gradients.grads).items()}

  replicated = NamedSharding(plan.mesh, P())
  return jax.jit(model.exact(plan.cfg.model.numerics, run), out_shardings=replicated)


def summary(values: dict, norms: dict) -> dict:
  """A step's metrics and gradient norms, on the host -> the part that is reported."""
  report: dict[str, Any] = {k: float(values[k]) for k in ('loss', 'grad_norm')}
  report['guard'] = guard.VERDICTS[int(values['verdict'])]
  named = {}
  for name, norm in norms.items():
    group, _, rest = name.partition('.')
    for layer, value in enumerate(np.ravel(norm)):
      named[f'{group}.{layer}.{rest}' if norm.ndim else name] = float(value)
  largest = heapq.nlargest(LARGEST, named.items(), key=lambda item: _nan_last(item[1]))
  return report | ({'largest': largest} if largest else {})


def _nan_last(value: float) -> tuple[bool, float]:
  """A sort key that puts NaN above all numbers."""
  return math.isnan(value), value


def row_losses(
  plan: plans.Plan, params: Any, corpus: data.Corpus, data_step: int
) -> list:
  """-> the nats per token of each row of a step's batch."""
  cfg, rows = plan.cfg, mesh.rows(plan.mesh, plan.micro)
  evaluate = plans.evaluate_step(cfg.model, plan.mesh, cfg.loss.chunk)
  losses = []
  for first in range(0, cfg.batch, plan.micro):
    part = next(corpus.train(data_step, [first + row for row in rows]))
    part = mesh.place(part, plan.mesh, plan.micro)
    nats, weight = jax.device_get(evaluate(params, part))
    losses += (nats / np.maximum(weight, 1e-9)).tolist()
  return losses


def worst(losses: dict, event: dict, corpus: data.Corpus, count: int) -> list[dict]:
  """-> the rows of the largest losses: both losses, record, and the start of the text."""
  pairs = list(zip(losses['recomputed'], losses['float32']))
  rank = lambda row: max(map(_nan_last, pairs[row]))
  report = []
  for row in heapq.nlargest(count, range(len(pairs)), key=rank):
    ids_N = corpus.row(event['data_step'] * len(pairs) + row)['tokens'][: 8 * LETTERS]
    text = corpus.tokenizer.decode(ids_N.astype(np.int32)).decode(errors='replace')
    values = {name: losses[name][row] for name in ('recomputed', 'float32')}
    record = event['records'][row]
    report.append(values | {'row': row, 'record': record, 'text': text[:LETTERS]})
  return report


def verdict(recorded: dict, recomputed: dict, float32: dict) -> str:
  """The three results of a step -> the likely cause, in one line."""
  finite = lambda values: all(math.isfinite(values[k]) for k in ('loss', 'grad_norm'))
  if recomputed['guard'] == 'fine':
    return 'the recomputed step is fine'
  healed = finite(float32) and not finite(recorded)
  if healed or float32['guard'] == 'fine':
    result = 'no spike' if finite(recorded) else 'finite'
    return f'arithmetic: in float32 the loss is {result}'
  update = finite(float32) and float32['guard'] == 'not finite'
  return f'the {"optimizer" if update else "batch"} itself causes it'


def table(report: dict) -> str:
  """The report as text."""
  lines = [f'{"":12}{"loss":>12}{"grad norm":>12}  guard       largest gradients']
  for name in ('recorded', 'recomputed', 'float32'):
    values = report[name]
    largest = ', '.join(f'{k} {v:.3g}' for k, v in values.get('largest', ()))
    numbers = f'{name:12}{values["loss"]:12.6g}{values["grad_norm"]:12.6g}'
    lines.append(f'{numbers}  {values.get("guard", ""):12}{largest}'.rstrip())
  same = 'the same bits as' if report['same_bits'] else 'other bits than'
  lines += [f'recomputed: {same} recorded', '']
  lines.append(f'{"row":>4}{"recomputed":>12}{"float32":>12}')
  for row in report['worst']:
    record = ' '.join(map(str, row['record']))
    numbers = f'{row["row"]:4}{row["recomputed"]:12.6g}{row["float32"]:12.6g}'
    lines.append(f'{numbers}  {record}  {row["text"]!r}')
  return '\n'.join([*lines, '', report['verdict']])


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--workdir', required=True, help='WORKDIR or WORKDIR:STEP of train.py')
  add('--step', default='', help='a step of spikes.jsonl, or latest, the default')
  add('--data_step', default='', help='chooses among several events of the step')
  add('--rows', type=int, default=5, help='rows to show')
  add('--cache', default='', help="folder of the embedded corpus; '' for the default")
  add('--coordinator', default='', help="'auto' or HOST:PORT of process 0")
  add('--processes', type=int, default=1, help='as many as the run had')
  add('--process', type=int, default=0, help='the index of this process')
  add('--start_timeout', type=float, default=300, help='seconds to wait for all of them')
  return parser.parse_args(argv)


def main() -> int:
  args = parse(sys.argv[1:])
  _log.setLevel(logging.INFO)
  own = args.coordinator, args.processes, args.process
  timeout = base.get_config().stability.peer_timeout
  try:
    processes.start(*own, peer_timeout=timeout, start_timeout=args.start_timeout)
    run = prepare(args)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'replay.py: {error}', file=sys.stderr)
    return REFUSED
  report = replay(run, args.rows)
  if jax.process_index() == 0:
    print(f'{table(report)}\n{metrics.dumps(report, indent=None)}')
  return 0


if __name__ == '__main__':
  terminal.steady()
  sys.exit(main())
