"""`modelstock`: runs a command, whose module alone is imported."""

import argparse
from collections.abc import Sequence
import importlib
import sys

from modelstock_jax.cli import interrupts

COMMANDS = {
  'demo': 'train, merge and evaluate on bundled handwritten digits: a minute',
  'train': 'fine-tune two or more models in one sharded step and merge them',
  'evaluate': 'measure the accuracy of a run or a model on benchmarks',
  'report': 'write a web page about a run: accuracy, merges, settings',
  'convert': 'export a merged model, or convert a CLIP between file formats',
  'merge': 'merge checkpoint files of any architecture',
  'data': 'check, prepare or convert data sets',
  'plan': 'compile a run for TPUs, without TPU hardware: memory and traffic',
}
# The commands whose config can be set by flags.
CONFIGURED = ('demo', 'plan', 'train')

# Modules of the extra [files], all that `modelstock merge` needs for most
# checkpoints; every other one is of [train].
FILES = frozenset({'matplotlib', 'safetensors', 'tensorstore', 'tqdm', 'yaml'})


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line.

  Args:
    argv: arguments without the program's name; those of the process if None.

  Returns:
    The exit status: 0; 1 after an error that was explained; 2 for wrong
    usage; 130 or 143 when interrupted by SIGINT or SIGTERM.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  command = next((a for a in argv if not a.startswith('-')), '')
  return interrupts.run(
    f'modelstock {command}'.strip(),
    lambda: _run(argv, command),
    lambda error: _explain(command, error),
  )


def _run(argv: Sequence[str], command: str) -> None:
  """Parse the arguments, and run the command among them."""
  parser = argparse.ArgumentParser(
    prog='modelstock',
    description='Model Stock: fine-tune two models from the same pretrained '
    'weights, and merge them layer by layer by the angle between their '
    'displacements.',
    epilog='Start with `modelstock demo`. The options of a command: '
    '`modelstock COMMAND --help`.',
  )
  commands = parser.add_subparsers(
    dest='command', required=True, metavar='COMMAND', title='commands'
  )
  for name, summary in COMMANDS.items():
    sub = commands.add_parser(name, help=summary, description=summary)
    if name == command:
      module = importlib.import_module(f'modelstock_jax.cli.{name}')
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
  if args.overrides and args.command not in CONFIGURED:
    raise ValueError(
      f'{" ".join(args.overrides)}: `modelstock {args.command}` has no '
      'config; the config of a run is that of its workdir.'
    )
  args.run(args)


def _explain(command: str, error: BaseException) -> str:
  """Return the text of an error; that of a missing module names its extra."""
  if not str(error).startswith('No module named'):
    return str(error)
  module = (getattr(error, 'name', None) or '').split('.')[0]
  extra = 'files' if command == 'merge' and module in FILES else 'train'
  return (
    f"{module} is not installed: pip install 'modelstock_jax[{extra}]' (in a "
    f"clone: pip install '.[{extra}]'), unless it is a module of your own."
  )


if __name__ == '__main__':
  sys.exit(main())
