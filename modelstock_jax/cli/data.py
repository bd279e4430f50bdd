"""`modelstock data`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  actions = parser.add_subparsers(
    dest='action', required=True, metavar='ACTION', title='actions'
  )
  folder = 'folder of the prepared data sets'
  check = actions.add_parser(
    'check', help='print what data sets contain, and if they can be used'
  )
  check.add_argument(
    'names',
    nargs='*',
    metavar='NAME',
    help="benchmark or TFDS data set (default: the paper's benchmarks, or the "
    'data sets of the package without --data_dir)',
  )
  check.add_argument('--data_dir', help=f'{folder}, or gs://bucket/folder')
  check.add_argument(
    '--all', action='store_true', help='read and decode all images'
  )
  prepare = actions.add_parser(
    'prepare', help='download a data set and write it for random access'
  )
  prepare.add_argument(
    'name', metavar='NAME', help='benchmark or TFDS data set'
  )
  prepare.add_argument('--data_dir', required=True, help=folder)
  prepare.add_argument(
    '--manual_dir',
    help='folder of the archives that must be downloaded by hand (default: '
    'DATA_DIR/downloads/manual)',
  )
  convert = actions.add_parser(
    'convert', help='copy a data set that TFDS prepared as tfrecord files'
  )
  source = 'folder of a version of the data set: .../imagenet2012/5.1.0'
  convert.add_argument('source', metavar='FROM', help=source)
  convert.add_argument('target', metavar='TO', help=folder)


def run(args: argparse.Namespace) -> None:
  """Check, prepare or convert data sets."""
  {'check': _check, 'prepare': _prepare, 'convert': _convert}[args.action](args)


def _check(args: argparse.Namespace) -> None:
  from modelstock_jax import data
  from modelstock_jax.data import inspection

  bundled = ['digits', 'fonts']
  paper = ['imagenet', *data.IMAGENET_SHIFTS]
  names = args.names or (paper if args.data_dir else bundled)
  unusable = []
  for name in names:
    try:
      print(inspection.inspect(name, args.data_dir, read_all=args.all))
    except (ValueError, OSError, ImportError) as error:
      print(f'{name}: NOT USABLE: {error}')
      unusable.append(name)
  if unusable:
    raise ValueError(
      f'{len(unusable)} of {len(names)} cannot be used: {", ".join(unusable)}'
    )


def _prepare(args: argparse.Namespace) -> None:
  from modelstock_jax.data import inspection
  from modelstock_jax.data import tfds_prepare

  tfds_prepare.prepare(args.name, args.data_dir, args.manual_dir)
  print(inspection.inspect(args.name, args.data_dir))


def _convert(args: argparse.Namespace) -> None:
  from modelstock_jax.data import tfrecords

  print(f'Wrote {tfrecords.convert(args.source, args.target)}.')
