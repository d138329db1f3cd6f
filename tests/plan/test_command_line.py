"""A mistake on the command line is refused in one line that says what to write."""

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from configs import base, tiny
from gated import config
from gated.plan import command

TINY = '--config=configs/tiny.py'


def parse(*words):
  """A command line of a program with the flags --config and --dry_run -> the recipe."""
  argv, values = ['train.py', *words], flags.FlagValues()
  command.define_recipe(flags, config_flags, flag_values=values, sys_argv=argv)
  flags.DEFINE_bool('dry_run', False, 'Check, and exit.', flag_values=values)
  command.parse(argv, values, base, 'The doc.', folder='workdir')
  return values.config.to_dict()


HEADWISE = (
  'headwise is --config.model.attn.gate.position=sdpa '
  '--config.model.attn.gate.granularity=headwise'
)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--lr=1e-3'], '--lr is not a flag; knobs .*: --config.optim.lr=1e-3$'),
    (['--batch_size', '4'], '--batch_size is not a flag; .*: --config.batch=4$'),
    (['--optim.lr=1e-3'], '--optim.lr is not a flag; .*: --config.optim.lr=1e-3$'),
    (['--seed'], '--seed is not a flag; .*: --config.seed=VALUE$'),
    (['--dryrun'], r'--dryrun is not a flag; did you mean --dry_run\?'),
    (['--zzzz'], '--zzzz is not a flag; --help lists the flags'),
    (['lr=1e-3'], r"unknown argument 'lr=1e-3'; did you mean --config.optim.lr=1e-3\?"),
    (['config.steps=3'], r'did you mean --config.steps=3\?'),
    (['configs/tiny.py'], r'did you mean --config=configs/tiny.py\?'),
    (['docs'], r"unknown argument 'docs'; did you mean --workdir=docs\?"),
    (['zzzz'], "unknown argument 'zzzz'$"),
    (
      ['--config.optim.learning_rate=1'],
      r'is not a knob; did you mean config.optim.lr\?',
    ),
    (['--config.steps=1e3'], "config.steps='1e3', but a value of type int is expected"),
    (
      ['--config.steps', '--dry_run'],
      "config.steps='--dry_run', but a value of type int",
    ),
    (['--config.optim.lr=x'], "config.optim.lr='x', but a value of type float"),
    (['--config.model.tied=7'], "config.model.tied='7', but a value of type bool"),
    (
      ['--config.model.attn.gate=headwise'],
      f'config.model.attn.gate is a group of knobs: activation, .*; presets: {HEADWISE}$',
    ),
    (
      ['--config.model.attn.gate', 'per_head'],
      f'presets: none is --config.model.attn.gate.position=none; {HEADWISE}; elementwise',
    ),
    (['--config.mesh=8'], 'config.mesh is a group of knobs: choice, context, data, .*'),
  ],
)
def test_a_mistake_is_refused_with_what_to_write(words, message):
  with pytest.raises(ValueError, match=message) as caught:
    parse(TINY, *words)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (
      ['--config=tiny'],
      r"'tiny' is not a recipe; did you mean --config=configs/tiny.py\?",
    ),
    (['--config', 'configs/table7.py'], 'did you mean --config=configs/table'),
    (['--config=zzzz'], 'is not a recipe; recipes here: .*configs/tiny.py'),
    (['--config=configs/axes.py'], 'is not a recipe'),
    (['--config.steps=3'], '--config=configs/RECIPE.py is missing'),
    (['--config='], '--config=configs/RECIPE.py is missing'),
    ([f'{TINY}:huge'], "recipe argument 'huge': allowed are gate=.*, gate=none$"),
    ([f'{TINY}:headwise'], r'allowed are .*; did you mean gate=headwise\?'),
  ],
)
def test_a_wrong_recipe_is_refused_with_the_nearest_one(words, message):
  with pytest.raises(ValueError, match=message):
    parse(*words)


def test_a_flagfile_that_cannot_be_read_is_refused_in_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as left:
    parse(TINY, f'--flagfile={tmp_path}/none')
  assert left.value.code == 2
  [line] = capsys.readouterr().err.splitlines()
  assert 'Unable to open flagfile' in line and f'{tmp_path}/none' in line
  (tmp_path / 'some').write_text('--config.seed=7\n--dry_run\n')
  assert parse(TINY, f'--flagfile={tmp_path}/some')['seed'] == 7


def test_a_right_command_line_is_parsed_in_all_its_forms():
  c = parse('--config', 'configs/tiny.py:gate=none', '--config.optim.lr', '0.5')
  assert (c['name'], c['optim']['lr']) == ('tiny-none', 0.5)
  assert parse(TINY, '--config.model.tied=false', '--dry_run')['model']['tied'] is False


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_lists_recipes_knobs_and_flags_and_exits(flag, capsys, monkeypatch):
  monkeypatch.setattr('sys.argv', [__name__])  # Where absl files the flags above.
  with pytest.raises(SystemExit) as left:
    parse('--config=zzzz', flag)
  assert left.value.code == 0
  printed = capsys.readouterr().out
  assert printed.startswith('The doc.\n')
  assert '--config=configs/RECIPE.py[:ARGUMENT]' in printed
  assert f'  tiny.py       {tiny.__doc__.splitlines()[0]}\n' in printed
  assert 'axes.py' not in printed and '--config.optim.lr=1e-3' in printed
  assert '  --dry_run          Check, and exit.\n' in printed


@pytest.mark.parametrize('returned', ['None', "{'steps': 3}", "ConfigDict({'steps': 3})"])
def test_a_recipe_that_returns_something_else_is_refused(returned, tmp_path):
  path = tmp_path / 'recipe.py'
  lines = f'def get_config():\n  return {returned}\n'
  path.write_text(f'from ml_collections import ConfigDict\n{lines}')
  with pytest.raises(ValueError, match=r'get_config.. of the recipe returned a '):
    parse(f'--config={path}')


def test_help_names_a_recipe_that_is_half_written(tmp_path, capsys, monkeypatch):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/half.py').write_bytes(b'def get_config(:')
  (tmp_path / 'configs/latin.py').write_bytes(b'"""Caf\xe9."""\ndef get_config(): pass')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.argv', [__name__])
  with pytest.raises(SystemExit):
    parse('--config=zzzz', '--help')
  printed = capsys.readouterr().out
  assert '  half.py       (cannot be read: ' in printed
  assert '  latin.py      (cannot be read: ' in printed


def test_every_preset_is_a_valid_group():
  for group, presets in base.PRESETS.items():
    for knobs in presets.values():
      words = [f'--config.{group}.{knob}={value}' for knob, value in knobs.items()]
      chosen = config.dig(parse(TINY, *words), group)
      assert chosen | knobs == chosen


def test_a_printed_recipe_is_yaml_with_its_differences_marked():
  c = parse('--config=configs/table1.py:g1_headwise,scale=test', '--config.steps=7')
  defaults = base.get_config().to_dict()
  printed = command.as_yaml(c, defaults)
  loaded = yaml.safe_load(printed)
  assert config.flatten(loaded) == config.flatten(c)
  assert printed.count('  # base: ') == len(config.differences(defaults, c))
  lines = [' '.join(line.split()) for line in printed.splitlines()]
  assert 'steps: 7 # base: 1000' in lines
  assert 'granularity: headwise # base: elementwise' in lines
  assert 'ppl: 5.792 # base: missing' in lines
  assert 'norm_eps: 1.0e-06' in lines and 'seed: 0' in lines
  assert '#' not in command.as_yaml(defaults, defaults)
