"""A run in a process of its own, for tests to kill.

  process.py CONFIG WORKDIR [FLAG...]
  process.py --serve CONFIG [FLAG...]

The second one forks for each WORKDIR that it reads from standard input, before
jax has started anything: a new process without the time to import. It prints
the id of that process, its 'training' just before the first step, and its exit
code.

`SLOW` as an environment variable is a pause before each step, in seconds: time
for the test to see what it waits for.
"""

import logging
import os
import sys
import time

from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop


def main(path, workdir, *flags):
  logging.basicConfig(level=logging.INFO)
  config = config_lib.load(path, flags)
  setup = clip_task.prepare(config)
  begun = []

  def train(*arguments):
    if not begun:
      print('training', flush=True)
    begun.append(True)
    time.sleep(float(os.environ.get('SLOW', 0)))
    return setup.programs.train(*arguments)

  programs = setup.programs._replace(train=train)
  loop.train(config, workdir, setup=setup._replace(programs=programs))


def serve(path, *flags):
  while workdir := sys.stdin.readline().strip():
    child = os.fork()
    if not child:
      main(path, workdir, *flags)
      return
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
  if sys.argv[1] == '--serve':
    serve(*sys.argv[2:])
  else:
    main(*sys.argv[1:])
