"""`modelstock`: finds the sub-command; nothing heavy is imported before."""

import argparse
from collections.abc import Sequence
import importlib
import sys

COMMANDS = {
  'demo': 'train, evaluate and report on real handwritten digits',
  'plan': 'what a run needs of a TPU: memory, traffic, time; without one',
  'train': 'fine-tune N models side by side, merging them on device',
  'grid': 'fine-tune dozens of models, a few at a time, for soups',
  'evaluate': 'accuracy of a run on its benchmarks',
  'analyze': 'angles, shells, landscapes of a run: data and figures',
  'report': 'a page about a run, from what is in its workdir',
  'data': 'check, prepare and convert data sets',
  'merge': 'checkpoints on disk, of any architecture',
  'convert': 'a merged model, or any CLIP, to the files of another tool',
}


# What a user can mend.
_EXPLAINED = (
  ValueError,
  OSError,
  ImportError,
  FloatingPointError,
  MemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: arguments without the program's name; those of the process if None.

  Returns:
    The exit status: 0; 1 after an error that was explained; 2 for wrong
    usage; 130 or 143 when interrupted by SIGINT or SIGTERM.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = argparse.ArgumentParser(
    prog='modelstock',
    description='Model Stock in JAX: train two, merge on device, by the angle.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  name = next((a for a in argv if not a.startswith('-')), None)
  for command, summary in COMMANDS.items():
    sub = commands.add_parser(command, help=summary, description=summary)
    if command == name:
      module = importlib.import_module(f'modelstock_jax.cli.{command}')
      module.add_arguments(sub)
      sub.set_defaults(run=module.run)
  args, rest = parser.parse_known_args(argv)
  unknown = [arg for arg in rest if not arg.startswith('--config.')]
  if unknown:
    parser.error(
      f'unknown arguments: {" ".join(unknown)} (a value of the config is set '
      'with --config.a.b=value)'
    )
  args.overrides = rest
  return _run(args)


def _run(args: argparse.Namespace) -> int:
  """Runs a sub-command; what a user can mend is told without a traceback."""
  try:
    args.run(args)
  except _EXPLAINED as error:
    print(f'modelstock {args.command}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    return 130
  except Exception as error:
    number = getattr(error, 'signal', None)  # of training.loop.Interrupted
    if number is None:
      raise
    print(f'modelstock {args.command}: {error}', file=sys.stderr)
    return 128 + int(number)
  return 0


if __name__ == '__main__':
  sys.exit(main())
