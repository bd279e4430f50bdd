"""One of several processes that only talk: FOLDER; prints what it heard.

FOLDER is for all of them, FOLDER/<process> of each alone.
"""

import json
import pathlib
import sys
import time

import jax

from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import workdir as workdir_lib


def _text(call, *args):
  """The result of a call, or its error."""
  try:
    return call(*args)
  except Exception as error:
    return f'{type(error).__name__}: {error}'


def _refuse():
  raise FileNotFoundError('there is no anchor')


def _claim(folder):
  with workdir_lib.claim(folder, config_lib.Config().to_json()):
    pass


def main(folder):
  hosts.start()
  me = jax.process_index()
  heard = {}
  heard['gather'] = hosts.gather('abc'[me])
  heard['first'] = hosts.run_on_process_0(lambda: {'process': me})
  heard['again'] = hosts.run_on_process_0(lambda: [me])
  heard['refused'] = _text(hosts.run_on_process_0, _refuse)
  shared = pathlib.Path(folder)
  individual = shared / str(me)
  individual.mkdir()
  begun = time.monotonic()
  heard['shared'] = _text(hosts.check_shared, shared)
  heard['seconds'] = time.monotonic() - begun
  hosts._SEE_SECONDS = 0.5
  heard['own'] = _text(hosts.check_shared, individual)
  heard['left'] = sorted(path.name for path in shared.iterdir())
  heard['claim'] = _text(_claim, shared / 'broken')
  heard['processes'] = jax.process_count()
  print(json.dumps(heard))


if __name__ == '__main__':
  main(*sys.argv[1:])
