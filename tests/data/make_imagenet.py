"""Writes a tiny ImageNet and its shifts by the genuine TFDS builders.

python tests/data/make_imagenet.py    # imagenet.tar.xz anew: needs TensorFlow

The pictures are noise of a few pixels, in archives of the real form. R and A
have one for each of 200 classes, as their benchmarks ask for. What the builders
wrote is kept in one compressed file: array_record fills up each of its files
to 128 kB with zeros, and every data set repeats the 1000 labels.
"""

import contextlib
import io
import json
import os
import pathlib
import tarfile
import tempfile
from unittest import mock
import zipfile

import numpy as np
from PIL import Image

KEPT = pathlib.Path(__file__).with_name('imagenet.tar.xz')

TRAIN_CLASSES = (0, 1, 999)
PER_CLASS = 5
VALIDATION = 11  # pictures; a prime, which no batch size divides
V2 = {
  'matched-frequency': (
    'imagenetv2-matched-frequency-format-val',
    (0, 10, 999),
  ),
  'threshold-0.7': ('imagenetv2-threshold0.7-format-val', (3, 5)),
  'topimages': ('imagenetv2-top-images-format-val', (7,)),
}
SKETCH = (2, 2, 998)
# Kinds of ImageNet-C, from its paper.
KINDS = (
  *('gaussian_noise', 'shot_noise', 'impulse_noise'),
  *('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
  *('snow', 'frost', 'fog', 'brightness'),
  *('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression'),
)
# What ReaL says of the pictures, in the order of their names.
REAL = [[65], [], [970, 795], [230, 231], [809], [516], [57], [], [334, 1, 2]]
REAL += [[415], [674]]
# The 200 of R and of A, here: not the real ones, but as many.
R = tuple(range(1, 1000, 5))
A = tuple(range(4, 1000, 5))


def picture(seed: int, size=(20, 15), *, format='JPEG', mode='RGB') -> bytes:
  """Noise as a file; its pixels follow from the seed."""
  rng = np.random.default_rng(seed)
  shape = (size[1], size[0], 3)
  image = Image.fromarray(rng.integers(0, 256, shape, np.uint8)).convert(mode)
  file = io.BytesIO()
  if format == 'JPEG':
    image.save(file, format, quality=50, optimize=True)
  else:
    image.save(file, format)
  return file.getvalue()


def dot(index: int) -> bytes:
  """One pixel, grey, a different one for each of 250 indices."""
  file = io.BytesIO()
  Image.new('L', (1, 1), index).save(file, 'JPEG', quality=95, optimize=True)
  return file.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
  """A tar of files by their names."""
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode='w') as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return content.getvalue()


def wnids() -> list[str]:
  """The 1000 classes, in label order."""
  import tensorflow_datasets as tfds

  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return path.read_text().split()


def validation_files() -> dict[str, bytes]:
  """Pictures of several sizes; the second is grey."""
  return {
    f'ILSVRC2012_val_{i + 1:08d}.JPEG': picture(
      100 + i, (16 + i, 12 + 3 * (i % 4)), mode='L' if i == 1 else 'RGB'
    )
    for i in range(VALIDATION)
  }


def write_manual(folder: pathlib.Path) -> None:
  """The two tars that one downloads by hand."""
  names = wnids()
  train = {
    f'{names[label]}.tar': archive(
      {
        f'{names[label]}_{i}.JPEG': picture(10 * label + i, (18 + i, 14))
        for i in range(PER_CLASS)
      }
    )
    for label in TRAIN_CLASSES
  }
  folder.mkdir(parents=True)
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(archive(train))
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(archive(validation_files()))


def write_smooth(folder: pathlib.Path) -> None:
  """A tar of validation pictures that are small files at 224 x 224 pixels."""
  files = {}
  for i in range(2):
    x, y = np.meshgrid(np.arange(260), np.arange(240))
    pixels = np.stack([x / 2, y / 2, (x + y + 90 * i) / 4], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG')
    files[f'ILSVRC2012_val_{i + 1:08d}.JPEG'] = file.getvalue()
  folder.mkdir(parents=True)
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(archive(files))


def write_folders(folder: pathlib.Path) -> None:
  """Write what the archives of V2, R and A hold."""
  names = wnids()
  files = {}
  for top, labels in V2.values():
    for label in labels:
      files[f'{top}/{label}/{label}_0.jpeg'] = picture(2000 + label)
  for i, label in enumerate(R):
    files[f'imagenet-r/{names[label]}/art_{i}.jpg'] = dot(i)
  for i, label in enumerate(A):
    files[f'imagenet-a/{names[label]}/a_{i}.jpg'] = dot(i)
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  (folder / 'imagenet-r' / 'README.txt').write_text('no class')


def write_sketch(path: pathlib.Path) -> None:
  """The zip of Sketch, where one file is a PNG, as its name does not say."""
  names = wnids()
  with zipfile.ZipFile(path, 'w') as file:
    for i, label in enumerate(SKETCH):
      content = picture(
        3000 + i, (9, 16), format='PNG' if i == 1 else 'JPEG', mode='L'
      )
      file.writestr(f'sketch/{names[label]}/sketch_{i}.JPEG', content)


def build(data_dir: pathlib.Path) -> None:
  """Runs the builders: no network, all archives are our own."""
  import tensorflow_datasets as tfds

  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    write_manual(folder / 'manual')
    write_smooth(folder / 'smooth')
    write_folders(folder / 'extracted')
    write_sketch(folder / 'sketch.zip')
    (folder / 'real.json').write_text(json.dumps(REAL))

    def reply(url, path):
      path = tfds.core.Path(path)
      return [path for _ in url] if isinstance(url, list) else path

    def prepare(name, manual='manual', **patched):
      config = tfds.download.DownloadConfig(manual_dir=folder / manual)
      with contextlib.ExitStack() as stack:
        for method, path in patched.items():
          stack.enter_context(
            mock.patch.object(
              tfds.download.DownloadManager,
              method,
              lambda self, url, path=path: reply(url, path),
            )
          )
        builder = tfds.builder(
          name, data_dir=str(data_dir), file_format='array_record'
        )
        builder.download_and_prepare(download_config=config)

    prepare('imagenet2012')
    prepare('imagenet2012_real', download=folder / 'real.json')
    for name in ('imagenet_r', 'imagenet_a', *(f'imagenet_v2/{v}' for v in V2)):
      prepare(name, download_and_extract=folder / 'extracted')
    prepare('imagenet_sketch', download=folder / 'sketch.zip')
    # Changing the contrast takes no OpenCV, whose generator is seeded all the
    # same; and of the frost's pictures only the paths.
    with mock.patch.object(tfds.core, 'lazy_imports', mock.MagicMock()):
      prepare('imagenet2012_corrupted/contrast_1', 'smooth', download=folder)


def pack(data_dir: pathlib.Path, path: pathlib.Path) -> None:
  """Writes what was prepared into one file."""
  with tarfile.open(path, 'w:xz', preset=9) as tar:
    for file in sorted(data_dir.rglob('*.*')):
      name = file.relative_to(data_dir)
      if file.is_file() and not {'downloads', '.config'} & {*name.parts}:
        info = tar.gettarinfo(file, str(name))
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ''
        tar.addfile(info, io.BytesIO(file.read_bytes()))


def unpack(data_dir: pathlib.Path) -> None:
  """Puts what is kept beside this file into a folder, as it was prepared."""
  with tarfile.open(KEPT) as tar:
    tar.extractall(data_dir, filter='data')


def spread_corruption(data_dir: pathlib.Path) -> None:
  """Makes all 75 configurations of ImageNet-C of the one that was built."""
  built = data_dir / 'imagenet2012_corrupted' / 'contrast_1' / '3.1.0'
  info = json.loads((built / 'dataset_info.json').read_text())
  for kind in KINDS:
    for severity in range(1, 6):
      folder = built.parents[1] / f'{kind}_{severity}' / built.name
      if folder != built:
        folder.mkdir(parents=True)
        for path in built.iterdir():
          os.link(path, folder / path.name)
        (folder / 'dataset_info.json').unlink()
        (folder / 'dataset_info.json').write_text(
          json.dumps({**info, 'configName': f'{kind}_{severity}'})
        )


# By ObjectNet folder, the places of its ImageNet classes; the first dozen has
# two each, as a dozen of the real ones has.
OBJECTNET = {
  f'thing_{i:03d}': [8 * i + 1, 8 * i + 5] if i < 12 else [8 * i + 1]
  for i in range(113)
}


def write_objectnet(folder: pathlib.Path) -> None:
  """A copy of the form of ObjectNet: 113 classes that count, 3 that do not."""
  # Ids of the challenge are not the places of classes, nor are names folders.
  number = {index: (7 * index + 3) % 1000 for index in range(1000)}
  texts = {number[index]: f'object {index}, thing' for index in range(1000)}
  names = {name: f'Thing / {name[-3:]}' for name in OBJECTNET}
  others = {f'other_{i}': f'Other {i}' for i in range(3)}
  overlap = {
    names[name]: '; '.join(texts[number[index]] for index in indices)
    for name, indices in reversed(OBJECTNET.items())
  }
  mappings = {
    'folder_to_objectnet_label.json': json.dumps({**others, **names}),
    'objectnet_to_imagenet_1k.json': json.dumps(overlap),
    'pytorch_to_imagenet_2012_id.json': json.dumps(number),
    'imagenet_to_label_2012_v2': ''.join(f'{texts[i]}\n' for i in range(1000)),
  }
  (folder / 'mappings').mkdir(parents=True)
  for name, content in mappings.items():
    (folder / 'mappings' / name).write_text(content)
  for seed, name in enumerate([*others, *names]):
    (folder / 'images' / name).mkdir(parents=True)
    # The third has two pictures.
    for i in range(2 if name.endswith('002') else 1):
      path = folder / 'images' / name / f'{seed:03d}{i}.png'
      path.write_bytes(framed(9000 + 10 * seed + i))


def framed(seed: int) -> bytes:
  """A PNG of noise with ObjectNet's red border of one pixel."""
  image = Image.open(io.BytesIO(picture(seed, (14, 12), format='PNG')))
  red = Image.new('RGB', (16, 14), (255, 0, 0))
  red.paste(image, (1, 1))
  file = io.BytesIO()
  red.save(file, 'PNG')
  return file.getvalue()


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as scratch:
    build(pathlib.Path(scratch))
    pack(pathlib.Path(scratch), KEPT)
