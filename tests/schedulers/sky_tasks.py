"""Reads tasks and commands as SkyPilot itself does; run by a Python that has it.

Standard input: JSON, {'tasks': [YAML text], 'commands': [words after `sky jobs`]}.
Standard output: for each what SkyPilot understood, or {'error': ...}.
"""

import json
import sys

import click
import sky
import yaml
from sky.client.cli import command
from sky.utils import schemas


def task(text):
  """A task's YAML -> the same as SkyPilot writes it."""
  config = yaml.safe_load(text)
  # To keep room for plugins SkyPilot lets any key pass here, so its own schema is asked.
  known = schemas.get_resources_schema()['properties']['job_recovery']['anyOf'][1]
  unknown = (
    config['resources'].get('job_recovery', {}).keys() - known['properties'].keys()
  )
  if unknown:
    return {'error': f'job_recovery has no {sorted(unknown)}'}
  read = sky.Task.from_yaml_config(config)
  resources = [r.to_yaml_config() for r in read.resources]
  return {
    'name': read.name,
    'num_nodes': read.num_nodes,
    'run': read.run,
    'file_mounts': read.file_mounts,
    'resources': resources[0],
  }


def words(argv):
  """`sky jobs` ARGV -> its parameters, as its own parser takes them; nothing is run."""
  group = command.cli.commands['jobs']
  verb = group.commands[argv[0]]
  with verb.make_context(argv[0], list(argv[1:])) as context:
    return {k: v for k, v in context.params.items() if isinstance(v, (str, bool, tuple))}


def attempt(read, given):
  try:
    return read(given)
  except (ValueError, click.ClickException, KeyError) as error:
    return {'error': f'{type(error).__name__}: {getattr(error, "message", error)}'}


asked = json.load(sys.stdin)
answer = {
  'tasks': [attempt(task, text) for text in asked['tasks']],
  'commands': [attempt(words, argv) for argv in asked['commands']],
}
sys.stdout.write(json.dumps(answer))
