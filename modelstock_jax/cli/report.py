"""`modelstock report`."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument(
    '--workdir',
    required=True,
    help='run directory; report.html and plots/ are written there',
  )


def run(args: argparse.Namespace) -> None:
  """Write the report, and print what is missing in it."""
  from modelstock_jax.report import page
  from modelstock_jax.report import summary

  path = page.write(args.workdir)
  for sentence in summary.read(args.workdir).missing:
    print(sentence, file=sys.stderr)
  print(f'Wrote {path}.')
