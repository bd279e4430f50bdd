"""`modelstock data`."""

import argparse
import sys


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
  own = actions.add_parser('import', help='write pictures as a data set')
  own.add_argument(
    'source',
    metavar='PICTURES',
    help='folder train/CLASS/FILE, with val and test likewise, or CLASS/FILE; '
    'zip of one; .csv or .jsonl file with path, label and perhaps split; '
    ".parquet or .arrow files of Hugging Face's datasets; or .tar files of "
    'webdataset',
  )
  own.add_argument('--data_dir', required=True, help=folder)
  own.add_argument('--name', help='of the data set (default: that of PICTURES)')
  convert = actions.add_parser(
    'convert', help='copy a data set that TFDS prepared as tfrecord files'
  )
  source = 'folder of a version of the data set: .../imagenet2012/5.1.0'
  convert.add_argument('source', metavar='FROM', help=source)
  convert.add_argument('target', metavar='TO', help=folder)


def run(args: argparse.Namespace) -> None:
  """Check, prepare, import or convert data sets."""
  actions = {
    'check': _check,
    'prepare': _prepare,
    'import': _import,
    'convert': _convert,
  }
  actions[args.action](args)


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
  import tensorflow_datasets as tfds

  from modelstock_jax.data import inspection
  from modelstock_jax.data import tfds_prepare

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()  # its bars move a cursor, which no log has
  tfds_prepare.prepare(args.name, args.data_dir, args.manual_dir)
  print(inspection.inspect(args.name, args.data_dir))


def _import(args: argparse.Namespace) -> None:
  from modelstock_jax.data import inspection
  from modelstock_jax.data import pictures
  from modelstock_jax.formats import text as text_lib

  done = pictures.import_pictures(args.source, args.data_dir, args.name)
  print(inspection.inspect(done.path.parent.name, args.data_dir))
  for label, (name, sizes) in enumerate(done.counts.items()):
    listed = ', '.join(f'{split} {size:,}' for split, size in sizes.items())
    print(f'  label {label} is {name}: {listed}')
  for note in done.notes:
    print(note)
  if done.not_read:
    lines = [f'{file}: {problem}' for file, problem in done.not_read.items()]
    lines = map(text_lib.plain, text_lib.first(lines, 20))
    print(f'{len(done.not_read)} files were left out:', *lines, sep='\n  ')
  print(f'Wrote {done.path / pictures.REPORT}.')


def _convert(args: argparse.Namespace) -> None:
  from modelstock_jax.data import tfrecords

  print(f'Wrote {tfrecords.convert(args.source, args.target)}.')
