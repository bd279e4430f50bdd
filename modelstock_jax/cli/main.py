"""`modelstock`: runs a command, whose module alone is imported."""

import argparse
from collections.abc import Sequence
import importlib
import itertools
import os
import re
import sys

import modelstock_jax
from modelstock_jax.cli import interrupts
from modelstock_jax.formats import text

COMMANDS = {
  'demo': 'train, merge and evaluate on bundled handwritten digits: a minute',
  'init': 'make a folder with a config to train on your own pictures',
  'train': 'fine-tune two or more models in one sharded step and merge them',
  'evaluate': 'measure the accuracy of a run or a model on benchmarks',
  'report': 'write a web page about a run: accuracy, merges, settings',
  'convert': 'export a merged model, or convert a CLIP between file formats',
  'merge': 'merge checkpoint files of any architecture',
  'inspect': 'say whether checkpoint files will merge, and write nothing',
  'data': 'check, prepare, import or convert data sets',
  'plan': 'compile a run for TPUs, without TPU hardware: memory and traffic',
}
# The commands whose config can be set by flags.
CONFIGURED = ('demo', 'plan', 'train')

# Modules of the extra [files], all that `modelstock merge` needs for most
# checkpoints; those of other extras; every other one is of [train].
FILES = frozenset({'matplotlib', 'safetensors', 'tensorstore', 'tqdm', 'yaml'})
# A value may follow these after a space.
_BEFORE_VALUE = r'--config\.[^=]+|--print-completion'
EXTRAS = {'shtab': 'completion', 'wandb': 'wandb'}


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line.

  Args:
    argv: arguments without the program's name; those of the process if None.

  Returns:
    The exit status: 0; 1 after an error that was explained; 2 for wrong
    usage; 130 or 143 when interrupted by SIGINT or SIGTERM.
  """
  argv = _arguments(sys.argv[1:] if argv is None else argv)
  command = next((a for a in argv if not a.startswith('-')), '')
  return interrupts.run(
    f'modelstock {command}'.strip(),
    lambda: _run(argv, command),
    lambda error: _explain(command, error),
  )


def _arguments(argv: Sequence[str]) -> list[str]:
  """Return `help COMMAND` as COMMAND --help, and --config.a 3 with a '='."""
  if argv and argv[0] == 'help':
    return [*argv[1:2], '--help']
  result: list[str] = []
  for argument in argv:
    is_value = result and re.fullmatch(_BEFORE_VALUE, result[-1])
    if is_value and not argument.startswith('--'):
      result[-1] += f'={argument}'
    else:
      result.append(argument)
  return result


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
  version = f'modelstock {modelstock_jax.__version__}'
  parser.add_argument('--version', action='version', version=version)
  completes = bool(argv) and argv[0].startswith('--print-completion')
  if command and command not in COMMANDS:
    parser.error(
      f'there is no command {command!r}; did you mean '
      f'{text.nearest(command, COMMANDS)!r}?'
    )
  commands = parser.add_subparsers(
    dest='command', required=True, metavar='COMMAND', title='commands'
  )
  for name, summary in COMMANDS.items():
    sub = commands.add_parser(name, help=summary, description=summary)
    if name == command or completes:
      if command in ('inspect', 'merge'):
        # They have threads of their own; numpy's would wait for one another.
        os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
      module = importlib.import_module(f'modelstock_jax.cli.{name}')
      module.add_arguments(sub)
      sub.set_defaults(run=module.run)
  if completes:
    import shtab

    shtab.add_argument_to(parser)
    for action in itertools.chain(
      *(c._actions for c in commands.choices.values())
    ):
      if action.nargs != 0 and not action.choices:
        setattr(action, 'complete', shtab.FILE)  # noqa: B010
  if not argv:
    parser.print_help(sys.stderr)
    sys.exit(2)
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
  files = command in ('inspect', 'merge') and module in FILES
  extra = EXTRAS.get(module, 'files' if files else 'train')
  return (
    f"{module} is not installed: pip install 'modelstock_jax[{extra}]' (in a "
    f"clone: pip install '.[{extra}]'), unless it is a module of your own."
  )


if __name__ == '__main__':
  sys.exit(main())
