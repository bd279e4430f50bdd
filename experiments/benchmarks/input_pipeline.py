r"""The cost of reading an image: ours, tf.data's and the bare decoder's.

    .venv-oracles/bin/python experiments/benchmarks/input_pipeline.py

The images are JPEGs of 500x375 pixels and quality 90, smooth noise under fine
noise, 66 kB each, in memory. All results are uint8, 224x224.

CLIP's transform, exactly (bicubic, antialiased, the middle):

* decoder, resize: simplejpeg and Pillow alone, no crop, no array;
* eval_batches: our pipeline, from the records to batches;
* tf.data: `decode_jpeg` with the accurate DCT, `resize` bicubic with
  antialias, `resize_with_crop_or_pad`.

Training, on random boxes of 0.9 to 1.0 of the area, with a flip:

* decoder, resize of boxes: simplejpeg and Pillow alone, bicubic, with boxes
  drawn beforehand;
* train_batches: our pipeline, two models;
* tf.data: `sample_distorted_bounding_box`, `decode_and_crop_jpeg`, `resize`
  as above.

CPU time is that of all threads of the process, over the images that were
decoded. Rows take turns within every repeat, so that a busy machine is busy for
all of them; figures, and the ratios of them, are of the best repeat.
"""

from collections.abc import Callable
from concurrent import futures
import io
import itertools
import os
import time
from typing import Any

import common
import numpy as np
from PIL import Image
import simplejpeg
import tensorflow as tf

from modelstock_jax import data
from modelstock_jax.data import augment
from modelstock_jax.data import examples
from modelstock_jax.data import transforms

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SIZE = 224
WIDE = SIZE * WIDTH // HEIGHT  # of a whole image, resized
BATCH = 64
SCALE = (0.9, 1.0)
AUGMENT = augment.Augment(SIZE, crop_scale=SCALE, flip=0.5)
KINDS = {
  'CLIP': ('decoder, resize', 'eval_batches', 'tf.data'),
  'train': ('decoder, resize of boxes', 'train_batches', 'tf.data'),
}

# Opens what is to be read, and returns what is measured: a function that
# returns how many images it has decoded.
Row = Callable[[], Callable[[], int]]


def photo(rng: np.random.Generator) -> bytes:
  """Make a JPEG about as large as photographs of its size and quality."""
  rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  smooth = rough.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
  pixels = np.asarray(smooth) + rng.normal(0, 5.2, (HEIGHT, WIDTH, 1))
  file = io.BytesIO()
  image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
  image.save(file, 'jpeg', quality=QUALITY)
  return file.getvalue()


def bare(images: list[bytes], threads: int) -> tuple[Row, Row]:
  """Return the rows of the decoder: of whole images, and of boxes."""

  def draw(number):
    rng = examples.generator(seed=0, model=0, epoch=0, place=number)
    return augment.random_box(WIDTH, HEIGHT, SCALE, AUGMENT.crop_ratio, rng)

  def row(size, boxes) -> Row:
    def one(encoded, box):
      image = Image.fromarray(simplejpeg.decode_jpeg(encoded))
      image.resize(size, Image.Resampling.BICUBIC, box=box)

    def run():
      with futures.ThreadPoolExecutor(threads) as pool:
        return len(list(pool.map(one, images, boxes)))

    return lambda: run

  boxes = [draw(number) for number in range(len(images))]
  return row((WIDE, SIZE), [None] * len(images)), row((SIZE, SIZE), boxes)


def ours(images: list[bytes], threads: int) -> tuple[Row, Row]:
  """Return the rows of our pipelines, of evaluation and of training."""
  arrays = {'image': np.array(images, object), 'label': np.arange(len(images))}
  source = data.ArraySource('photos', arrays)

  def evaluate():
    read = data.image_reader(lambda x, place: transforms.clip_image(x, SIZE))
    batches = data.eval_batches(
      source, batch_size=BATCH, read=read, num_threads=threads
    )

    def run():
      decoded = sum(int(batch['mask'].sum()) for batch in batches)
      batches.close()
      return decoded

    return run

  def train():
    decoded = itertools.count()  # it reads ahead, and all of that counts

    def counted(encoded, rng):
      next(decoded)
      return AUGMENT(encoded, rng)

    batches = data.train_batches(
      source,
      num_models=2,
      batch_size=BATCH // 2,
      seed=0,
      read=data.image_reader(counted),
      num_threads=threads,
    )

    def run():
      for _ in range(len(images) // BATCH):
        next(batches)
      batches.close()
      return next(decoded)

    return run

  return evaluate, train


def theirs(images: list[bytes], threads: int) -> tuple[Row, Row]:
  """Return the rows of tf.data."""
  exact = {'channels': 3, 'dct_method': 'INTEGER_ACCURATE'}

  def clip(encoded):
    image = tf.io.decode_jpeg(encoded, **exact)
    image = tf.image.resize(image, (SIZE, WIDE), 'bicubic', antialias=True)
    return tf.image.resize_with_crop_or_pad(image, SIZE, SIZE)

  def crop(encoded):
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(encoded),
      tf.zeros((1, 0, 4)),
      area_range=SCALE,
      aspect_ratio_range=AUGMENT.crop_ratio,
      use_image_if_no_bounding_boxes=True,
    )
    box = tf.concat([begin[:2], size[:2]], 0)
    image = tf.io.decode_and_crop_jpeg(encoded, box, **exact)
    image = tf.image.resize(image, (SIZE, SIZE), 'bicubic', antialias=True)
    return tf.image.random_flip_left_right(image)

  def row(transform) -> Row:
    def one(encoded):
      image = tf.clip_by_value(tf.round(transform(encoded)), 0, 255)
      return tf.cast(image, tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = dataset.map(one, num_parallel_calls=threads).batch(BATCH)
    dataset = dataset.with_options(options).prefetch(2)
    return lambda: lambda: sum(map(len, dataset.as_numpy_iterator()))

  return row(clip), row(crop)


def measure(row: Row) -> tuple[float, float]:
  """Return milliseconds of CPU and of time for each image."""
  run = row()
  wall, cpu = time.perf_counter(), time.process_time()
  count = run()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return 1e3 * cpu / count, 1e3 * wall / count


def main() -> None:
  """Run the benchmark and print its table."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument('--images', type=int, default=128)
  args = parser.parse_args()
  os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
  rng = np.random.default_rng(0)
  images = [photo(rng) for _ in range(args.images)]
  setting = common.setting(('simplejpeg', 'grain', 'tensorflow'))
  rows: list[dict[str, Any]] = []
  for threads in (1, 2):
    made = [make(images, threads) for make in (bare, ours, theirs)]
    for kind, *group in zip(KINDS, *made, strict=True):
      costs = [[measure(row) for row in group] for _ in range(args.repeats + 1)]
      best = np.min(costs[1:], axis=0)  # the first warms up
      for name, (cpu, wall) in zip(KINDS[kind], best, strict=True):
        rows.append(
          {
            'row': f'{kind}: {name}',
            'threads': threads,
            'CPU ms': cpu,
            '/ bare': cpu / best[0, 0],
            'images/s': 1e3 / wall,
            '/ tf.data': best[-1, 1] / wall,
          }
        )
  kilobytes = np.mean([len(image) for image in images]) / 1e3
  note = f'{len(images)} JPEGs of {kilobytes:.0f} kB'
  common.finish(args, setting, rows, [note])


if __name__ == '__main__':
  main()
