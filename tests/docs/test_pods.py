"""The files of docs/pods start runs that exist."""

import pathlib
import re
import shlex

import pytest
import yaml

from modelstock_jax.training import config as config_lib

PODS = pathlib.Path(__file__).parents[2] / 'docs' / 'pods'


def of_script(name):
  text = (PODS / name).read_text().replace('\\\n', ' ')
  [command] = re.findall(r'modelstock train .*', text)
  return shlex.split(command)


def of_manifest():
  [job] = yaml.safe_load((PODS / 'jobset.yaml').read_text())['spec'][
    'replicatedJobs'
  ]
  pod = job['template']['spec']['template']['spec']
  assert job['template']['spec']['parallelism'] == 2
  [container] = pod['containers']
  return container['command']


@pytest.mark.parametrize('name', ['jobset.yaml', 'queued_resource.sh'])
def test_commands_have_valid_flags(name):
  command = of_manifest() if name.endswith('yaml') else of_script(name)
  assert command[:2] == ['modelstock', 'train']
  flags = dict(flag.split('=', 1) for flag in command[2:])
  path = config_lib.bundled(flags.pop('--config'))
  assert flags.pop('--workdir').startswith('/bucket/runs/')
  config = config_lib.load(path, [f'{k}={v}' for k, v in flags.items()])
  assert config.mesh.stock == config.merge.num_models == 2
