"""A run in a process of its own, for tests to kill: CONFIG WORKDIR [FLAG...].

`SLOW` as an environment variable is a pause after each step, in seconds: time
for the test to see what it waits for.
"""

import logging
import os
import sys
import time

from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop


def main(path, workdir, *flags):
  logging.basicConfig(level=logging.INFO)
  config = config_lib.load(path, flags)
  setup = loop.prepare(config)

  def train(state, batch):
    time.sleep(float(os.environ.get('SLOW', 0)))
    return setup.programs.train(state, batch)

  programs = setup.programs._replace(train=train)
  loop.train(config, workdir, setup=setup._replace(programs=programs))


if __name__ == '__main__':
  main(*sys.argv[1:])
