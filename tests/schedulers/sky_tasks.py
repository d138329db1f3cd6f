"""Parses tasks and commands with SkyPilot; needs a Python with SkyPilot.

Standard input: JSON, {'tasks': [YAML text], 'commands': [words after `sky jobs`]}.
Standard output: JSON, the parsed tasks and commands, or {'error': ...} for each.
"""

import json
import sys

import click
import sky
import yaml
from sky.client.cli import command
from sky.utils import schemas


def task(text):
  """A task's YAML -> the task as SkyPilot writes it."""
  config = yaml.safe_load(text)
  # For plugins, SkyPilot allows any key here; its schema lists the real ones.
  schema = schemas.get_resources_schema()['properties']['job_recovery']['anyOf'][1]
  unknown = (
    config['resources'].get('job_recovery', {}).keys() - schema['properties'].keys()
  )
  if unknown:
    return {'error': f'job_recovery has no {sorted(unknown)}'}
  parsed = sky.Task.from_yaml_config(config)
  resources = [r.to_yaml_config() for r in parsed.resources]
  return {
    'name': parsed.name,
    'num_nodes': parsed.num_nodes,
    'run': parsed.run,
    'file_mounts': parsed.file_mounts,
    'resources': resources[0],
  }


def words(argv):
  """`sky jobs` ARGV -> its parsed parameters; runs nothing."""
  group = command.cli.commands['jobs']
  verb = group.commands[argv[0]]
  with verb.make_context(argv[0], list(argv[1:])) as context:
    return {k: v for k, v in context.params.items() if isinstance(v, (str, bool, tuple))}


def attempt(parse, content):
  try:
    return parse(content)
  except (ValueError, click.ClickException, KeyError) as error:
    return {'error': f'{type(error).__name__}: {getattr(error, "message", error)}'}


request = json.load(sys.stdin)
answer = {
  'tasks': [attempt(task, text) for text in request['tasks']],
  'commands': [attempt(words, argv) for argv in request['commands']],
}
sys.stdout.write(json.dumps(answer))
