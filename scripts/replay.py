"""A step that went wrong, computed once more, and then in float32: data or arithmetic?

  python scripts/replay.py --workdir=runs/tiny-elementwise-1a2b3c4d --step=57

Takes a step from the run's spikes.jsonl, restores the newest checkpoint that leads to it,
trains up to it by the run's own train step, and looks at its batch. On the run's machines
and versions the loss is the run's to the last bit. In float32 are then weights and
products, from the state that its own numerics led to. Writes nothing. Exit 2: refused.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from gated import config, data, plan, storage
from gated.devices import mesh, processes, trees
from gated.run import checkpoint, events, metrics
from gated.run import workdir as workdirs
from gated.train import guard, step

REFUSED = 2
LETTERS, LARGEST = 80, 3  # Of a row that are shown; parameters that are named.
FIELDS = {'step': int, 'data_step': int, 'action': str, 'why': str, 'records': list}
FIELDS |= {'loss': float, 'grad_norm': float}

_log = logging.getLogger('gated')


class Replay(NamedTuple):
  """What is to be computed again, and all that it takes."""

  event: dict  # of the ledger
  the: plan.Plan
  corpus: data.Corpus
  step: Any  # the run's own train step, lowered
  start: int  # the step that was restored; 0 for the run's first state
  state: step.State  # at `start`, its data where the run read on


def prepare(a: argparse.Namespace) -> Replay:
  """The command line -> Replay; ValueError, naming the flag, if there is none."""
  workdir = storage.path(a.workdir)
  if not storage.exists(workdir / 'run.json'):
    raise ValueError(f'--workdir={a.workdir} holds no run: there is no run.json')
  config.at_least('--rows', a.rows, 1)
  recorded_events = recorded(workdir)
  event = find(recorded_events, a)
  c, sha256 = recipe(workdir, event['step'])
  c['data'] |= {'workers': 0, 'cache': a.cache}
  the = plan.Plan(config.build(plan.Config, c, 'config'))
  corpus = data.open(the.cfg.data, **the.reads)
  if not corpus.fingerprint['sha256'].startswith(sha256):
    told = 'is no longer what the run was trained on (another Python version, or dataset)'
    raise ValueError(f'config.data.mixture={the.cfg.data.mixture!r} {told}')
  check_records(event, corpus, a.workdir)
  lowered = the.train_step()
  with checkpoint.Reader(workdir / 'checkpoints') as saved:
    start, state = restore(saved, the, event, recorded_events)
  return Replay(event, the, corpus, lowered, start, state)


def recorded(workdir: storage.Path) -> list[dict]:
  """A workdir -> its ledger's events; ValueError if they are not what a run wrote."""
  try:
    found = events.read(workdir)
    for event in found:
      for name, kind in FIELDS.items():
        if not isinstance(event[name], kind):
          raise TypeError(f'{name}={event[name]!r}')
    return found
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    told = f'--workdir={workdir}: {events.NAME} is damaged: {error!r}'
    raise ValueError(told[:300]) from error


def find(recorded_events: list[dict], a: argparse.Namespace) -> dict:
  """The event of --step, and --data_step if given: the last, where there are several."""
  steps = [e for e in recorded_events if e['step'] == a.step]
  if found := [e for e in steps if a.data_step in (None, e['data_step'])]:
    return found[-1]
  name, those = ('data_step', steps) if steps else ('step', recorded_events)
  there = ', '.join(map(str, sorted({e[name] for e in those}))) or 'nothing'
  value = a.data_step if steps else a.step
  raise ValueError(f'--{name}={value} is not in {events.NAME}, where there is {there}')


def recipe(workdir: storage.Path, at: int) -> tuple[dict, str]:
  """A workdir and a step -> the recipe that did it, and how its data's SHA-256 begins.

  It is the one in run.json, with what later sessions changed taken back.
  """
  try:
    run = json.loads(storage.read(workdir / 'run.json', workdirs.LIMIT))
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
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    told = f'--workdir={workdir}: run.json cannot be used: {error!r}'
    raise ValueError(told[:300]) from error


def check_records(event: dict, corpus: data.Corpus, workdir: str) -> None:
  """Raises ValueError, naming the first that differs, unless the batch is the event's."""
  told, found = event['records'], corpus.record_ids(event['data_step'])
  where = f'--workdir={workdir}: {events.NAME}, step {event["step"]}'
  for row, (there, here) in enumerate(itertools.zip_longest(told, found)):
    if there != here:
      raise ValueError(f'{where}: row {row} was {there}, but is {here}'[:500])


def restore(
  saved: checkpoint.Reader, the: plan.Plan, event: dict, recorded_events: list[dict]
):
  """-> the newest step that leads to the event, and its state, the data as they went on.

  A run went on from a step with the next batch, or past those of a later rollback.
  """
  before, tried = event['step'] - 1, {}
  there = saved.steps()
  fresh = [] if the.cfg.init_from or 0 in there else [0]
  for at in [*(at for at in reversed(there) if at <= before), *fresh]:
    try:
      if at in there:
        saved.verify(at)
      state = saved.restore(at, the.state) if at in there else the.init()
    except checkpoint.Damaged as error:
      _log.warning('passed over: %s', error)
      continue
    tried[at] = int(state.data_step)
    back = [e for e in recorded_events if e['action'] == 'rollback' and e['step'] > at]
    start = event['data_step'] - (before - at)
    if start in (tried[at], *(e['data_step'] + 1 for e in back)):
      where = jax.device_put(np.int32(start), state.data_step.sharding)
      return at, dataclasses.replace(state, data_step=where)
    del state
  told = ', '.join(f'{at} (data step {d})' for at, d in tried.items()) or 'none'
  why = f'no checkpoint leads to it at data step {event["data_step"]}; before it are'
  raise ValueError(f'--step={event["step"]}: {why} {told}, all that are there: {there}')


def replay(run: Replay, rows: int) -> dict:
  """-> what was recorded, what comes out now, and in float32, ready for JSON."""
  event, the, corpus, _, start, state = run
  cfg, after = the.cfg, event['step'] - 1 - start
  _log.info('step %d: %s', event['step'], event['why'])
  _log.info('it is reached by %d steps from step %d', after, start)
  step_of_run = run.step.compile()
  batches = corpus.train(int(state.data_step), mesh.rows(the.mesh, cfg.batch))
  for _ in range(after):
    state, _ = step_of_run(state, mesh.place(next(batches), the.mesh, cfg.batch))
  batch = mesh.place(next(batches), the.mesh, cfg.batch)
  exact = plan.Plan(widened(cfg))
  leaves = trees.flatten(state)
  leaves |= {k: v.astype(jnp.float32) for k, v in leaves.items() if k[:6] == 'model.'}
  wide = trees.unflatten(exact.state, leaves)
  found = {'recorded': {name: event[name] for name in ('loss', 'grad_norm')}}
  for name, its, at in (('float32', exact, wide), ('recomputed', the, state)):
    with jax.set_mesh(its.mesh):
      found[name] = summary(*jax.device_get(look(its)(at, batch)))
    found[name]['rows'] = losses(its, at.model, corpus, event['data_step'])
  # The run's own step comes last: it takes the state, and has the bits of the run.
  _, values = step_of_run(state, batch)
  found['recomputed'] |= summary(jax.device_get(values), {})
  bits = lambda name: [repr(found[name][k]) for k in ('loss', 'grad_norm')]
  return {
    **{name: event[name] for name in ('step', 'data_step', 'why')},
    'restored_step': start,
    'same_bits': bits('recorded') == bits('recomputed'),
    'verdict': verdict(found),
    'worst': worst(found, event, corpus, rows),
    **{name: {k: v for k, v in x.items() if k != 'rows'} for name, x in found.items()},
  }


def widened(cfg: plan.Config) -> plan.Config:
  """A recipe -> the same, all in float32, by kernels that take it."""
  with_ = dataclasses.replace
  numerics = with_(cfg.model.numerics, weights='float32', compute='float32')
  attn, experts = (with_(c, backend='auto') for c in (cfg.model.attn, cfg.model.moe))
  return with_(cfg, model=with_(cfg.model, numerics=numerics, attn=attn, moe=experts))


def look(the: plan.Plan) -> Callable:
  """-> a jitted (state, batch) -> (the step's metrics, its gradients' norms by name).

  Of a parameter that stacks the layers, the norm of each layer.
  """

  axes = lambda name, g: tuple(range(1 if name.startswith('blocks.') else 0, g.ndim))

  def norm(name, g):
    return jnp.sqrt(jnp.square(g.astype(jnp.float32)).sum(axes(name, g)))

  def run(state, batch):
    gradients = step.gradients(state.model, batch, accum=the.cfg.accum, loss=the.cfg.loss)
    _, values = step.update(state, gradients, tx=the.tx, schedule=the.schedule)
    return values, {k: norm(k, g) for k, g in trees.flatten(gradients.grads).items()}

  where = NamedSharding(the.mesh, P())
  return jax.jit(plan.exact(the.cfg.model, run), out_shardings=where)


def summary(values: dict, norms: dict) -> dict:
  """A step's metrics and gradients' norms, on the host -> what is told of them."""
  told: dict[str, Any] = {k: float(values[k]) for k in ('loss', 'grad_norm')}
  told['guard'] = guard.VERDICTS[int(values['verdict'])]
  order = lambda item: math.inf if math.isnan(item[1]) else item[1]
  each = sorted(_each(norms), key=order, reverse=True)
  return told | ({'largest': each[:LARGEST]} if each else {})


def _each(norms: dict) -> Iterator[tuple[str, float]]:
  """Norms by name, those of a stack layer by layer -> (blocks.3.ffn.up.weight, norm)."""
  for name, norm in norms.items():
    group, _, rest = name.partition('.')
    names = [f'{group}.{i}.{rest}' for i in range(norm.size)] if norm.ndim else [name]
    yield from zip(names, map(float, np.ravel(norm)))


def losses(the: plan.Plan, params: Any, corpus: data.Corpus, data_step: int) -> list:
  """-> the nats per token of each row of a step's batch."""
  cfg, on, rows = the.cfg, the.mesh, mesh.rows(the.mesh, the.micro)
  evaluate = plan.evaluate_step(cfg.model, on, cfg.loss.chunk)
  found = []
  for first in range(0, cfg.batch, the.micro):
    part = next(corpus.train(data_step, [first + row for row in rows]))
    nats, weight = jax.device_get(evaluate(params, mesh.place(part, on, the.micro)))
    found += (nats / np.maximum(weight, 1e-9)).tolist()
  return found


def worst(found: dict, event: dict, corpus: data.Corpus, count: int) -> list[dict]:
  """-> the rows of the largest losses, how their text begins, and where they lie."""
  each = list(zip(found['recomputed']['rows'], found['float32']['rows']))
  rank = lambda row: max(math.inf if math.isnan(x) else x for x in each[row])
  told = []
  for row in sorted(range(len(each)), key=rank, reverse=True)[:count]:
    ids_N = corpus.row(event['data_step'] * len(each) + row)['tokens'][: 8 * LETTERS]
    text = corpus.tokenizer.decode(ids_N.astype(np.int32))
    found = dict(zip(('recomputed', 'float32'), each[row]))
    found |= {'row': row, 'record': event['records'][row]}
    told.append(found | {'text': text.decode(errors='replace')[:LETTERS]})
  return told


def verdict(found: dict) -> str:
  """What was recorded and what came out -> whose fault it is, in a line."""
  finite = lambda name: all(math.isfinite(found[name][k]) for k in ('loss', 'grad_norm'))
  if found['recomputed']['guard'] == 'fine':
    return 'computed again, nothing is wrong with it'
  said = 'no spike' if finite('recorded') else 'finite'
  healed = finite('float32') and not finite('recorded')
  if healed or found['float32']['guard'] == 'fine':
    return f'in float32 the loss is {said}: arithmetic'
  update = finite('float32') and found['float32']['guard'] == 'not finite'
  return f'the {"optimizer" if update else "batch"} itself does it'


def table(found: dict) -> str:
  """The report -> lines to read."""
  lines = [f'{"":12}{"loss":>12}{"grad norm":>12}  guard       largest gradients']
  for name in ('recorded', 'recomputed', 'float32'):
    of = found[name]
    large = ', '.join(f'{k} {v:.3g}' for k, v in of.get('largest', ()))
    numbers = f'{name:12}{of["loss"]:12.6g}{of["grad_norm"]:12.6g}'
    lines.append(f'{numbers}  {of.get("guard", ""):12}{large}'.rstrip())
  same = 'the same bits as recorded' if found['same_bits'] else 'not the bits recorded'
  lines += [f'recomputed: {same}', '', f'{"row":>4}{"recomputed":>12}{"float32":>12}']
  for row in found['worst']:
    record = ' '.join(map(str, row['record']))
    numbers = f'{row["row"]:4}{row["recomputed"]:12.6g}{row["float32"]:12.6g}'
    lines.append(f'{numbers}  {record}  {row["text"]!r}')
  return '\n'.join([*lines, '', found['verdict']])


def parse(argv: list[str]) -> argparse.Namespace:
  how = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
  add = parser.add_argument
  add('--workdir', required=True, help='of a run of train.py, on a disk or in a store')
  add('--step', type=int, required=True, help='of spikes.jsonl')
  add('--data_step', type=int, help='which, if the step is there several times')
  add('--rows', type=int, default=5, help='that are shown')
  add('--cache', default='', help="where the embedded corpus is; '' as usual")
  add('--coordinator', default='', help="'auto' or HOST:PORT of process 0")
  add('--processes', type=int, default=1, help='as many as the run had')
  add('--process', type=int, default=0, help='which of them this is')
  add('--start_timeout', type=float, default=300, help='seconds to wait for all of them')
  return parser.parse_args(argv)


def main() -> int:
  a = parse(sys.argv[1:])
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  _log.setLevel(logging.INFO)
  try:
    where = a.coordinator, a.processes, a.process
    limit = base.get_config().stability.peer_timeout
    processes.start(*where, peer_timeout=limit, start_timeout=a.start_timeout)
    run = prepare(a)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f'replay.py: {error}', file=sys.stderr)
    return REFUSED
  found = replay(run, a.rows)
  if jax.process_index() == 0:
    print(f'{table(found)}\n{metrics.dumps(found, indent=None)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
