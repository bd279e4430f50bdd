r"""The cost of reading an image: ours, tf.data's and the bare decoder's.

    .venv-oracles/bin/python experiments/benchmarks/input_pipeline.py

The images are JPEGs of 500x375 pixels and quality 90, smooth noise under fine
noise, 66 kB each, which a TFDS builder writes to a temporary folder: in
array_record for ours, in tfrecord for tf.data. All results are uint8, 224x224.

CLIP's transform, exactly (bicubic, antialiased, the middle):

* decoder, resize: simplejpeg and Pillow on bytes in memory, no crop, no array;
* clip_image: our function on the same bytes;
* eval_batches: our pipeline, from the files to batches;
* tf.data: `decode_jpeg` with the accurate DCT, `resize` bicubic with
  antialias, `resize_with_crop_or_pad`.

Training, on random boxes of 0.9 to 1.0 of the area, with a flip:

* decoder, resize of boxes: simplejpeg and Pillow, bicubic, on bytes in memory,
  with boxes drawn beforehand;
* Augment: our function on the same bytes;
* train_batches: our pipeline, two models;
* tf.data: `sample_distorted_bounding_box`, `decode_and_crop_jpeg`, `resize`
  as above;
* tf.data, bilinear: the same, resized without antialias, as is common.

CPU time is that of all threads of the process, over the images that were
decoded. Rows take turns within every round, so that a busy machine is busy for
all of them; figures, and the ratios of them, are of the best round.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import functools
import importlib
import io
import itertools
import json
import logging
import os
import pathlib
import tempfile
import time
from typing import Any
from typing import NamedTuple

import common
import numpy as np
from PIL import Image
import simplejpeg

from modelstock_jax.data import augment
from modelstock_jax.data import examples
from modelstock_jax.data import pipeline
from modelstock_jax.data import sources
from modelstock_jax.data import transforms

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SIZE = 224
NAME = 'photos'
BATCH = 32
SCALE = (0.9, 1.0)
THREADS = (1, 2)

# Opens what is to be read, and returns what is measured: a function that
# returns how many images it has decoded.
Row = Callable[[], Callable[[], int]]

BARE, CLIP, EVAL, TF_CLIP = (
  'CLIP: decoder, resize',
  'CLIP: clip_image',
  'CLIP: eval_batches',
  'CLIP: tf.data',
)
BARE_BOX, AUGMENT, TRAIN, TF_CROP, TF_BILINEAR = (
  'train: decoder, resize of boxes',
  'train: Augment',
  'train: train_batches',
  'train: tf.data',
  'train: tf.data, bilinear',
)


class Cost(NamedTuple):
  """The cost of one row in one round."""

  cpu_ms: float  # per image
  speed: float  # images per second


def photo(rng: np.random.Generator) -> bytes:
  """Makes a JPEG about as large as photographs of its size and quality."""
  rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  smooth = rough.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
  pixels = np.asarray(smooth) + rng.normal(0, 5.2, (HEIGHT, WIDTH, 1))
  file = io.BytesIO()
  image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
  image.save(file, 'jpeg', quality=QUALITY)
  return file.getvalue()


def write(images: list[bytes], folder: pathlib.Path) -> None:
  """Lets TFDS write the images, in both formats."""
  tfds: Any = importlib.import_module('tensorflow_datasets')
  tfds.disable_progress_bar()

  class Photos(tfds.core.GeneratorBasedBuilder):
    """The images, as ImageNet's builder stores its own."""

    name = NAME
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=1000),
        'file_name': tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {'train': self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
      for number, image in enumerate(images):
        record = {'image': io.BytesIO(image), 'label': number % 1000}
        yield number, {**record, 'file_name': f'{number}.JPEG'}

  for file_format in ('array_record', 'tfrecord'):
    builder = Photos(data_dir=folder / file_format, file_format=file_format)
    builder.download_and_prepare()


def bare(encoded: bytes) -> Image.Image:
  """Decodes and resizes; no crop and no array of the result."""
  image = Image.fromarray(simplejpeg.decode_jpeg(encoded))
  width = SIZE * WIDTH // HEIGHT
  return image.resize((width, SIZE), Image.Resampling.BICUBIC)


def bare_box(encoded: bytes, box: tuple[int, int, int, int]) -> Image.Image:
  """Decodes and resizes a box."""
  image = Image.fromarray(simplejpeg.decode_jpeg(encoded))
  return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def in_threads(one: Callable[[int], Any], threads: int, count: int) -> Row:
  """Calls a function of the number of an image for all of them."""

  def part(numbers: range) -> None:
    for number in numbers:
      one(number)

  def run() -> int:
    with futures.ThreadPoolExecutor(threads) as pool:
      starts = range(0, count, 8)
      list(pool.map(part, [range(k, min(k + 8, count)) for k in starts]))
    return count

  return lambda: run


def rows(
  images: list[bytes], data_dir: pathlib.Path, threads: int
) -> dict[str, Row]:
  """Return the rows that are measured."""
  count = len(images)
  transform = augment.Augment(SIZE, crop_scale=SCALE, flip=0.5)
  boxes = [
    augment.random_box(
      WIDTH,
      HEIGHT,
      SCALE,
      transform.crop_ratio,
      examples.generator(seed=0, model=0, epoch=0, place=number),
    )
    for number in range(count)
  ]
  result = {
    BARE: in_threads(lambda i: bare(images[i]), threads, count),
    CLIP: in_threads(
      lambda i: transforms.clip_image(images[i], SIZE), threads, count
    ),
    EVAL: functools.partial(evaluate, data_dir / 'array_record', threads),
    BARE_BOX: in_threads(
      lambda i: bare_box(images[i], boxes[i]), threads, count
    ),
    AUGMENT: in_threads(
      lambda i: transform(
        images[i], examples.generator(seed=0, model=0, epoch=0, place=i)
      ),
      threads,
      count,
    ),
    TRAIN: functools.partial(
      train, data_dir / 'array_record', transform, threads, count
    ),
  }
  return result | tf_rows(data_dir / 'tfrecord', threads, count)


def evaluate(data_dir: pathlib.Path, threads: int) -> Callable[[], int]:
  """Our evaluation pipeline, from the files to all batches."""
  batches = pipeline.eval_batches(
    sources.open_source(NAME, 'train', data_dir=data_dir),
    batch_size=2 * BATCH,
    read=transforms.image_reader(
      lambda encoded, place: transforms.clip_image(encoded, SIZE)
    ),
    num_threads=threads,
  )

  def run() -> int:
    count = sum(int(batch['mask'].sum()) for batch in batches)
    batches.close()
    return count

  return run


def train(
  data_dir: pathlib.Path, transform: augment.Augment, threads: int, count: int
) -> Callable[[], int]:
  """Our training pipeline; it reads ahead, so all that it decodes counts."""
  decoded = itertools.count()

  def counted(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    next(decoded)
    return transform(encoded, rng)

  batches = pipeline.train_batches(
    sources.open_source(NAME, 'train', data_dir=data_dir),
    num_models=2,
    batch_size=BATCH,
    seed=0,
    read=transforms.image_reader(counted),
    num_threads=threads,
  )

  def run() -> int:
    for _ in range(count // (2 * BATCH)):
      next(batches)
    batches.close()
    return next(decoded)

  return run


def tf_rows(data_dir: pathlib.Path, threads: int, count: int) -> dict[str, Row]:
  """The same in tf.data."""
  tf: Any = importlib.import_module('tensorflow')
  tfds: Any = importlib.import_module('tensorflow_datasets')
  builder = tfds.builder_from_directory(data_dir / NAME / '1.0.0')
  width = SIZE * WIDTH // HEIGHT

  def finished(image):
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

  def clip(encoded):
    image = tf.io.decode_jpeg(encoded, 3, dct_method='INTEGER_ACCURATE')
    image = tf.image.resize(image, (SIZE, width), 'bicubic', antialias=True)
    return finished(tf.image.resize_with_crop_or_pad(image, SIZE, SIZE))

  def crop(encoded, method, antialias):
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(encoded),
      tf.zeros((1, 0, 4)),
      area_range=SCALE,
      aspect_ratio_range=(3 / 4, 4 / 3),
      use_image_if_no_bounding_boxes=True,
    )
    box = tf.concat([begin[:2], size[:2]], 0)
    image = tf.io.decode_and_crop_jpeg(
      encoded, box, 3, dct_method='INTEGER_ACCURATE'
    )
    image = tf.image.resize(image, (SIZE, SIZE), method, antialias=antialias)
    return finished(tf.image.random_flip_left_right(image))

  def row(transform) -> Row:
    dataset = builder.as_dataset(
      split='train', decoders={'image': tfds.decode.SkipDecoding()}
    )
    dataset = dataset.map(
      lambda record: dict(
        image=transform(record['image']), label=record['label']
      ),
      num_parallel_calls=threads,
    ).batch(2 * BATCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    dataset = dataset.with_options(options).prefetch(2)

    def all_batches() -> int:
      return sum(len(batch['label']) for batch in dataset.as_numpy_iterator())

    assert all_batches() == count
    return lambda: all_batches

  return {
    TF_CLIP: row(clip),
    TF_CROP: row(lambda e: crop(e, 'bicubic', True)),
    TF_BILINEAR: row(lambda e: crop(e, 'bilinear', False)),
  }


def measure(row: Row) -> Cost:
  """Time and CPU time of one run."""
  run = row()
  wall, cpu = time.perf_counter(), time.process_time()
  count = run()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return Cost(1e3 * cpu / count, count / wall)


def best(costs: list[Cost]) -> Cost:
  """The least CPU time and the greatest speed of all rounds."""
  return Cost(min(c.cpu_ms for c in costs), max(c.speed for c in costs))


def table(result: dict[int, dict[str, list[Cost]]]) -> str:
  """The figures, as a table in Markdown."""
  figures = {
    threads: {name: best(costs) for name, costs in rounds.items()}
    for threads, rounds in result.items()
  }
  heads = [f'CPU ms, {n} | / bare | images/s, {n} | / tf.data' for n in figures]
  lines = [
    f'| row, number of threads | {" | ".join(heads)} |',
    '|---|' + '--:|' * 4 * len(figures),
  ]
  for base, tf, names in (
    (BARE, TF_CLIP, (BARE, CLIP, EVAL, TF_CLIP)),
    (BARE_BOX, TF_CROP, (BARE_BOX, AUGMENT, TRAIN, TF_CROP, TF_BILINEAR)),
  ):
    for name in names:
      cells = [name]
      for costs in figures.values():
        cells += [
          f'{costs[name].cpu_ms:.2f}',
          f'{costs[name].cpu_ms / costs[base].cpu_ms:.2f}',
          f'{costs[name].speed:.0f}',
          f'{costs[name].speed / costs[tf].speed:.2f}',
        ]
      lines.append(f'| {" | ".join(cells)} |')
  gains = [
    f'{name} {figures[2][name].speed / figures[1][name].speed:.2f}'
    for name in (BARE, EVAL, BARE_BOX, TRAIN)
  ]
  return '\n'.join([*lines, '', f'Two threads over one: {"; ".join(gains)}.'])


def main() -> None:
  """Runs the benchmark and prints its table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--json', type=pathlib.Path, help='writes all figures')
  parser.add_argument('--images', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
  logging.getLogger('absl').setLevel(logging.ERROR)
  rng = np.random.default_rng(0)
  images = [photo(rng) for _ in range(args.images)]
  kilobytes = np.mean([len(image) for image in images]) / 1e3
  setting = common.setting(('pillow', 'simplejpeg', 'grain', 'tensorflow-cpu'))
  with tempfile.TemporaryDirectory() as folder:
    write(images, pathlib.Path(folder))
    runs = {n: rows(images, pathlib.Path(folder), n) for n in THREADS}
    result: dict[int, dict[str, list[Cost]]] = {
      n: {name: [] for name in runs[n]} for n in THREADS
    }
    for turn in range(-1, args.rounds):  # the first warms up
      for n in THREADS:
        for name, row in runs[n].items():
          cost = measure(row)
          if turn >= 0:
            result[n][name].append(cost)
  print(
    f'{len(images)} JPEGs of {kilobytes:.0f} kB; {args.rounds} interleaved '
    'rounds\n'
  )
  print(table(result))
  print(common.describe(setting))
  if args.json:
    args.json.write_text(json.dumps(result, indent=2), encoding='utf-8')


if __name__ == '__main__':
  main()
