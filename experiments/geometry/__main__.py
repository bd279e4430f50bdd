"""Analyses the models of a workdir: `python -m experiments.geometry`."""

import argparse
from collections.abc import Sequence
import sys

from experiments.geometry import analyses
from modelstock_jax.cli import interrupts
from modelstock_jax.training import config as config_lib


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line.

  Args:
    argv: arguments without the program's name; those of the process if None.

  Returns:
    The exit status: 0, or 1 after an error that was explained.
  """
  parser = argparse.ArgumentParser(
    prog='python -m experiments.geometry',
    description='Angles, shells, landscapes of a run: data and figures.',
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='finished run of `modelstock train`, `demo` or `experiments.soups`; '
    'analysis/*.json and plots/* are written there',
  )
  parser.add_argument(
    '--config',
    help='config file of the run, required if it defines the task: no code of '
    'a workdir is ever run',
  )
  parser.add_argument(
    '--only',
    default='',
    help=f'parts, separated by commas: {", ".join(analyses.PARTS)}; by default '
    'all for which there are enough models',
  )
  parser.add_argument(
    '--benchmarks',
    default='',
    help='names, separated by commas; by default those of the config',
  )
  parser.add_argument(
    '--allow-pickle',
    action='store_true',
    help='read an anchor that is a .npy file, which can run any code: only if '
    'you trust it',
  )
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    parser.error(
      f'unknown arguments: {" ".join(unknown)} (the config is that of the '
      'workdir)'
    )
  analyses.log_to_stderr()
  try:
    hooks = config_lib.load_with_hooks(args.config)[1] if args.config else {}
    paths = analyses.analyze(
      args.workdir,
      only=args.only.split(',') if args.only else (),
      benchmarks=args.benchmarks.split(',') if args.benchmarks else (),
      get_task=hooks.get('get_task'),
      allow_pickle=args.allow_pickle,
    )
  except (ValueError, OSError) as error:
    print(f'{parser.prog}: {error}', file=sys.stderr)
    return 1
  print(
    f'Wrote {", ".join(path.name for path in paths)} to {paths[0].parent} '
    f'and the figures to {paths[0].parents[1] / "plots"}.'
  )
  return 0


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.geometry', main))
