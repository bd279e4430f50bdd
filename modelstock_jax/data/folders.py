"""Folders of pictures that are read in place, without an import."""

from collections.abc import Sequence
import hashlib
import os
import pathlib
from typing import Any

from modelstock_jax.data import listings
from modelstock_jax.data import records
from modelstock_jax.formats import text as text_lib

PREFIX = 'folder:'
# A folder is listed several times in a run, and each picture is opened anew.
_MOST = 20_000


class FolderSource:
  """The pictures of one split of a folder, as `data import` would write them.

  No picture is decoded before it is used: one that cannot be read is an error
  or, in training, is replaced by another.

  Attributes:
    name: the folder, a digest of its files and labels, and the split.
    class_names: names of the classes, by label.
    path: the folder.
    channels: 3, of decoded images.
    image_shape: height and width, which vary: `(None, None)`.
  """

  channels = 3
  image_shape = (None, None)

  def __init__(
    self,
    path: pathlib.Path,
    split: str,
    class_names: tuple[str, ...],
    pictures: Sequence[listings.Picture],
  ):
    files = [x._replace(place=pathlib.Path()) for x in pictures]
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:8]
    self.name = f'{PREFIX}{path.name}@{digest}/{split}'
    self.path, self.class_names = path, class_names
    self._pictures = pictures

  def __len__(self) -> int:
    return len(self._pictures)

  def __getitem__(self, index: int) -> dict[str, Any]:
    records.check_index(self, index)
    picture = self._pictures[index]
    with picture.place.open('rb') as file:
      encoded = file.read()
    return {
      'image': encoded,
      'label': self.class_names.index(picture.label),
      'file_name': os.fsencode(picture.name),
    }


def read(dataset: str) -> dict[str, FolderSource]:
  """Return the splits of `'folder:PATH'`; none for another name.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it has too many files, or a split has no picture of a class.
  """
  prefix, _, folder = dataset.partition(PREFIX)
  if prefix or not folder:
    return {}
  path = pathlib.Path(folder).expanduser().resolve()
  if not path.is_dir():
    raise FileNotFoundError(f'data.dataset={dataset}: there is no such folder')
  with text_lib.explained(f'{path}: '):
    listing = listings.in_folder(path)
    if len(listing.pictures) > _MOST:
      raise ValueError(
        f'it has more than {_MOST:,} files: write them as a data set with '
        f'`modelstock data import {folder} --data_dir=DATA_DIR`'
      )
    pictures, _ = listings.arrange(listing.pictures)
    counts = listings.count(pictures)
  return {
    split: FolderSource(
      path,
      split,
      tuple(counts),
      [x for x in pictures if x.split == split and x.name],
    )
    for split in next(iter(counts.values()))
  }
