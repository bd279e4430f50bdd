"""`modelstock`: finds the sub-command; nothing heavy is imported before."""

import argparse
from collections.abc import Sequence
import importlib
import sys
import traceback

COMMANDS = {
  'demo': 'train, evaluate and report on real handwritten digits',
  'plan': 'what a run needs of a TPU: memory, traffic, time; without one',
  'train': 'fine-tune N models side by side, merging them on device',
  'evaluate': 'accuracy of a run on its benchmarks',
  'report': 'a page about a run, from what is in its workdir',
  'data': 'check, prepare and convert data sets',
  'merge': 'checkpoints on disk, of any architecture',
  'convert': 'a merged model, or any CLIP, to the files of another tool',
}
# The commands whose config can be set by flags.
CONFIGURED = ('demo', 'plan', 'train')

# Modules of the extra [files], all that `modelstock merge` needs for most
# checkpoints; every other one is of [train].
FILES = frozenset({'matplotlib', 'safetensors', 'tqdm', 'yaml'})
# What a user can mend.
_EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line.

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
  """Run a sub-command; print what a user can mend without a traceback."""
  try:
    if args.overrides and args.command not in CONFIGURED:
      raise ValueError(
        f'{" ".join(args.overrides)}: `modelstock {args.command}` has no '
        'config; the config of a run is that of its workdir.'
      )
    args.run(args)
  except _EXPLAINED as error:
    if _is_distributed():  # which process failed, and where, is half of it
      traceback.print_exc()
    print(
      f'modelstock {args.command}: {_explain(args, error)}', file=sys.stderr
    )
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


def _is_distributed() -> bool:
  """Return True if there are other processes; does not import jax."""
  jax = sys.modules.get('jax')
  return jax is not None and jax.distributed.is_initialized()


def _explain(args: argparse.Namespace, error: BaseException) -> str:
  """Return an error's text; of a missing module, what installs it."""
  if not str(error).startswith('No module named'):
    return str(error)
  module = (getattr(error, 'name', None) or '').split('.')[0]
  extra = 'files' if args.command == 'merge' and module in FILES else 'train'
  return (
    f"{module} is not installed: pip install 'modelstock_jax[{extra}]' (in a "
    f"clone: pip install '.[{extra}]'), unless it is a module of your own."
  )


if __name__ == '__main__':
  sys.exit(main())
