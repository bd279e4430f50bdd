import functools
import io
import itertools
import logging
import threading
import time

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import augment
from modelstock_jax.data import benchmarks
from modelstock_jax.data import examples
from modelstock_jax.data import pipeline
from modelstock_jax.data import preprocessing
from modelstock_jax.data import records
from modelstock_jax.data import shifts
from modelstock_jax.data import sources


def _numbers(length):
  """A source of no images, whose records are their own places."""
  return records.ArraySource('numbers/train', {'place': np.arange(length)})


def _negated(record, rng):
  return {'minus': -record['place'], 'pair': np.full(2, record['place'])}


class Photos:
  """A source of JPEGs of several sizes, some of which are cut short."""

  name = 'photos/train'
  class_names = ()

  def __init__(self, length, bad=()):
    self._length = length
    self._bad = frozenset(bad)

  def __len__(self):
    return self._length

  @functools.cache  # noqa: B019 - as long as the test
  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    size = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'jpeg')
    encoded = file.getvalue()
    return {
      'image': encoded[: len(encoded) // 2] if index in self._bad else encoded,
      'label': index,
      'file_name': f'{index}.JPEG'.encode(),
    }


AUGMENT = augment.Augment(
  16,
  crop_scale=(0.3, 1.0),
  flip=0.5,
  color_jitter=0.4,
  randaugment_count=2,
  randaugment_magnitude=9,
)
READ = preprocessing.image_reader(AUGMENT)


def _take(count, source, **options):
  batches = pipeline.train_batches(source, **options)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def _places(count, source, **options):
  """Returns int[count, N, B]: which examples each batch holds."""
  return np.stack([b['place'] for b in _take(count, source, **options)])


def _assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name])


OPTIONS = {'num_models': 2, 'batch_size': 5, 'seed': 7}  # 23 // 5: 4 steps


@pytest.mark.parametrize('start', [1, 4, 11])
@pytest.mark.parametrize('options', [{}, {'read': _negated, 'cache': True}])
def test_restart_goes_on_where_the_other_would(start, options):
  complete = _take(16, _numbers(23), **OPTIONS, **options)
  late = _take(16 - start, _numbers(23), start=start, **OPTIONS, **options)
  for one, other in zip(complete[start:], late, strict=True):
    _assert_same(one, other)


@pytest.mark.parametrize('cache', [False, True])
def test_examples_are_what_read_makes(cache):
  """Whatever it names, of any shape; N readers for N models."""
  places = _places(9, _numbers(23), **OPTIONS)
  batches = _take(9, _numbers(23), read=_negated, cache=cache, **OPTIONS)
  for expected, batch in zip(places, batches, strict=True):
    assert batch.keys() == {'minus', 'pair'}
    np.testing.assert_array_equal(batch['minus'], -expected)
    np.testing.assert_array_equal(batch['pair'], np.stack([expected] * 2, -1))
  reads = [lambda r, rng, k=k: {'x': r['place'] + 100 * k} for k in range(2)]
  batches = _take(9, _numbers(23), read=reads, **OPTIONS)
  for expected, batch in zip(places, batches, strict=True):
    np.testing.assert_array_equal(batch['x'], expected + np.array([[0], [100]]))


@pytest.mark.parametrize(('length', 'batch_size'), [(23, 5), (20, 5), (7, 7)])
def test_epoch_visits_each_example_at_most_once(length, batch_size):
  steps = pipeline.steps_per_epoch(_numbers(length), batch_size)
  assert steps == length // batch_size
  places = _places(
    30 * steps,
    _numbers(length),
    num_models=3,
    batch_size=batch_size,
    seed=0,
  )
  epochs = places.reshape(30, steps, 3, batch_size)
  seen = np.zeros((3, length), int)
  for epoch in epochs:
    for model in range(3):
      counts = np.bincount(epoch[:, model].ravel(), minlength=length)
      assert counts.max() == 1
      seen[model] += counts
  # What one epoch drops, others have.
  assert seen.min() > 0


def test_orders_are_independent_of_each_other():
  orders = {
    (seed, model, epoch): tuple(order)
    for seed in (0, 1)
    for model, epochs in enumerate(
      _places(5, _numbers(40), num_models=4, batch_size=40, seed=seed)
      .swapaxes(0, 1)
      .tolist()
    )
    for epoch, order in enumerate(epochs)
  }
  assert len(orders) == 2 * 4 * 5
  assert len(set(orders.values())) == len(orders)
  # The correlation of two random orders of 40 has a deviation of 0.16.
  correlations = np.corrcoef(list(orders.values()))
  off_diagonal = correlations[~np.eye(len(orders), dtype=bool)]
  assert abs(off_diagonal).max() < 0.75
  assert abs(off_diagonal.mean()) < 0.05


def test_model_sees_the_same_whatever_the_number_of_models():
  options = {'batch_size': 5, 'seed': 3}
  alone = _places(9, _numbers(23), num_models=1, **options)
  among = _places(9, _numbers(23), num_models=4, **options)
  np.testing.assert_array_equal(among[:, :1], alone)


@pytest.mark.parametrize('cache', [False, True])
def test_real_batches_hold_real_pairs(cache):
  options = {'num_models': 2, 'batch_size': 50, 'seed': 0, 'cache': cache}
  source = sources.open_source('digits', 'train[:200]')
  pairs = {
    (preprocessing.decode(record['image']).tobytes(), record['label'])
    for record in source
  }
  for batch in _take(5, source, read=preprocessing.image_reader(), **options):
    assert batch['image'].shape == (2, 50, 8, 8, 1)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].shape == (2, 50)
    assert batch['label'].dtype == np.int32
    for image, label in zip(
      batch['image'].reshape(100, -1), batch['label'].ravel(), strict=True
    ):
      assert (image.tobytes(), label) in pairs


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 24}, 'numbers/train has 23 examples.*batch of 24.*lower'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'read': [_negated]}, 'read is a list of 1: pass one function or 2'),
    ({'models': range(1, 3)}, r'models=range\(1, 3\).*0\.\.1'),
    ({'models': range(0)}, r'models=range\(0, 0\)'),
    ({'rows': slice(5, 9)}, r'rows=slice\(5, 9'),
    ({'rows': slice(0, 5, 2)}, 'one after another'),
  ],
)
def test_bad_numbers(options, message):
  with pytest.raises(ValueError, match=message):
    pipeline.train_batches(_numbers(23), **{**OPTIONS, **options})


@pytest.mark.parametrize(
  'make',
  [
    lambda place: np.zeros((1 + place, 4), np.uint8),
    lambda place: np.zeros(4, np.uint8 if place % 2 else np.int32),
  ],
)
def test_examples_of_several_shapes(make):
  batches = pipeline.train_batches(
    _numbers(23), read=lambda r, rng: {'x': make(r['place'])}, **OPTIONS
  )
  with pytest.raises(ValueError, match=r'several shapes.* x .*pass a read='):
    next(batches)
  batches.close()


def test_close_ends_the_threads():
  def readers():
    names = ('grain-prefetch', 'decode')
    return [t for t in threading.enumerate() if t.name.startswith(names)]

  before = set(readers())
  batches = pipeline.train_batches(
    _numbers(23), read=_negated, num_threads=3, **OPTIONS
  )
  next(batches)
  started = set(readers()) - before
  assert len({t.name[:6] for t in started}) == 2
  batches.close()
  deadline = time.monotonic() + 20
  while any(t.is_alive() for t in started) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not any(t.is_alive() for t in started)
  with pytest.raises(ValueError, match='closed'):
    next(batches)


# Process counts, with the models and rows of each: as a mesh of stock = 1 or 2
# gives them.
PROCESSES = {
  'one': [(range(2), slice(0, 8))],
  'two, by rows': [(range(2), slice(0, 4)), (range(2), slice(4, 8))],
  'two, by models': [(range(1), slice(0, 8)), (range(1, 2), slice(0, 8))],
  'four, by rows': [(range(2), slice(k, k + 2)) for k in range(0, 8, 2)],
  'four, by both': [
    (range(k, k + 1), rows)
    for k in range(2)
    for rows in (slice(0, 4), slice(4, 8))
  ],
}


@pytest.mark.parametrize('processes', PROCESSES)
def test_processes_together_read_what_one_does(processes):
  start = 5
  options = {
    'num_models': 2,
    'batch_size': 8,
    'seed': 5,
    'read': READ,
    'max_bad_examples': 3,
  }
  source = Photos(37, bad=(4, 20, 21))  # 4 steps in an epoch
  complete = _take(14, source, **options)[start:]
  parts = []
  for models, rows in PROCESSES[processes]:
    taken = _take(
      14 - start, source, models=models, rows=rows, start=start, **options
    )
    parts.append((models, rows, taken))
  for number, expected in enumerate(complete):
    together = {name: np.zeros_like(a) for name, a in expected.items()}
    written = np.zeros((2, 8), int)
    for models, rows, taken in parts:
      where = (slice(models.start, models.stop), rows)
      written[where] += 1
      for name, array in taken[number].items():
        together[name][where] = array
    assert (written == 1).all()
    _assert_same(together, expected)


def test_every_use_of_an_image_has_its_random_numbers():
  options = {'num_models': 2, 'batch_size': 12, 'seed': 0}
  source = Photos(12)
  images = {}
  for epoch, batch in enumerate(_take(3, source, read=READ, **options)):
    for model in range(2):
      for image, place in zip(
        batch['image'][model], batch['label'][model], strict=True
      ):
        rng = examples.generator(
          seed=0, model=model, epoch=epoch, place=int(place)
        )
        expected = AUGMENT(source[int(place)]['image'], rng)
        np.testing.assert_array_equal(image, expected)
        images[model, epoch, int(place)] = image.tobytes()
  assert len(images) == len(set(images.values())) == 2 * 3 * 12
  other = _take(1, source, read=READ, **{**options, 'seed': 1})
  assert not set(images.values()) & {
    image.tobytes() for image in other[0]['image'].reshape(24, -1)
  }


@pytest.mark.parametrize('num_threads', [0, 1, 5])
def test_threads_change_no_augmented_image(num_threads):
  options = {**OPTIONS, 'read': READ, 'max_bad_examples': 2}
  source = Photos(23, bad=(3, 7))
  expected = _take(9, source, **options)
  taken = _take(9, source, num_threads=num_threads, **options)
  for one, other in zip(taken, expected, strict=True):
    _assert_same(one, other)


@pytest.mark.parametrize('read', [READ, [READ, READ]])
def test_what_draws_is_not_cached(read):
  with pytest.raises(ValueError, match='draws every example anew: leave out c'):
    pipeline.train_batches(Photos(9), read=read, cache=True, **OPTIONS)


CLIP = preprocessing.image_reader(augment.Augment(16))


def _as_labels(count, source, **options):
  taken = _take(count, source, read=CLIP, **options)
  return np.stack([batch['label'] for batch in taken])


def test_bad_images_are_replaced_by_the_next_of_the_order(caplog):
  options = {'num_models': 2, 'batch_size': 10, 'seed': 0}  # an epoch a step
  bad = {2, 3, 9}
  orders = _as_labels(20, Photos(10), **options)
  with caplog.at_level(logging.WARNING):
    labels = _as_labels(20, Photos(10, bad), max_bad_examples=3, **options)
  replaced = 0
  for order, got in zip(
    orders.reshape(-1, 10), labels.reshape(-1, 10), strict=True
  ):
    for row in range(10):
      rest = [place for place in np.roll(order, -row) if place not in bad]
      assert got[row] == rest[0]
      replaced += got[row] != order[row]
  assert replaced == 20 * 2 * 3
  # Once each, by name.
  assert len(caplog.messages) == 3
  for place in bad:
    (message,) = [m for m in caplog.messages if f'photos/train[{place}]' in m]
    assert f'({place}.JPEG)' in message
    assert 'remature end' in message


@pytest.mark.parametrize('num_threads', [0, 2])
@pytest.mark.parametrize('limit', [0, 2])
def test_too_many_bad_images(limit, num_threads):
  batches = pipeline.train_batches(
    Photos(23, bad=(1, 5, 8)),
    num_models=2,
    batch_size=23,
    seed=0,
    read=CLIP,
    max_bad_examples=limit,
    num_threads=num_threads,
  )
  with pytest.raises(
    ValueError,
    match=rf'photos/train\[\d\] \(\d.JPEG\).*max_bad_examples is {limit}',
  ):
    next(batches)
  batches.close()


def test_no_good_image():
  batches = pipeline.train_batches(
    Photos(6, bad=range(6)),
    num_models=1,
    batch_size=6,
    seed=0,
    read=CLIP,
    max_bad_examples=10,
  )
  with pytest.raises(ValueError, match='photos/train: no example can be read'):
    next(batches)
  batches.close()


def test_bad_image_in_a_cache():
  with pytest.raises(ValueError, match=r'photos/train\[3\] \(3.JPEG\)'):
    pipeline.train_batches(
      Photos(9, bad=(3,)),
      read=CLIP,
      cache=True,
      max_bad_examples=9,
      **OPTIONS,
    )


def test_damaged_file_is_no_bad_image():
  """A record that cannot be read is an error whatever the limit."""

  class Damaged(Photos):
    def __getitem__(self, index):
      if index == 3:
        raise OSError('photos/train[3] cannot be read')
      return super().__getitem__(index)

  batches = pipeline.train_batches(
    Damaged(9), read=CLIP, max_bad_examples=9, **{**OPTIONS, 'batch_size': 9}
  )
  with pytest.raises(OSError, match='cannot be read'):
    next(batches)
  batches.close()


def _evaluated(name, **options):
  benchmark = benchmarks.BENCHMARKS[name]
  source = benchmarks.open_benchmark(benchmark)
  read = benchmarks.benchmark_reader(benchmark, source)
  return list(pipeline.eval_batches(source, read=read, **options))


@pytest.mark.parametrize(
  ('name', 'batch_size'), [('digits', 100), ('shift', 597), ('shift', 1000)]
)
def test_evaluation_reads_every_example_once(name, batch_size):
  batches = _evaluated(name, batch_size=batch_size)
  assert len(batches) == -(-597 // batch_size)
  for batch in batches:
    assert batch['image'].shape == (batch_size, 8, 8, 1)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].shape == batch['mask'].shape == (batch_size,)
    assert batch['label'].dtype == np.int32
    assert batch['mask'].dtype == bool
    assert not batch['image'][~batch['mask']].any()
  mask = np.concatenate([batch['mask'] for batch in batches])
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < 597)

  images = np.concatenate([batch['image'] for batch in batches])[mask]
  labels = np.concatenate([batch['label'] for batch in batches])[mask]
  source = sources.open_source('digits', 'test')
  for index in range(0, 597, 10):
    expected = preprocessing.decode(source[index]['image'])
    if name == 'shift':
      expected = shifts.apply('shift', expected, index)
    np.testing.assert_array_equal(images[index], expected)
    assert labels[index] == source[index]['label']


# Of 1000 rows, the last of four processes has none of the 597 examples.
@pytest.mark.parametrize('batch_size', [100, 1000])
def test_processes_together_evaluate_what_one_does(batch_size):
  complete = _evaluated('noise', batch_size=batch_size)
  size = batch_size // 4
  parts = [
    _evaluated(
      'noise', batch_size=batch_size, rows=slice(k * size, (k + 1) * size)
    )
    for k in range(4)
  ]
  assert {len(part) for part in parts} == {len(complete)}
  for expected, *local in zip(complete, *parts, strict=True):
    together = {
      name: np.concatenate([batch[name] for batch in local])
      for name in expected
    }
    _assert_same(together, expected)


def test_bad_image_in_evaluation():
  batches = pipeline.eval_batches(Photos(9, bad=(4,)), batch_size=9, read=CLIP)
  with pytest.raises(ValueError, match=r'photos/train\[4\] \(4.JPEG\).*end'):
    next(batches)
  batches.close()


def test_bad_evaluation():
  with pytest.raises(ValueError, match='batch_size=0'):
    pipeline.eval_batches(_numbers(9), batch_size=0)
