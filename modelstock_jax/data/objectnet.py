"""ObjectNet, from the user's own copy: it may not be passed on.

The folder is what the archive unpacks to:

  objectnet-1.0/images/<folder>/*.png
  objectnet-1.0/mappings/folder_to_objectnet_label.json    folder: name
  objectnet-1.0/mappings/objectnet_to_imagenet_1k.json     name: 'text; text'
  objectnet-1.0/mappings/imagenet_to_label_2012_v2         line i: text of id i
  objectnet-1.0/mappings/pytorch_to_imagenet_2012_id.json  index: id

Ids are those of the challenge of 2012. Indices, as in PyTorch and TFDS, are by
ascending WordNet id: the order of a classifier's logits.
"""

import os
from typing import Any

from etils import epath
import numpy as np

from modelstock_jax.data import records
from modelstock_jax.data import sources
from modelstock_jax.formats import text as text_lib

_FOLDERS = 'folder_to_objectnet_label.json'
_OVERLAP = 'objectnet_to_imagenet_1k.json'
_TEXTS = 'imagenet_to_label_2012_v2'
_INDICES = 'pytorch_to_imagenet_2012_id.json'

INSTRUCTIONS = (
  'Get objectnet-1.0.zip from https://objectnet.dev/download.html (its '
  'licence is for evaluation only) and unpack it, with the password that is '
  'given there, so that {folder} has the folders images and mappings.'
)


class ObjectNet:
  """The images whose classes are among ImageNet's.

  Records are `dict(image=bytes, label=int, file_name='folder/file.png')`, by
  folder and file name; the label is the position in `folders`.

  Attributes:
    name: name for messages.
    folders: folders of the classes that ImageNet has, sorted.
    answers: `int32[1000]`: the position in `folders` of the class that an
      ImageNet class stands for, -1 for all others.
    channels: 3.
    class_names: classes of the classifier: WordNet ids.
    image_shape: height and width, unknown.
  """

  channels = 3
  image_shape = (None, None)

  def __init__(self, folder: str | os.PathLike[str]):
    path = epath.Path(folder)
    self.name = path.name
    self.path = path
    self.class_names = sources.imagenet_wnids()
    overlap = _read_overlap(path)
    self.folders = tuple(sorted(overlap))
    self.answers = np.full(len(self.class_names), -1, np.int32)
    for position, name in enumerate(self.folders):
      self.answers[overlap[name]] = position
    self._files = self._list(path / 'images')

  def _list(self, images: epath.Path) -> list[tuple[str, int]]:
    files, empty = [], []
    for label, folder in enumerate(self.folders):
      names = sorted(path.name for path in (images / folder).glob('*.png'))
      files += [(f'{folder}/{name}', label) for name in names]
      if not names:
        empty.append(folder)
    if empty:
      raise FileNotFoundError(
        f'{images}: {len(empty)} of {len(self.folders)} folders that it should '
        f'have are not there or have no *.png, such as {empty[0]!r}. '
        + INSTRUCTIONS.format(folder=images.parent)
      )
    return files

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    records.check_index(self, index)
    name, label = self._files[index]
    image = (self.path / 'images' / name).read_bytes()
    return {'image': image, 'label': label, 'file_name': name}


def _read_overlap(path: epath.Path) -> dict[str, list[int]]:
  """Return the ImageNet indices of every folder that has some."""
  mappings = path / 'mappings'
  names = (_FOLDERS, _OVERLAP, _TEXTS, _INDICES)
  if missing := [name for name in names if not (mappings / name).is_file()]:
    raise FileNotFoundError(
      f'{mappings} has no {", ".join(missing)}. '
      + INSTRUCTIONS.format(folder=path)
    )
  try:
    folders, overlap, indices = (
      text_lib.parse_json((mappings / name).read_bytes())
      for name in (_FOLDERS, _OVERLAP, _INDICES)
    )
    texts = [x.strip() for x in (mappings / _TEXTS).read_text().splitlines()]
    index_of_id = {int(number): int(index) for index, number in indices.items()}
    folder_of = {name: folder for folder, name in folders.items()}
    return {
      folder_of[name]: [
        index_of_id[texts.index(text)] for text in value.split('; ')
      ]
      for name, value in overlap.items()
    }
  except (
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    OverflowError,
  ) as error:
    raise ValueError(
      f'{mappings}: the mappings do not fit together '
      f'({text_lib.plain(str(error))}). Unpack them again.'
    ) from error
