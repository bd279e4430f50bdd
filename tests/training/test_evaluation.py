import itertools
import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import evaluation
from modelstock_jax.training import sharding

# 37 examples: no batch size below divides it.
BENCHMARK = data.Benchmark('odd', 'digits', 'test[:37]')


def _apply(params, images):
  flat = jnp.reshape(images, (images.shape[0], -1))
  return jnp.matmul(flat, params, precision=jax.lax.Precision.HIGHEST)


def _task(model):
  return clip_task.classification(
    model,
    lambda images: images.astype(jnp.float32),
    clip.VisionConfig(8, 4, width=8, depth=1, heads=2, channels=1),
  )


def _evaluator(batch_size, stock=1, **options):
  placement = sharding.place(stock=stock, batch_size=8)
  model = model_lib.Model(lambda key: key, _apply, _apply)
  return evaluation.Evaluator(
    _task(model),
    placement,
    batch_size=batch_size,
    **options,
  )


@pytest.fixture(scope='module')
def models():
  """Integer weights: logits are exact, and so are their ties and order."""
  rng = np.random.default_rng(0)
  return rng.integers(-9, 9, (3, 64, 10)).astype(np.float32)


@pytest.fixture(scope='module')
def expected(models):
  source = data.open_source('digits', 'test[:37]')
  images = np.stack([data.decode(record['image']) for record in source])
  labels = np.array([record['label'] for record in source])
  logits = images.reshape(37, 64).astype(np.float64) @ models
  return (logits.argmax(-1) == labels).sum(-1).tolist()


@pytest.mark.parametrize(
  ('batch_size', 'stock'), [(1, 1), (36, 2), (37, 1), (100, 2)]
)
def test_every_example_is_counted_once(models, expected, batch_size, stock):
  evaluate = _evaluator(batch_size, stock)
  assert evaluate.batch_size % 8 == 0
  assert 0 <= evaluate.batch_size - batch_size < 8
  placed = jax.device_put(models, evaluate.placement.replicated)
  scores = evaluate(list(placed), BENCHMARK)
  assert [score.correct for score in scores] == expected
  assert [score.n for score in scores] == [37] * 3
  assert len(set(expected)) > 1  # models that can be told apart


def test_the_blank_rest_of_a_batch_is_not_counted(models):
  # Zero weights say 0 to every image, so also to what fills up the batch.
  evaluate = _evaluator(100)
  source = data.open_source('digits', 'test[:37]')
  zeros = sum(record['label'] == 0 for record in source)
  [score] = evaluate([jnp.zeros_like(models[0])], BENCHMARK)
  assert score == (zeros, 37, 10)
  assert score.accuracy == zeros / 37


def test_batches_are_read_once_for_all_models(models, monkeypatch):
  evaluate = _evaluator(16)
  opened = []
  original = data.eval_batches
  monkeypatch.setattr(
    data,
    'eval_batches',
    lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs),
  )
  assert len(evaluate(list(jnp.asarray(models)), BENCHMARK)) == 3
  assert opened == [1]


def test_missing_data_is_named(models):
  evaluate = _evaluator(8, data_dir='/nowhere')
  with pytest.raises(FileNotFoundError, match="'digits' in /nowhere"):
    evaluate([jnp.asarray(models[0])], BENCHMARK)


# Of the network that is evaluated on ImageNet below: 4 x 4 x 3 to 1000.
SIZE = 4


@pytest.fixture(scope='module')
def wide_models():
  """Two models whose logits are exact, and have no ties to speak of."""
  rng = np.random.default_rng(0)
  return rng.integers(-9999, 9999, (2, SIZE * SIZE * 3, 1000)).astype(
    np.float32
  )


def _read(name, imagenet):
  """Images float64[n, D] and labels, by the definitions of the data sets."""
  benchmark = data.find_benchmark(name)
  source = data.open_benchmark(benchmark, imagenet)
  read = data.benchmark_reader(benchmark, source, SIZE)
  records = list(source)
  images = np.stack([read(record, 0)['image'] for record in records])
  return (
    images.reshape(len(records), -1).astype(np.float64),
    [record['label'] for record in records],
  )


def _top1(logits, labels, classes):
  """Among these classes alone."""
  return [
    max(classes, key=lambda k: row[k]) == label
    for row, label in zip(logits, labels, strict=True)
  ]


@pytest.mark.parametrize(
  ('name', 'n', 'classes'),
  [
    ('imagenet', 11, range(1000)),
    ('imagenet_v2', 3, range(1000)),
    ('imagenet_sketch', 3, range(1000)),
    ('imagenet_r', 200, range(1, 1000, 5)),
    ('imagenet_a', 200, range(4, 1000, 5)),
    ('imagenet_c', 150, range(1000)),
  ],
)
def test_top1_among_the_classes_of_the_split(
  name, n, classes, imagenet, wide_models
):
  images, labels = _read(name, imagenet)
  models = wide_models.copy()
  models[1, :, labels[0]] += 1e5  # says so to every image: right at times
  expected = [sum(_top1(images @ m, labels, classes)) for m in models]
  evaluate = _evaluator(16, data_dir=imagenet, image_size=SIZE)
  scores = evaluate(list(jnp.asarray(models)), data.find_benchmark(name))
  assert [score.correct for score in scores] == expected
  assert {(s.n, s.num_classes) for s in scores} == {(n, len(classes))}
  assert expected[1] >= 1


@pytest.fixture
def knowing(imagenet):
  """Makes a model that gives image i of a benchmark the answer k_i.

  Its logits are the negative squared distance to the images, which are all
  different: x . m_i - |m_i|^2 / 2 for class k_i, and nothing for the others.
  """

  def make(name, answers):
    images, _ = _read(name, imagenet)
    weights = np.zeros((images.shape[1] + 1, 1000))
    weights[-1] = -1e9
    for image, answer in zip(images, answers, strict=True):
      weights[:-1, answer] = image
      weights[-1, answer] = -(image @ image) / 2
    return jnp.asarray(weights, jnp.float32)

  return make


def _affine(params, images):
  flat = jnp.reshape(images, (images.shape[0], -1))
  product = jnp.matmul(flat, params[:-1], precision=jax.lax.Precision.HIGHEST)
  return product + params[-1][None]


def _knowing_evaluator(imagenet):
  placement = sharding.place(stock=1, batch_size=8)
  return evaluation.Evaluator(
    _task(model_lib.Model(lambda key: key, _affine, _affine)),
    placement,
    batch_size=16,
    data_dir=imagenet,
    image_size=SIZE,
  )


def test_any_label_of_the_list_is_right(imagenet, make_imagenet, knowing):
  _, labels = _read('imagenet_real', imagenet)
  lists = [[k for k in label.tolist() if k >= 0] for label in labels]
  taken = set(itertools.chain.from_iterable(lists))
  free = (k for k in range(1000) if k not in taken)
  right = [actual[-1] if actual else next(free) for actual in lists]
  wrong = [next(free) for _ in lists]
  mixed = [*right[:6], *wrong[6:]]
  evaluate = _knowing_evaluator(imagenet)
  scores = evaluate(
    [knowing('imagenet_real', answers) for answers in (right, wrong, mixed)],
    data.find_benchmark('imagenet_real'),
  )
  # Two of the eleven have no label, and do not count.
  assert sum(map(bool, make_imagenet.REAL)) == 9
  assert [score.n for score in scores] == [9] * 3
  expected = [9, 0, sum(map(bool, lists[:6]))]
  assert [score.correct for score in scores] == expected


def test_classes_stand_for_those_of_objectnet(imagenet, make_imagenet, knowing):
  _, labels = _read('objectnet', imagenet)
  members = list(make_imagenet.OBJECTNET.values())
  # Folder 2 has two images: one class of ImageNet for each, both its own.
  individual = {k: iter(members[k]) for k in set(labels)}
  right = [next(individual[label]) for label in labels]
  # A class that is no choice counts for nothing, however sure the model is.
  evaluate = _knowing_evaluator(imagenet)
  sure = knowing('objectnet', right).at[-1, 0].set(1e9)
  others = knowing('objectnet', [*right[1:], right[0]])
  benchmark = data.find_benchmark('objectnet')
  scores = evaluate([sure, others], benchmark)
  assert [score.correct for score in scores[:1]] == [114]
  # Moved on by one, only the first of folder 2's two is still right.
  assert scores[1].correct == 1
  assert {(s.n, s.num_classes) for s in scores} == {(114, 113)}


def test_the_table_of_choices_changes_the_answer(imagenet, knowing):
  # Class 0 is not in R: a model that is sure of it is right all the same.
  images, labels = _read('imagenet_r', imagenet)
  model = knowing('imagenet_r', labels).at[-1, 0].set(1e9)
  benchmark = data.find_benchmark('imagenet_r')
  evaluate = _knowing_evaluator(imagenet)
  weights = np.asarray(model, np.float64)
  logits = images @ weights[:-1] + weights[-1]
  expected = sum(_top1(logits, labels, range(1, 1000, 5)))
  assert expected > 100
  [score] = evaluate([model], benchmark)
  assert (score.correct, score.num_classes) == (expected, 200)
  [score] = evaluate([model], benchmark._replace(num_classes=None))
  assert (score.correct, score.num_classes) == (0, 1000)


# 24, 96 and 1000 do not divide the 200 examples; with 1000, and four processes,
# some have none.
@pytest.mark.parametrize(
  ('batch_size', 'processes'), [(8, 4), (24, 2), (96, 1), (96, 4), (1000, 4)]
)
def test_processes_together_read_every_example_once(
  processes, batch_size, imagenet
):
  placement = sharding.place(stock=1, batch_size=8)
  where = placement.examples.devices_indices_map((batch_size,))
  devices = list(placement.mesh.devices.flat)
  held = len(devices) // processes
  benchmark = data.find_benchmark('imagenet_r')
  source = data.open_benchmark(benchmark, imagenet)
  read = data.benchmark_reader(benchmark, source, SIZE)
  options = dict(batch_size=batch_size, read=read)
  parts = []
  for process in range(processes):
    mine = devices[process * held : (process + 1) * held]
    places = [where[device][0].indices(batch_size) for device in mine]
    rows = slice(min(p[0] for p in places), max(p[1] for p in places))
    parts.append(list(data.eval_batches(source, rows=rows, **options)))
  assert len({len(part) for part in parts}) == 1
  labels = []
  full = list(data.eval_batches(source, **options))
  for *pieces, batch in zip(*parts, full, strict=True):
    for name, array in batch.items():
      together = np.concatenate([piece[name] for piece in pieces])
      np.testing.assert_array_equal(together, array)
    labels += batch['label'][batch['mask']].tolist()
  # Every class of R has one image here.
  assert sorted(labels) == list(range(1, 1000, 5))


@pytest.mark.parametrize('batch_size', [7, 300])
def test_batch_size_changes_nothing(batch_size, imagenet, wide_models):
  benchmark = data.find_benchmark('imagenet_r')
  scores = [
    _evaluator(size, data_dir=imagenet, image_size=SIZE)(
      list(jnp.asarray(wide_models)), benchmark
    )
    for size in (batch_size, 200)
  ]
  assert scores[0] == scores[1]


def test_bad_image_is_named(imagenet, wide_models, monkeypatch):
  # The third record of the split is cut off.
  benchmark = data.find_benchmark('imagenet')
  read = data.TfdsSource.__getitem__

  def cut(source, index):
    record = read(source, index)
    if index == 2:
      record = {**record, 'image': record['image'][:-40]}
    return record

  monkeypatch.setattr(data.TfdsSource, '__getitem__', cut)
  evaluate = _evaluator(8, data_dir=imagenet, image_size=SIZE)
  with pytest.raises(ValueError, match=r'imagenet2012/5\.1\.0/validation\[2\]'):
    evaluate([jnp.asarray(wide_models[0])], benchmark)


def test_models_of_other_classes_are_an_error(imagenet):
  narrow = jnp.zeros((SIZE * SIZE * 3, 10))
  evaluate = _evaluator(8, data_dir=imagenet, image_size=SIZE)
  with pytest.raises(
    ValueError, match='imagenet_v2: the model has 10 classes, the data set 1000'
  ):
    evaluate([narrow], data.find_benchmark('imagenet_v2'))


def test_lists_that_are_all_empty_are_an_error(imagenet, wide_models):
  # The two images whose lists are empty, alone.
  benchmark = data.find_benchmark('imagenet_real')
  source = data.open_benchmark(benchmark, imagenet)
  place = next(i for i, r in enumerate(source) if r['label'].max() < 0)
  one = benchmark._replace(split=f'validation[{place}:{place + 1}]')
  evaluate = _evaluator(8, data_dir=imagenet, image_size=SIZE)
  with pytest.raises(ValueError, match='no image with a label'):
    evaluate([jnp.asarray(wide_models[0])], one)


def _score_in_processes(run_processes, count, data_dir):
  """Return the scores of each of `count` processes, with 8 devices in all."""
  script = pathlib.Path(__file__).with_name('scorer.py')
  printed = run_processes(script, count, data_dir, devices=8 // count)
  return [json.loads(lines.splitlines()[-1]) for lines in printed]


@pytest.mark.hosts
def test_real_processes_count_what_one_counts(run_processes, imagenet):
  [alone] = _score_in_processes(run_processes, 1, imagenet)
  assert [[n for _, n, _ in scores] for scores in alone] == [
    [200] * 2,
    [200] * 2,
    [114] * 2,
    [9] * 2,
  ]
  assert sum(correct for scores in alone for correct, _, _ in scores) > 2
  assert _score_in_processes(run_processes, 2, imagenet) == [alone] * 2
