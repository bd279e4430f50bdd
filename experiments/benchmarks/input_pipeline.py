"""The cost of reading an image, beside that of the bare decoder.

    python experiments/benchmarks/input_pipeline.py
    python experiments/benchmarks/input_pipeline.py --import=20000

The images are JPEGs of 500x375 pixels and quality 90, smooth noise under fine
noise, 66 kB each, in memory. All results are uint8, 224x224.

* decoder, resize: simplejpeg and Pillow (bicubic, antialiased) alone, of the
  middle, no array: the limit;
* eval_batches: our pipeline with CLIP's transform, from the records to batches;
* train_batches: our pipeline of two models, on random boxes of 0.9 to 1.0 of
  the area, with a flip.

CPU time is that of all threads of the process, over the images that were
decoded. The rows take turns within every repeat; figures, and the ratios of
them, are of the best repeat.
"""

from collections.abc import Callable
from concurrent import futures
import io
import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

import common
import numpy as np
from PIL import Image
import simplejpeg

from modelstock_jax import data
from modelstock_jax.data import augment
from modelstock_jax.data import pictures
from modelstock_jax.data import preprocessing

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SIZE = 224
BATCH = 64
AUGMENT = augment.Augment(SIZE, crop_scale=(0.9, 1.0), flip=0.5)


def photo(
  rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT
) -> bytes:
  """Make a JPEG about as large as photographs of its size and quality."""
  rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  smooth = rough.resize((width, height), Image.Resampling.BICUBIC)
  pixels = np.asarray(smooth) + rng.normal(0, 5.2, (height, width, 1))
  file = io.BytesIO()
  image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
  image.save(file, 'jpeg', quality=QUALITY)
  return file.getvalue()


def bare(images: list[bytes], threads: int) -> Callable[[], int]:
  """Open the decoder."""
  left = (WIDTH - HEIGHT) // 2
  middle = (left, 0, left + HEIGHT, HEIGHT)

  def decode(part):
    for encoded in part:
      image = Image.fromarray(simplejpeg.decode_jpeg(encoded))
      image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=middle)

  def run():
    parts = [images[i : i + 8] for i in range(0, len(images), 8)]
    with futures.ThreadPoolExecutor(threads) as pool:
      list(pool.map(decode, parts))
    return len(images)

  return run


def evaluate(source: data.Source, threads: int) -> Callable[[], int]:
  """Open our pipeline of evaluation."""
  read = data.image_reader(lambda x, place: preprocessing.clip_image(x, SIZE))
  batches = data.eval_batches(
    source, batch_size=BATCH, read=read, num_threads=threads
  )

  def run():
    decoded = sum(int(batch['mask'].sum()) for batch in batches)
    batches.close()
    return decoded

  return run


def train(source: data.Source, threads: int) -> Callable[[], int]:
  """Open our pipeline of training."""
  decoded = itertools.count()  # it reads ahead, and all of that counts

  def transform(encoded, rng):
    next(decoded)
    return AUGMENT(encoded, rng)

  batches = data.train_batches(
    source,
    num_models=2,
    batch_size=BATCH // 2,
    seed=0,
    read=data.image_reader(transform),
    num_threads=threads,
  )

  def run():
    for _ in range(len(source) // BATCH):
      next(batches)
    batches.close()
    return next(decoded)

  return run


def measure(open_row: Callable[..., Any], *arguments: Any) -> list[float]:
  """Return milliseconds of CPU and of time for each image."""
  run = open_row(*arguments)
  wall, cpu = time.perf_counter(), time.process_time()
  count = run()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return [1e3 * cpu / count, 1e3 * wall / count]


def import_rows(count: int, repeats: int, width: int, height: int) -> list[Any]:
  """Time the import of files and copying them, in turns."""
  rng = np.random.default_rng(0)
  images = [photo(rng, width, height) for _ in range(200)]
  rows: dict[str, list[float]] = {'cp -r': [], 'import': []}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for i in range(count):
      path = folder / 'pics' / f'class_{i % 10}' / f'{i:06d}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      encoded = images[i % len(images)]  # with a comment of its own
      comment = b'\xff\xfe\x00\x0a%08d' % i
      path.write_bytes(encoded[:2] + comment + encoded[2:])
    copy = ['cp', '-r', folder / 'pics', folder / 'new']
    for _, row in itertools.product(range(repeats), rows):
      os.sync()
      if os.geteuid() == 0:
        pathlib.Path('/proc/sys/vm/drop_caches').write_text('3')
      start = time.perf_counter()
      if row == 'import':
        pictures.import_pictures(folder / 'pics', folder / 'new')
      else:
        subprocess.run(copy, check=True)
      os.sync()
      rows[row].append(time.perf_counter() - start)
      shutil.rmtree(folder / 'new')
  kilobytes = np.mean([len(image) for image in images]) / 1e3
  return [
    {
      'row': f'{row}, {count} of {kilobytes:.1f} kB',
      'median s': np.median(times),
      'min s': min(times),
      'speed / copy (median)': np.median(rows['cp -r']) / np.median(times),
      'speed / copy (min)': min(rows['cp -r']) / min(times),
    }
    for row, times in rows.items()
  ]


def main() -> None:
  """Run the benchmark and print its table."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument('--images', type=int, default=128)
  parser.add_argument('--import', type=int, dest='files', metavar='FILES')
  args = parser.parse_args()
  if args.files:
    setting = common.setting(('array_record', 'simplejpeg'))
    rows = []
    for size in ((WIDTH, HEIGHT), (80, 60)):
      rows += import_rows(args.files, args.repeats, *size)
    common.finish(args, setting, rows)
    return
  rng = np.random.default_rng(0)
  images = [photo(rng) for _ in range(args.images)]
  arrays = {'image': np.array(images, object), 'label': np.arange(len(images))}
  source = data.ArraySource('photos', arrays)
  setting = common.setting(('numpy', 'simplejpeg', 'grain'))
  kinds: dict[str, tuple[Callable[..., Any], Any]] = {
    'decoder, resize': (bare, images),
    'eval_batches': (evaluate, source),
    'train_batches': (train, source),
  }
  rows = []
  for threads in (1, 2):
    costs = [
      [measure(*kind, threads) for kind in kinds.values()]
      for _ in range(args.repeats + 1)
    ]
    best = np.min(costs[1:], axis=0)  # the first warms up
    for name, (cpu, wall) in zip(kinds, best, strict=True):
      rows.append(
        {
          'row': name,
          'threads': threads,
          'CPU ms': cpu,
          'CPU / decoder': cpu / best[0, 0],
          'images/s': 1e3 / wall,
        }
      )
  kilobytes = np.mean([len(image) for image in images]) / 1e3
  note = f'{len(images)} JPEGs of {kilobytes:.0f} kB'
  common.finish(args, setting, rows, [note])


if __name__ == '__main__':
  main()
