"""Descriptions of data sets, for the command line."""

from collections.abc import Iterator
from concurrent import futures
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image
import tqdm

from modelstock_jax.data import benchmarks
from modelstock_jax.data import examples
from modelstock_jax.data import folders
from modelstock_jax.data import objectnet
from modelstock_jax.data import pictures
from modelstock_jax.data import preprocessing
from modelstock_jax.data import records
from modelstock_jax.data import sources
from modelstock_jax.formats import hashes
from modelstock_jax.formats import text as text_lib

_PART = 1024  # images that wait for a thread


def inspect(
  name: str,
  data_dir: text_lib.PathLike | None = None,
  *,
  read_all: bool = False,
) -> str:
  r"""Open a data set as an evaluation would, and describe it.

  Args:
    name: name of a benchmark, or of a data set as TFDS calls it, of which every
      split is opened.
    data_dir: the folder of the prepared data sets; `None` for the bundled.
    read_all: read and decode all images of all splits, and check all labels,
      with a progress line; not the first image alone.

  Returns:
    Lines: path, version, format, splits with their sizes; of the split the
    number of images and classes, and the first image, decoded.

  Raises:
    FileNotFoundError: it is not there; says how to prepare it.
    ValueError: it has not the version, format, split or classes that it
      should have, or its first image is none; with `read_all`, lists the
      images and labels that cannot be used, or a file is of another data set.
    OSError: a file is damaged.

  >>> print('\n'.join(inspect('fonts').splitlines()[1:]))
    version 1.0.0, array_record, splits: test 600
    test: 600 images, 10 classes; the first is PNG, 8 x 8, label 0 (0)
  """
  if name in benchmarks.BENCHMARKS:
    specs = [benchmarks.BENCHMARKS[name]]
  else:
    specs = [
      benchmarks.Benchmark(name, name, split)
      for split in sources.split_sizes(name, data_dir=data_dir)
    ]
  opened = [benchmarks.open_benchmark(spec, data_dir) for spec in specs]
  first = benchmarks.first_part(opened[0])
  lines = [f'{name}: {first.path}', _kind(specs[0], first, data_dir)]
  others = []  # splits that are not of a benchmark, such as 'train'
  if not isinstance(first, objectnet.ObjectNet):
    for dataset in specs[0].datasets:
      absent = sources.check_files(dataset, data_dir)
      for split in absent:
        lines.append(f'NOTE: the files of {dataset}/{split} are not there')
      seen = {*absent, *(spec.split for spec in specs)}
      splits = sources.split_sizes(dataset, data_dir=data_dir)
      others += [(dataset, split) for split in splits if split not in seen]
  for spec, source in zip(specs, opened, strict=True):
    lines += _split(spec, source)
    lines += [_read_all(source)] if read_all else []
  for dataset, split in others if read_all else []:
    try:
      source = sources.open_source(dataset, split, data_dir=data_dir)
    except sources.UnlabelledError as error:
      lines.append(f'NOTE: {error}')
    else:
      lines.append(_read_all(source))
  if read_all and isinstance(first, sources.TfdsSource):
    lines += _check_hashes(pathlib.Path(first.path))
  return '\n  '.join(lines)


def _kind(
  spec: benchmarks.Benchmark, source: Any, data_dir: text_lib.PathLike | None
) -> str:
  if isinstance(source, objectnet.ObjectNet):
    return 'version 1.0, folders of PNG'
  sizes = sources.split_sizes(spec.datasets[0], data_dir=data_dir)
  splits = ', '.join(f'{split} {size:,}' for split, size in sizes.items())
  if isinstance(source, folders.FolderSource):
    return f'read in place, splits: {splits}'
  several = f', {len(spec.configs)} configurations' if spec.configs else ''
  return f'version {source.path.name}, array_record, splits: {splits}{several}'


def _split(spec: benchmarks.Benchmark, source: Any) -> Iterator[str]:
  answers = benchmarks.answers(spec, source)
  record = source[0]
  with text_lib.explained(f'{source.name}[0]: '):
    height, width, _ = preprocessing.decode(record['image']).shape
  with Image.open(io.BytesIO(record['image'])) as image:
    kind = image.format
  yield (
    f'{spec.split}: {len(source):,} images, '
    f'{len(set(answers[answers >= 0].tolist()))} classes; the first is {kind}, '
    f'{width} x {height}, ' + text_lib.plain(_label(source, record['label']))
  )
  if spec.size not in (None, len(source)):
    yield (
      f'NOTE: the published split has {spec.size:,} images: results on these '
      'do not compare with others'
    )


def _read_all(source: Any) -> str:
  """Read all records, and return a line about them."""
  size, labels, problems = len(source), set(), []
  parts: Any = source.parts if isinstance(source, records.Chain) else [source]
  is_stored = isinstance(parts[0], sources.TfdsSource)
  stored = [0] * len(parts)
  read = preprocessing.image_reader()

  def one(place: int) -> tuple[int, int, Any, list[str]]:
    number, at = divmod(place, len(parts[0]))
    part = parts[number]
    try:
      label = examples.make(part, at, read, None)['label']
      count = part.stored_bytes(at) if is_stored else 0
      return number, count, label, []
    except (OSError, ValueError) as error:
      return number, 0, -1, [str(error)]

  progress = tqdm.tqdm(total=size, desc=source.name, unit=' images')
  with progress, futures.ThreadPoolExecutor() as pool:
    for start in range(0, size, _PART):
      places = range(start, min(start + _PART, size))
      for number, count, label, problem in pool.map(one, places):
        stored[number] += count
        labels.update(np.ravel(label).tolist())
        problems += problem
        progress.update()
  summary = f'{source.name}: {len(problems)} of {size} records are damaged.'
  text_lib.raise_problems(summary, problems, most=8)
  classes = len(labels - {-1})  # which fills lists of labels
  if classes < 2:
    raise ValueError(f'{source.name}: all images are of {classes} class')
  for part, count in zip(parts, stored, strict=True):
    if is_stored and part.num_bytes not in (0, count):  # 0 is not stated
      raise ValueError(
        f'{part.name}: its records have {count:,} bytes, not '
        f'{part.num_bytes:,}, so a file is of another data set or twice there. '
        'Prepare it again.'
      )
  return f'{source.name}: all {size:,} images were read, of {classes} classes'


def _check_hashes(folder: pathlib.Path) -> Iterator[str]:
  """Compare the files of an imported data set with the hashes it states."""
  report = folder / pictures.REPORT
  if report.is_file():
    expected = text_lib.read_json(report, 10**7).get('sha256', {})
    changed = [x for x in expected if hashes.digest(folder / x) != expected[x]]
    if changed:
      raise OSError(
        f'{folder}: the SHA-256 of {text_lib.listed(changed)} is not that in '
        f'{report.name}: the file was changed. Import the pictures again.'
      )
    yield f'SHA-256 of {len(expected)} files: as in {report.name}'


def _label(source: Any, label: Any) -> str:
  names = getattr(source, 'folders', source.class_names)
  if isinstance(label, int):
    return f'label {label} ({names[label]})'
  listed = [f'{k} ({names[k]})' for k in label if k >= 0]
  return f'labels {", ".join(listed) or "none"}'
