"""`modelstock inspect`."""

import argparse
import pathlib

from modelstock_jax.cli import merge
from modelstock_jax.files import output
from modelstock_jax.formats import write


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add('anchor', metavar='ANCHOR', help='as --anchor of `modelstock merge`')
  add('models', metavar='MODELS', nargs='+', help='as --models of it')
  add(
    '--output',
    metavar='FILE.json',
    help='new file for what is printed and for every tensor; plots lie next '
    'to it',
  )
  merge.add_options(parser)
  stock = dict.fromkeys(('recipe', 'weights', 'decay', 'alphas', 'beta'))
  parser.set_defaults(
    method='model_stock', dry_run=True, process_id=0, num_processes=1, **stock
  )


def run(args: argparse.Namespace) -> None:
  """Measure what a merge would do, and print it."""
  from modelstock_jax.report import run_plots

  target = args.output and pathlib.Path(args.output)
  if target:
    output.check_free(target)
  merged = merge.run(args)
  if target:
    parts = run_plots.of_files(merged._replace(report=target))
    for name, data in (*parts.items(), (target.name, merged.json())):
      with write.replacing(target.with_name(name)) as path:
        path.write_bytes(data)
