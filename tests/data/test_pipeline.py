import itertools
import threading
import time

import numpy as np
import pytest

from modelstock_jax.data import benchmarks
from modelstock_jax.data import pipeline
from modelstock_jax.data import preprocessing
from modelstock_jax.data import shifts
from modelstock_jax.data import sources


class Numbers:
  """A source whose images are their own places."""

  name = 'numbers/train'
  channels = 1
  num_classes = 2

  def __init__(self, length):
    self._length = length

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return {'image': index.to_bytes(4, 'little'), 'label': index % 2}


def _as_array(encoded):
  # Bytes of the place, as an image of 1 x 1 pixels and 4 channels.
  return np.frombuffer(encoded, np.uint8).reshape(1, 1, 4)


def _take(count, source, **options):
  batches = pipeline.train_batches(source, **options)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def _places(count, source, **options):
  """Returns int[count, N, B]: which examples each batch holds."""
  taken = _take(count, source, decode=_as_array, **options)
  images = np.stack([batch['image'] for batch in taken])
  return np.ascontiguousarray(images).view('<u4')[..., 0, 0, 0].astype(int)


def _assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name])


OPTIONS = {'num_models': 2, 'batch_size': 5, 'seed': 7}  # 23 // 5: 4 steps


@pytest.mark.parametrize('start', [0, 1, 3, 4, 5, 11, 12])
@pytest.mark.parametrize('cache', [False, True])
def test_restart_goes_on_where_the_other_would(start, cache):
  whole = _take(16, Numbers(23), decode=_as_array, **OPTIONS)
  late = _take(
    16 - start,
    Numbers(23),
    decode=_as_array,
    start=start,
    cache=cache,
    **OPTIONS,
  )
  for one, other in zip(whole[start:], late, strict=True):
    _assert_same(one, other)


@pytest.mark.parametrize('num_threads', [0, 1, 5])
def test_threads_change_nothing(num_threads):
  expected = _places(12, Numbers(23), **OPTIONS)
  places = _places(12, Numbers(23), num_threads=num_threads, **OPTIONS)
  np.testing.assert_array_equal(places, expected)


def test_state_is_the_step():
  batches = pipeline.train_batches(
    Numbers(23), decode=_as_array, start=6, **OPTIONS
  )
  next(batches)
  assert batches.get_state() == {'next_index': 7}
  batches.close()


@pytest.mark.parametrize(('length', 'batch_size'), [(23, 5), (20, 5), (7, 7)])
def test_epoch_visits_each_example_at_most_once(length, batch_size):
  steps = pipeline.steps_per_epoch(Numbers(length), batch_size)
  assert steps == length // batch_size
  places = _places(
    30 * steps,
    Numbers(length),
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
      _places(5, Numbers(40), num_models=4, batch_size=40, seed=seed)
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
  alone = _places(9, Numbers(23), num_models=1, **options)
  among = _places(9, Numbers(23), num_models=4, **options)
  np.testing.assert_array_equal(among[:, :1], alone)


@pytest.mark.parametrize('cache', [False, True])
def test_real_batches_hold_real_pairs(cache):
  source = sources.open_source('digits', 'train[:200]')
  pairs = {
    (preprocessing.decode(record['image']).tobytes(), record['label'])
    for record in source
  }
  batches = _take(5, source, num_models=2, batch_size=50, seed=0, cache=cache)
  for batch in batches:
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
    ({'num_models': 0}, 'num_models=0'),
    ({'seed': -1}, 'seed=-1'),
    ({'start': -1}, 'start=-1'),
    ({'num_threads': -1}, 'num_threads=-1'),
  ],
)
def test_bad_numbers(options, message):
  with pytest.raises(ValueError, match=message):
    pipeline.train_batches(Numbers(23), **{**OPTIONS, **options})


def test_images_of_several_shapes():
  batches = pipeline.train_batches(
    Numbers(23),
    decode=lambda encoded: np.zeros((1 + encoded[0], 4, 3), np.uint8),
    **OPTIONS,
  )
  with pytest.raises(ValueError, match=r'\d+ shapes.*pass a decode='):
    next(batches)
  batches.close()


def test_close_ends_the_threads():
  def readers():
    return [
      t for t in threading.enumerate() if t.name.startswith('grain-prefetch')
    ]

  before = set(readers())
  batches = pipeline.train_batches(
    Numbers(23), decode=_as_array, num_threads=3, **OPTIONS
  )
  next(batches)
  started = set(readers()) - before
  assert started
  batches.close()
  deadline = time.monotonic() + 20
  while any(t.is_alive() for t in started) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not any(t.is_alive() for t in started)
  with pytest.raises(ValueError, match='closed'):
    next(batches)


@pytest.mark.parametrize('batch_size', [7, 100, 597, 1000])
@pytest.mark.parametrize('name', ['digits', 'noise', 'shift'])
def test_evaluation_reads_every_example_once(name, batch_size):
  benchmark = benchmarks.BENCHMARKS[name]
  batches = list(pipeline.eval_batches(benchmark, batch_size=batch_size))
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
    if benchmark.shift:
      expected = shifts.apply(benchmark.shift, expected, index)
    np.testing.assert_array_equal(images[index], expected)
    assert labels[index] == source[index]['label']


def test_bad_evaluation():
  digits = benchmarks.BENCHMARKS['digits']
  with pytest.raises(ValueError, match='batch_size=0'):
    pipeline.eval_batches(digits, batch_size=0)
  with pytest.raises(ValueError, match=r'no shift .blurr.*mean .blur'):
    pipeline.eval_batches(digits._replace(shift='blurr'), batch_size=8)
  with pytest.raises(FileNotFoundError, match='no prepared data set'):
    pipeline.eval_batches(digits._replace(dataset='imagenet_r'), batch_size=8)
