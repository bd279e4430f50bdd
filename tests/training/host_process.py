"""`modelstock` as one of several processes, told apart by their environment.

SLOW is a pause before each step, in seconds: time to act. WORKDIR is what
--workdir is to be. FAIL is the process that cannot find its data.
"""

import os
import sys
import time

from modelstock_jax.cli import main
from modelstock_jax.training import clip_task
from modelstock_jax.training import hosts

_prepare = clip_task.prepare


def _slow(config, **hooks):
  if os.environ.get('FAIL') == os.environ['JAX_PROCESS_ID']:
    raise ValueError('no such data')
  setup = _prepare(config, **hooks)

  def train(*arguments):
    time.sleep(float(os.environ.get('SLOW', 0)))
    return setup.programs.train(*arguments)

  return setup._replace(programs=setup.programs._replace(train=train))


if __name__ == '__main__':
  clip_task.prepare = _slow
  hosts._SEE_SECONDS = 2.0
  sys.exit(main.main([*sys.argv[1:], f'--workdir={os.environ["WORKDIR"]}']))
