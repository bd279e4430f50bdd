"""`modelstock init`."""

import argparse
import pathlib
import shutil

_README = """# Fine-tuning on pictures

`pictures` is a folder with a folder of pictures for each class. In this folder,
run:

    modelstock data import pictures --data_dir=prepared
    modelstock train --config=own_data.py --workdir=runs/pictures
    modelstock evaluate --workdir=runs/pictures

`own_data.py` has the settings: the weights, the length, the learning rate.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument('folder', metavar='DIR', help='a new or empty folder')


def run(args: argparse.Namespace) -> None:
  """Write a config and the commands that use it."""
  from modelstock_jax.formats import write
  from modelstock_jax.training import config as config_lib

  folder = pathlib.Path(args.folder).expanduser()
  write.check_empty(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with write.replacing(folder) as temporary:
    temporary.mkdir()
    shutil.copyfile(config_lib.bundled('own_data'), temporary / 'own_data.py')
    (temporary / 'README.md').write_text(_README)
  print(f'Wrote {folder}. The commands are in {folder / "README.md"}.')
