"""Writes the bundled data sets as ArrayRecord files: needs `[prepare]`.

  python -m experiments.digits.prepare OUT_DIR

writes them, in place of those that are there.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

from array_record.python import array_record_module

from experiments.digits import builders
from modelstock_jax.cli import interrupts
from modelstock_jax.data import sources
from modelstock_jax.data import tfds_prepare
from modelstock_jax.formats import write


def prepare(dataset: str, data_dir: pathlib.Path) -> None:
  """Build one data set into `data_dir/<dataset>/<version>`, anew.

  Args:
    dataset: a key of `builders.BUILDERS`.
    data_dir: the folder of all data sets. What it holds of this one is
      replaced, after the new files are complete.

  Raises:
    ModuleNotFoundError: TensorFlow is not installed.
  """
  tfds_prepare.import_tensorflow()  # before anything is written
  with tempfile.TemporaryDirectory() as scratch:
    builder = builders.BUILDERS[dataset](scratch)
    builder.download_and_prepare()
    for path in pathlib.Path(builder.data_dir).glob('*.array_record-*'):
      _repack(path)
    target = data_dir / dataset
    target.parent.mkdir(parents=True, exist_ok=True)
    with write.replacing(target) as folder:
      shutil.copytree(pathlib.Path(scratch, dataset), folder)
      shutil.rmtree(target, ignore_errors=True)


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


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.digits.prepare', description=__doc__
  )
  parser.add_argument('out_dir', type=pathlib.Path)
  out_dir = parser.parse_args().out_dir
  for dataset in builders.BUILDERS:
    prepare(dataset, out_dir)
    sizes = sources.split_sizes(dataset, data_dir=out_dir)
    print(f'{out_dir / dataset}: {sizes}')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.digits.prepare', main))
