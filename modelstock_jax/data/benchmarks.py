"""Benchmarks: frozen specs of evaluations, named as in the results."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import pathlib
import tomllib
from typing import Any
from typing import NamedTuple

from etils import epath
import numpy as np

from modelstock_jax.data import corruptions
from modelstock_jax.data import labels
from modelstock_jax.data import objectnet
from modelstock_jax.data import pipeline
from modelstock_jax.data import preprocessing
from modelstock_jax.data import records
from modelstock_jax.data import shifts
from modelstock_jax.data import sources
from modelstock_jax.formats import text as text_lib


class Benchmark(NamedTuple):
  """One column of the results table.

  Attributes:
    name: name in `results.json`.
    dataset: a prepared data set, as `sources.open_source` takes it; the folder
      in the data directory if it is ObjectNet.
    split: its split.
    shift: a key of `shifts.SHIFTS` that every image passes through, or `None`.
    corruption: a key of `corruptions.CORRUPTIONS`, which comes last, or `None`.
    version: beginning of its version: '5' is any 5.x.y; None is the newest.
    metric: 'top1': the best class is the label. 'real': it is in the image's
      list of labels; images with an empty list do not count. 'objectnet': the
      best ImageNet class stands for the ObjectNet class.
    num_classes: classes to choose from, where these are not all: those that
      the split contains, which must be so many.
    configs: configurations of the data set that are read, one after another.
    crop: pixels to cut off each side before anything else.
    size: examples of the published split, where there is one.
    title: name in words, where it is another one.
    shift_of: the in-distribution benchmark, where it counts in the mean of that
      one's shifts: the paper's five, for ViT-B/16 without ObjectNet.
    unless: another variant of it, which counts in its place if both are there.
  """

  name: str
  dataset: str
  split: str = 'test'
  shift: str | None = None
  corruption: str | None = None
  version: str | None = None
  metric: str = 'top1'
  num_classes: int | None = None
  configs: Sequence[str] = ()
  crop: int = 0
  size: int | None = None
  title: str = ''
  shift_of: str | None = None
  unless: str | None = None

  @property
  def datasets(self) -> tuple[str, ...]:
    """The prepared data sets: `dataset`, or all of its `configs`."""
    names = tuple(f'{self.dataset}/{config}' for config in self.configs)
    return names or (self.dataset,)


class Group(NamedTuple):
  """Benchmarks of one table, and what is published of them.

  Attributes:
    benchmarks: their names.
    published: accuracies in per cent, in that order, by the title of a row.
  """

  benchmarks: Sequence[str]
  published: dict[str, Sequence[float]]


_FILE = pathlib.Path(__file__).with_suffix('.toml')
_ENTRIES = tomllib.loads(_FILE.read_text('utf-8'))
GROUPS = {
  name: Group(**entry) for name, entry in _ENTRIES.pop('groups').items()
}
BENCHMARKS = {name: Benchmark(name, **x) for name, x in _ENTRIES.items()}
SHIFTS, IMAGENET_SHIFTS = (
  tuple(
    name
    for name, spec in BENCHMARKS.items()
    if spec.shift_of == test and not spec.unless
  )
  for test in ('digits', 'imagenet')
)


def find_benchmark(name: str) -> Benchmark:
  """Return the benchmark of a name.

  Args:
    name: a key of `BENCHMARKS`, or 'SET/SPLIT' of a prepared data set.

  Returns:
    Its spec.

  Raises:
    ValueError: there is none of that name; lists those there are.

  >>> find_benchmark('noise').shift
  'noise'
  >>> find_benchmark('digits/validation').dataset
  'digits'
  """
  dataset, _, split = name.rpartition('/')
  if dataset and split:
    return Benchmark(name, dataset, split)
  if name not in BENCHMARKS:
    raise ValueError(
      f'there is no benchmark {name!r}: known are {", ".join(BENCHMARKS)}; and '
      f'groups of --benchmarks: {", ".join(GROUPS)}. SET/SPLIT is a split of a '
      'prepared data set.'
    )
  return BENCHMARKS[name]


def open_benchmark(
  benchmark: Benchmark, data_dir: text_lib.PathLike | None = None
) -> records.Source:
  """Open the source that a benchmark reads.

  Args:
    benchmark: its spec.
    data_dir: the folder of the prepared data sets; `None` for the bundled.

  Returns:
    The records: dicts with `image`, encoded bytes, and `label`, an `int`, or
    `int32[10]` filled up with -1 if the metric is 'real'.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: it has no such version or split, or is of another format.
    OSError: a file is damaged.

  >>> open_benchmark(find_benchmark('digits'))
  TfdsSource(digits/1.0.0/test: 597 records)
  """
  if benchmark.metric == 'objectnet':
    if not data_dir:
      raise FileNotFoundError(
        f'{benchmark.name} does not come with the package: say where it is '
        'with --data_dir'
      )
    return objectnet.ObjectNet(epath.Path(data_dir) / benchmark.dataset)

  parts = [
    sources.open_source(
      dataset,
      benchmark.split,
      data_dir=data_dir,
      version=benchmark.version,
      label='real_label' if benchmark.metric == 'real' else 'label',
    )
    for dataset in benchmark.datasets
  ]
  return records.Chain(parts) if benchmark.configs else parts[0]


def answers(benchmark: Benchmark, source: Any) -> np.ndarray:
  """Return the label that every logit votes for.

  The best of several ImageNet classes that stand for one ObjectNet class beats
  the others' best if it is the best of all, so that one maximum decides.

  Args:
    benchmark: its spec.
    source: the source that `open_benchmark` returned.

  Returns:
    `int32[K]`: the label that logit k votes for, -1 if it is no choice.

  Raises:
    ValueError: the split does not have `num_classes` classes.

  >>> digits = find_benchmark('digits')
  >>> answers(digits, open_benchmark(digits))
  array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], dtype=int32)
  """
  if isinstance(source, objectnet.ObjectNet):
    num_present, table = len(source.folders), source.answers
  elif benchmark.num_classes is None:
    return np.arange(len(source.class_names), dtype=np.int32)
  else:
    present = np.unique(labels.read(source))
    num_present = len(present)
    table = np.full(len(source.class_names), -1, np.int32)
    table[present] = present
  if num_present != benchmark.num_classes:
    raise ValueError(
      f'{source.name} has {num_present} classes, {benchmark.name} takes '
      f'{benchmark.num_classes}: the copy is not complete, or not of this data '
      'set. Get it again.'
    )
  return table


def benchmark_reader(
  benchmark: Benchmark, source: Any, image_size: int | None = None
) -> pipeline.EvalRead:
  """Return the `read` that makes the examples of a benchmark.

  Args:
    benchmark: its spec.
    source: the source that `open_benchmark` returned.
    image_size: size for the network, pixels: images pass through CLIP's
      transform, after the crop, unless all have that size already. `None`
      only decodes.

  Returns:
    From a record and its place in the split to
    `dict(image=uint8[H, W, C], label=int32[...])`; H = W = `image_size`.

  >>> digits = find_benchmark('digits')
  >>> source = open_benchmark(digits)
  >>> benchmark_reader(digits, source, 16)(source[0], 0)['image'].shape
  (16, 16, 1)
  """
  part = first_part(source)
  decode: Callable[[bytes], np.ndarray] = functools.partial(
    preprocessing.decode, channels=part.channels
  )
  fits = part.image_shape == (image_size, image_size) and not benchmark.crop
  if image_size is not None and not fits:
    decode = functools.partial(
      preprocessing.clip_image,
      size=image_size,
      channels=part.channels,
      border=benchmark.crop,
    )

  def transform(encoded: bytes, place: int) -> np.ndarray:
    image, name = decode(encoded), benchmark.shift
    return shifts.apply(name, image, place) if name else image

  read = preprocessing.image_reader(transform)
  kind = benchmark.corruption
  return corruptions.corrupted(read, kind) if kind else read


def first_part(source: Any) -> Any:
  """Return the first source of a chain, or the source that is none."""
  return source.parts[0] if isinstance(source, records.Chain) else source
