"""A recipe and a workdir -> a run that passed every check; nothing is compiled yet."""

import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from gated import config, data, evals, storage
from gated.devices import mesh, processes
from gated.plan import cautions
from gated.plan.plan import Chooser, Plan, due
from gated.plan.recipe import Config
from gated.run import checkpoint, metrics, weights
from gated.run import workdir as workdirs
from gated.train import guard, optim

_log = logging.getLogger('gated')


class Run(NamedTuple):
  """A run that may start or resume."""

  config: dict  # the resolved recipe
  workdir: storage.Path
  plan: Plan
  corpus: data.Corpus
  lowered: Any  # the train step, lowered but not compiled
  weights: weights.Source | None  # of config.init_from
  resume: workdirs.Resume  # the step to restore, and the changes since
  sample: Callable | None  # as of evals.sampler; None without config.log.samples
  restore_step: str  # the flag

  def record_session(self) -> None:
    """Adds this session to run.json, on process 0."""
    if jax.process_index() == 0:
      metrics.manifest(
        self.workdir / 'run.json',
        config=self.config,
        data=self.corpus.fingerprint,
        restored=self.resume.step,
        changed=self.resume.changed,
      )

  def changed_rates(self, saves: checkpoint.Checkpoints, state: Any) -> dict[str, float]:
    """A restored state -> its last and its next learning rate, which are also logged.

    {} unless config.steps or config.optim have changed since the step was saved.
    """
    if self.resume.step is None:
      return {}
    old = saves.about(self.resume.step)['config']
    parts = [{k: c[k] for k in ('steps', 'optim')} for c in (old, self.config)]
    changed = config.differences(*parts)
    if not changed:
      return {}
    before = config.build(optim.Config, old['optim'], 'config.optim')
    count = int(guard.scheduled(state.opt))
    was: Any = optim.schedule(before, old['steps'])(max(count - 1, 0))
    now: Any = self.plan.schedule(count)
    rates = {'lr_last': float(was), 'lr_next': float(now)}
    knobs = ', '.join(f'{knob} {a!r} -> {b!r}' for knob, (a, b) in changed.items())
    line = '%s: the next learning rate is %.4g, the last was %.4g'
    _log.info(line, knobs, now, was)
    return rates

  def watch(self) -> Callable[..., dict[str, tuple[Any, Callable]]]:
    """Like `Plan.watch`, with the kind 'samples', whose texts this call computes."""
    watch, sample, every = self.plan.watch(), self.sample, self.plan.cfg.log.samples
    if sample is None:
      return watch

    def run(step, model, batch):
      measured = watch(step, model, batch)
      if due(every, step):
        texts = sample(model)
        measured['samples'] = (), lambda _: texts
      return measured

    return run

  def evaluates(self, step: int) -> bool:
    """Whether a step ends with an evaluation: at intervals, at saves and at the end."""
    cfg = self.plan.cfg
    ends = step % cfg.checkpoint.every == 0 or step == cfg.steps
    return step > 0 and (ends or step % cfg.eval.every == 0)

  def owes_evaluation(self, step: int) -> bool:
    """Whether a signal or a kill came between the save of a step and its evaluation."""
    if not (self.corpus.domains and self.evaluates(step)):
      return False
    path = self.workdir / 'metrics.jsonl'
    records = metrics.read(path) if metrics.exists(path) else []
    kinds = {record.get('kind') for record in records if record['step'] == step}
    first, *_ = processes.gather('' if 'heldout' in kinds else 'owes')
    return first == 'owes'

  def first_state(self, saves: checkpoint.Checkpoints) -> Any:
    """The state that a session starts from: a saved step, other weights, or fresh."""
    if self.resume.step is not None:
      state = saves.restore(self.resume.step, self.plan.state)
      data_step = saves.go_back(self.resume.step, asked=self.restore_step)
      if data_step is None:
        return state
      placed = jax.device_put(np.int32(data_step), state.data_step.sharding)
      return dataclasses.replace(state, data_step=placed)
    state = self.plan.init()
    if self.weights:
      like = self.plan.state.model
      model, source = weights.read(self.weights, like, state.model)
      if source != self.weights and jax.process_index() == 0:
        given = self.plan.cfg.init_from
        metrics.amend(
          self.workdir / 'run.json', {'config.init_from': (given, str(source))}
        )
      state = dataclasses.replace(state, model=model)
    return state


def prepare(
  c: dict,
  workdir: storage.Path,
  *,
  allowed: Collection[str],
  restore_step: str,
  choose: Chooser | None,
) -> Run:
  """A resolved recipe and a workdir -> Run.

  `allowed` and `restore_step` are as in `workdir.check`, `choose` as in `Plan`. Raises
  ValueError if the recipe, the data or the workdir cannot be used.
  """
  cfg = config.build(Config, c, 'config')
  if jax.config.values['jax_disable_jit']:
    raise ValueError('JAX_DISABLE_JIT is set, but the train step is compiled: unset it')
  metrics.check_wandb(cfg.log.wandb)
  metrics.check_remote(workdir, profile_first=cfg.log.profile_first)
  plan = Plan(cfg, choose=choose)
  corpus = data.open(cfg.data, **plan.reads)
  if mesh.platform() == 'gpu' and cfg.model.mask_documents:
    counts = corpus.max_segments, corpus.mean_segments
    plan = Plan(fitted(plan.cfg, *counts), choose=choose)
  fingerprint = corpus.fingerprint
  resume = workdirs.check(
    workdir, c, fingerprint, like=plan.state, allowed=allowed, restore_step=restore_step
  )
  source = None
  if cfg.init_from and resume.step is None:
    source = weights.find(cfg.init_from, plan.state.model, corpus, allowed)
    resume.changed['config.init_from'] = cfg.init_from, str(source)
    for knob, change in source.differs.items():
      resume.changed[f'{knob} since config.init_from'] = change
  agreed = {'config': c, 'data': fingerprint['sha256'], 'step': resume.step}
  processes.agree('the recipe, the data or the checkpoints', config.digest(agreed))
  _log.info('%s', plan)
  for caution in cautions.of(cfg):
    _log.warning('%s', caution)
  if not corpus.domains:
    _log.info('the data has no held-out rows: no held-out loss, and no best step')
  sample = _sampler(plan, corpus) if cfg.log.samples else None
  step = plan.train_step()
  return Run(c, workdir, plan, corpus, step, source, resume, sample, restore_step)


def fitted(cfg: Config, most: int, mean: float) -> Config:
  """The recipe for rows of at most and on average so many documents.

  The memory and the time of cuDNN's backward pass grow with the number of documents that
  there is room for.
  """
  changes: dict[str, Any] = dict(max_segments=max(1, most))
  if not cfg.model.attn.mean_segments:
    changes['mean_segments'] = mean
  attn = dataclasses.replace(cfg.model.attn, **changes)
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attn=attn))


def _sampler(plan: Plan, corpus: data.Corpus) -> Callable:
  cfg = plan.cfg
  log = cfg.log
  return evals.sampler(
    corpus,
    log.sample_prompts,
    evals.Sampling(
      max_tokens=log.sample_tokens, temperature=log.sample_temperature, seed=cfg.seed
    ),
    cfg=cfg.model,
    on=plan.mesh,
    context=cfg.data.length,
  )
