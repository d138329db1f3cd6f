"""What a run records of itself, and how often."""

from dataclasses import dataclass

from gated import config


@dataclass(frozen=True, kw_only=True)
class Config:
  every: int
  tensorboard: bool
  wandb: str
  profile_first: int
  profile_last: int
  indicators: int

  def __post_init__(self):
    config.at_least('config.log.every', self.every, 1)
    config.at_least('config.log.indicators', self.indicators, 0)
    if self.profile_first >= 0 and self.profile_last < self.profile_first:
      first, last = self.profile_first, self.profile_last
      raise ValueError(
        f'config.log.profile_last={last} is before config.log.profile_first={first}'
      )
