"""Writes the bundled data sets as ArrayRecord files: needs `[prepare]`.

python -m experiments.digits.prepare OUT_DIR          # (re)write them
python -m experiments.digits.prepare OUT_DIR --check  # compare with a
                                                      # fresh build
"""

import argparse
import importlib
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from array_record.python import array_record_module
import numpy as np

from experiments.digits import builders
from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources


def prepare(dataset: str, data_dir: pathlib.Path) -> None:
  """Build one data set into `data_dir/<dataset>/<version>`, anew.

  Args:
    dataset: a key of `builders.BUILDERS`.
    data_dir: the folder of all data sets. What it holds of this one is
      replaced, after the new files are complete.

  Raises:
    ModuleNotFoundError: TensorFlow is not installed.
  """
  try:
    importlib.import_module('tensorflow')
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Writing data sets needs TensorFlow (reading them does not): '
      "pip install 'modelstock_jax[train,prepare]'",
      name=error.name,
    ) from error
  with tempfile.TemporaryDirectory() as scratch:
    builder = builders.BUILDERS[dataset](scratch)
    builder.download_and_prepare()
    for path in pathlib.Path(builder.data_dir).glob('*.array_record-*'):
      _repack(path)
    target = data_dir / dataset
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(pathlib.Path(scratch, dataset), target)


def _repack(path: pathlib.Path) -> None:
  """Rewrite a file with 16 records to a compressed chunk.

  TFDS gives every record its own chunk. With records of some 100 bytes the
  chunks' own headers then take a third of the file.
  """
  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:16')
  for record in records:
    writer.write(record)
  writer.close()


def first_difference(
  dataset: str, data_dir: pathlib.Path, other_dir: pathlib.Path
) -> str | None:
  """Compare two prepared copies of a data set record by record.

  Pixels are compared decoded: two PNG libraries may pack the same image
  differently.

  Args:
    dataset: its name.
    data_dir: the folder of one copy.
    other_dir: the folder of the other.

  Returns:
    The first difference in words, `None` where there is none.
  """
  ours = sources.split_sizes(dataset, data_dir=data_dir)
  theirs = sources.split_sizes(dataset, data_dir=other_dir)
  if ours != theirs:
    return f'{dataset}: splits are {ours}, a fresh build has {theirs}'
  for split in ours:
    pairs = zip(
      sources.open_source(dataset, split, data_dir=data_dir),
      sources.open_source(dataset, split, data_dir=other_dir),
      strict=True,
    )
    for position, (one, other) in enumerate(pairs):
      for name in sorted(one.keys() | other.keys()):
        values: list[Any] = [record.get(name) for record in (one, other)]
        if name == 'image':
          values = [preprocessing.decode(value) for value in values]
        if not np.array_equal(values[0], values[1]):
          return (
            f'{dataset}/{split}[{position}][{name!r}]: prepared '
            f'{values[0]!r}, a fresh build has {values[1]!r}'
          )
  return None


def main(argv: list[str] | None = None) -> int:
  """Run the command line; return the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.digits.prepare', description=__doc__
  )
  parser.add_argument('out_dir', type=pathlib.Path)
  parser.add_argument(
    '--check',
    action='store_true',
    help='write nothing; compare what is there with a fresh build',
  )
  args = parser.parse_args(argv)
  if not args.check:
    for dataset in builders.BUILDERS:
      prepare(dataset, args.out_dir)
      sizes = sources.split_sizes(dataset, data_dir=args.out_dir)
      print(f'{args.out_dir / dataset}: {sizes}')
    return 0
  with tempfile.TemporaryDirectory() as fresh:
    for dataset in builders.BUILDERS:
      prepare(dataset, pathlib.Path(fresh))
      difference = first_difference(dataset, args.out_dir, pathlib.Path(fresh))
      if difference:
        print(difference, file=sys.stderr)
        return 1
      print(f'{dataset}: every record equals a fresh build')
  return 0


if __name__ == '__main__':
  sys.exit(main())
