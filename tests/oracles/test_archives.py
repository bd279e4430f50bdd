"""Check imports of data sets that `datasets` and webdataset have written."""

import io

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import pictures
from modelstock_jax.data import sources

pytestmark = pytest.mark.oracle

NAMES = ['zebra', 'cat']
SIZES = {'train': 6, 'validation': 2, 'test': 2}


def examples(split):
  """Return pictures as bytes, each with its label."""
  for number in range(SIZES[split]):
    rng = np.random.default_rng([number, SIZES[split], len(split)])
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).save(file, 'png')
    yield file.getvalue(), number % 2


def check(data_dir, names):
  assert sources.class_names('pics', data_dir=data_dir) == tuple(names)
  for split in SIZES:
    source = sources.open_source('pics', split, data_dir=data_dir)
    actual = {x['image']: names[x['label']] for x in source}
    assert actual == {image: NAMES[label] for image, label in examples(split)}


@pytest.mark.parametrize('kind', ['save_to_disk', 'to_parquet', 'one', 'paths'])
def test_datasets(kind, tmp_path):
  import datasets

  features = datasets.Features(
    {'image': datasets.Image(), 'label': datasets.ClassLabel(names=NAMES)}
  )
  sets = datasets.DatasetDict()
  for split in SIZES:
    images, labels = zip(*examples(split), strict=True)
    if kind == 'paths':  # of files, whose bytes are put in when it is saved
      paths = [tmp_path / f'{split}_{i}.png' for i in range(len(images))]
      for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
      images = list(map(str, paths))
    else:
      images = [{'bytes': image, 'path': None} for image in images]
    rows = {'image': images, 'label': list(labels)}
    sets[split] = datasets.Dataset.from_dict(rows, features)
  folder = tmp_path / 'pics'
  if kind == 'to_parquet':
    for split, part in sets.items():
      part.to_parquet(folder / f'data/{split}-00000-of-00001.parquet')
  elif kind == 'one':
    # In another order, of which `datasets` keeps indices.
    part = sets['train'].shuffle(seed=1).select(range(6))
    part.save_to_disk(folder, num_shards=2)
    done = pictures.import_pictures(folder, tmp_path / 'data')
    sizes = {'train': 2, 'validation': 1}
    assert done.counts == {'zebra': sizes, 'cat': sizes}
    return
  else:
    sets.save_to_disk(folder)
  pictures.import_pictures(folder, tmp_path / 'data')
  check(tmp_path / 'data', NAMES)


def test_webdataset(tmp_path):
  import webdataset

  (tmp_path / 'pics').mkdir()
  for split in SIZES:
    pattern = f'{tmp_path}/pics/{split}-%06d.tar'
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
      for number, (image, label) in enumerate(examples(split)):
        writer.write(
          {'__key__': f'{number:06d}', 'png': image, 'txt': NAMES[label]}
        )
  pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')
  check(tmp_path / 'data', sorted(NAMES))
