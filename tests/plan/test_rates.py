"""A run whose schedule has changed says how its learning rate jumps on resumption."""

import types

import pytest
import small

from gated import config, plan, storage
from gated.run import workdir
from gated.train import guard, optim

OPTIM = dict(optim__warmup=2, optim__lr=1e-3, optim__floor=1e-5)


def resumed(now, monkeypatch, *, step=10, **before):
  """A run of 10 steps by default, which goes on at `step` with the knobs of `now`."""
  old, new = (small.recipe(**OPTIM | {'steps': 10} | k) for k in (before, now))
  cfg = config.build(plan.Config, new, 'config')
  schedule = types.SimpleNamespace(cfg=cfg, schedule=optim.schedule(cfg.optim, cfg.steps))
  monkeypatch.setattr(guard, 'scheduled', lambda _: step)
  resume = workdir.Resume(step, [step], {})
  fields = dict(config=new, plan=schedule, resume=resume, workdir=storage.path('run'))
  run = plan.Run(**dict.fromkeys(plan.Run._fields) | fields)
  saves = types.SimpleNamespace(about=lambda _: {'config': old})
  return run.changed_rates(saves, types.SimpleNamespace(opt=None))


def test_a_longer_run_tells_its_last_and_its_next_learning_rate(monkeypatch, caplog):
  with caplog.at_level('INFO', logger='gated'):
    rates = resumed(dict(steps=20), monkeypatch)
  assert rates['lr_last'] == pytest.approx(1e-5)
  # Half of the way of the cosine from 1e-3 to 1e-5.
  assert rates['lr_next'] == pytest.approx(5.05e-4)
  [line] = caplog.messages
  assert line.startswith('config.steps 10 -> 20: the next learning rate is 0.000')
  assert line.endswith(', the last was 1e-05')


def test_another_optimizer_is_told_too_and_the_same_is_not(monkeypatch, caplog):
  with caplog.at_level('INFO', logger='gated'):
    rates = resumed(dict(optim__lr=2e-3), monkeypatch, step=5)
    assert rates['lr_next'] > 1.4 * rates['lr_last']
    assert 'config.optim.lr 0.001 -> 0.002' in caplog.text
    caplog.clear()
    assert resumed({}, monkeypatch) == {}
  assert not caplog.messages
