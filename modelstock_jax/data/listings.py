"""Lists of a user's pictures: their splits, classes and names."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import csv
import functools
import hashlib
import os
import pathlib
from typing import IO
from typing import NamedTuple
from typing import Protocol
import zipfile

from modelstock_jax.formats import text as text_lib

# Splits by the names of folders, and by the column 'split' of a table.
SPLITS = {
  'train': 'train',
  'val': 'validation',
  'valid': 'validation',
  'validation': 'validation',
  'test': 'test',
}
_HELD_OUT = 10  # one picture of so many is kept for validation

Counts = dict[str, dict[str, int]]


class Place(Protocol):
  """Where a picture lies: a path, or a part of an archive."""

  def open(self, mode: str, /) -> IO[bytes]:
    """Open it; the mode is 'rb'."""
    ...


class Member(NamedTuple):
  """A picture in a zip."""

  archive: pathlib.Path
  name: str

  def open(self, mode: str) -> IO[bytes]:
    """Open it."""
    del mode  # 'rb', which zipfile calls 'r'
    return _open_zip(self.archive).open(self.name)


_open_zip = functools.lru_cache(maxsize=1)(zipfile.ZipFile)


class Picture(NamedTuple):
  """A file of a class; an empty `name` states that there is the class."""

  split: str
  label: str
  name: str
  place: Place = pathlib.Path()


class Listing(NamedTuple):
  """The pictures of a source.

  Attributes:
    pictures: the pictures; those without a `label` are in no class.
    classes: names of the classes, by label; empty if the source has no order.
  """

  pictures: list[Picture]
  classes: Sequence[str] = ()


def in_folder(folder: pathlib.Path) -> Listing:
  """List the files of a folder, in folders of classes."""
  names = []
  for path, folders, files in os.walk(folder, followlinks=True):
    inside = pathlib.Path(path).relative_to(folder).as_posix()
    inside = '' if inside == '.' else f'{inside}/'
    names += [f'{inside}{name}/' for name in folders]
    names += [f'{inside}{name}' for name in files]
  return Listing(_in_folders(names, folder.joinpath))


def in_zip(path: pathlib.Path) -> Listing:
  """List the members of an archive, in folders of classes."""
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
  return Listing(_in_folders(names, functools.partial(Member, path)))


def _in_folders(
  names: Sequence[str], place: Callable[[str], Place]
) -> list[Picture]:
  """Return files by the folders they are in; names of folders end with '/'."""
  paths = [name.split('/') for name in names]
  paths = [
    path
    for path in paths
    if not any(part.startswith(('.', '__MACOSX')) for part in path)
  ]
  top = 0
  # A folder that holds all the others, as in many archives, is no class.
  while True:
    tops = {path[top] for path in paths if len(path) > top + 1}
    splits = {name for name in tops if name.lower() in SPLITS}
    if len(tops) != 1 or splits:
      break
    top += 1
  if splits and splits != tops:
    raise ValueError(
      f'the folders {text_lib.listed(sorted(tops - splits))} are beside '
      f'{text_lib.listed(sorted(splits))}, which are names of splits. Move '
      'them, or list the pictures in a .csv file'
    )
  pictures = []
  for path in paths:
    *folders, file = path[top:]
    split = SPLITS[folders.pop(0).lower()] if splits and folders else 'train'
    name = '/'.join(path) if file else ''
    label = folders[0] if folders else ''
    pictures.append(Picture(split, label, name, place(name)))
  return pictures


def in_table(path: pathlib.Path) -> Listing:
  """List the files that a .csv or .jsonl file names."""
  lines = path.read_text('utf-8-sig').splitlines()
  if path.suffix == '.csv':
    rows = [*csv.DictReader(lines)]
  else:
    rows = [text_lib.parse_json(line) for line in lines if line.strip()]
  pictures, problems = [], []
  for number, row in enumerate(rows, 1):
    values = {'split': 'train', **row} if isinstance(row, dict) else {}
    name, label, split = (
      str(values.get(key) or '') for key in ('path', 'label', 'split')
    )
    if name and label and split in SPLITS:
      pictures.append(Picture(SPLITS[split], label, name, path.parent / name))
    else:
      problems.append(f'row {number}: {text_lib.shown(row)}')
  text_lib.raise_problems(
    "rows must have 'path' and 'label', and in 'split', if it is there, one of "
    f'{", ".join(SPLITS)}.',
    problems,
    most=8,
  )
  return Listing(pictures)


def arrange(files: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
  """Put pictures in the order of their records, with a validation split.

  Args:
    files: of a listing.

  Returns:
    The files that are in a class, by the SHA-256 of their names, and sentences
    about what was done.

  Raises:
    ValueError: two files have one name.
  """
  pictures = [file for file in files if file.label]
  pictures.sort(key=lambda x: hashlib.sha256(os.fsencode(x.name)).digest())
  names = collections.Counter(x.name for x in pictures if x.name)
  text_lib.raise_problems(
    'files of one name are there. Leave one of each.',
    [f'{name}: {n} times' for name, n in names.items() if n > 1],
    most=8,
  )
  if any(picture.split == 'validation' for picture in pictures):
    return pictures, []
  seen = collections.Counter()
  for place, picture in enumerate(pictures):
    if picture.split == 'train' and picture.name:
      if seen[picture.label] % _HELD_OUT == 0:
        pictures[place] = picture._replace(split='validation')
      seen[picture.label] += 1
  return pictures, [
    f'There is no validation split: every {_HELD_OUT}th picture of each class '
    'of train is kept as one, by the SHA-256 of their names.'
  ]


def count(pictures: Sequence[Picture], classes: Sequence[str] = ()) -> Counts:
  """Count the pictures of each class in each split, by label.

  Args:
    pictures: from `arrange`.
    classes: names by label; if empty, those of the pictures, sorted.

  Raises:
    ValueError: a split has no picture of a class, or names cannot be classes.
  """
  present = {'train', *(picture.split for picture in pictures)}
  splits = [x for x in dict.fromkeys(SPLITS.values()) if x in present]
  labels = {picture.label for picture in pictures}
  numbers = all(map(str.isdecimal, labels))  # 10 comes after 9
  counts = {
    label: dict.fromkeys(splits, 0)
    for label in classes or sorted(labels, key=int if numbers else None)
  }
  for picture in pictures:
    counts[picture.label][picture.split] += bool(picture.name)
  problems = [
    f'{split} has no picture of {text_lib.shown(label)}'
    for label, sizes in counts.items()
    for split, size in sizes.items()
    if not size
  ]
  problems += [
    f'{text_lib.shown(label)} is not printable, or has spaces around it'
    for label in counts
    if not label.isprintable() or label != label.strip()
  ]
  if len(counts) < 2:
    problems.append(f'the classes are {[*counts]}, must be 2 or more')
  text_lib.raise_problems(
    'each split must have a picture of each class, train two if validation is '
    'taken from it. Add pictures, or remove the class from all splits.',
    problems,
    most=20,
  )
  return counts
