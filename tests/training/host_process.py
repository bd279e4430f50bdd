"""`modelstock` as one of several processes, told apart by their environment.

SLOW is a pause before each step, in seconds: time to act. WORKDIR is what
--workdir is to be. FAIL is the process that cannot find its data.
"""

import os
import sys
import time

from modelstock_jax.cli import main
from modelstock_jax.training import hosts
from modelstock_jax.training import loop

_prepare = loop.prepare


def _slow(config):
  if os.environ.get('FAIL') == os.environ['JAX_PROCESS_ID']:
    raise ValueError('no such data')
  setup = _prepare(config)

  def train(state, batch):
    time.sleep(float(os.environ.get('SLOW', 0)))
    return setup.programs.train(state, batch)

  return setup._replace(programs=setup.programs._replace(train=train))


if __name__ == '__main__':
  loop.prepare = _slow
  hosts._SEE_SECONDS = 2.0
  sys.exit(main.main([*sys.argv[1:], f'--workdir={os.environ["WORKDIR"]}']))
