"""Runs commands in forked processes, without the time that imports take.

For each line of standard input, a JSON list of commands, it prints a line with
the ids of their processes and, when all have ended, one with their exit codes.
A command is a dict:

  argv: as after `python -m`.
  log: path of a file that takes standard output and standard error.
  wait: seconds before it begins.
  slow: seconds that each step of training takes longer: time for a test to see
    what it waits for.
"""

import json
import os
import runpy
import signal
import sys
import time

# What the commands import, but for the modules that are run.
import experiments.geometry.analyses
import experiments.soups.random_search  # noqa: F401
import modelstock_jax.data.inspection
import modelstock_jax.report.card
import modelstock_jax.report.comparison
import modelstock_jax.report.page  # noqa: F401
from modelstock_jax.training import hosts


def start(argv, log, wait, slow):
  """Fork; return the id of the process, and in that one never."""
  child = os.fork()
  if child:
    return child
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1)
  os.dup2(output, 2)
  if slow:
    after_step = hosts.StopRequest.after_step

    def pause(stop):
      time.sleep(slow)
      return after_step(stop)

    hosts.StopRequest.after_step = pause
  time.sleep(wait)
  module, *sys.argv[1:] = argv
  runpy.run_module(module, run_name='__main__', alter_sys=True)
  sys.exit()


def main():
  for line in sys.stdin:
    children = [start(**command) for command in json.loads(line)]
    print(json.dumps(children), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(x, 0)[1]) for x in children]
    print(json.dumps(codes), flush=True)


if __name__ == '__main__':
  main()
