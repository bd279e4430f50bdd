import jax
import numpy as np
import pytest

from experiments.geometry import distance
from experiments.geometry import family
from experiments.geometry import landscape
from experiments.geometry import scatter
from modelstock_jax import clip
from modelstock_jax import merging

WIDTH = 6


def _tree(vector):
  kernel, bias = vector[:-2].reshape(-1, 2), vector[-2:]
  return {'head': {'kernel': kernel, 'bias': bias}}


def _flat(tree):
  return np.concatenate(
    [np.ravel(tree['head']['kernel']), tree['head']['bias']]
  )


@pytest.fixture
def score(actual):
  """1 - |w|^2 / 1000 in place of an accuracy."""

  def score(points, models=None):
    models = actual.models.values() if models is None else models
    w0, measured = _flat(actual.anchor), []
    steps = np.stack([_flat(model) - w0 for model in models])
    for about, share in points:
      bias, kernel = np.broadcast_to(share, (2, len(steps)))
      w = w0 + np.append(kernel @ steps[:, :-2], bias @ steps[:, -2:])
      accuracy = {'digits': 1 - float(np.sum(w**2)) / 1000}
      measured.append({**about, 'accuracy': accuracy})
    return measured

  return score


@pytest.fixture
def actual():
  rng = np.random.default_rng(1)
  anchor = rng.standard_normal(2 * WIDTH + 2).astype(np.float32)
  shared = rng.standard_normal(anchor.shape)
  models = [
    (anchor + shared + 0.5 * rng.standard_normal(anchor.shape)).astype(
      np.float32
    )
    for _ in range(6)
  ]
  trees = {f'model {i}': _tree(w) for i, w in enumerate(models)}
  return family.Family(_tree(anchor), trees)


def test_every_point_of_the_plane_is_where_its_axes_say(
  actual, score, monkeypatch
):
  monkeypatch.setattr(landscape, 'SIDE', 5)
  report = landscape.report(actual, score)
  models = list(actual.models.values())
  w0, w1 = _flat(actual.anchor), _flat(models[0])
  mu = np.mean([_flat(m) for m in models[2:]], axis=0)
  e1 = (w1 - w0) / np.linalg.norm(w1 - w0)
  e2 = (mu - w0) - ((mu - w0) @ e1) * e1
  e2 /= np.linalg.norm(e2)
  expected = [
    [1 - np.sum((w0 + x * e1 + y * e2) ** 2) / 1000 for x in report['x']]
    for y in report['y']
  ]
  np.testing.assert_allclose(report['accuracy']['digits'], expected, rtol=1e-5)
  stock = merging.model_stock(
    actual.anchor, models[:2], layers=clip.clip_layers
  )
  merged = _flat(jax.device_get(stock.params))
  mark = report['marks']['wH']
  offset = merged - w0
  np.testing.assert_allclose(
    [mark['x'], mark['y']], [offset @ e1, offset @ e2], rtol=1e-4
  )
  off = offset - (offset @ e1) * e1 - (offset @ e2) * e2
  np.testing.assert_allclose(mark['distance'], np.linalg.norm(off), rtol=1e-4)
  np.testing.assert_allclose(
    mark['accuracy']['digits'], 1 - np.sum(merged**2) / 1000, rtol=1e-5
  )
  for name in ('w0', 'w1', 'mu'):  # the plane goes through them
    assert report['marks'][name]['distance'] < 1e-5


def test_no_plane_through_points_of_a_line():
  with pytest.raises(ValueError, match='positive definite'):
    landscape.axes(np.array([[1.0, 2.0], [2.0, 4.0]]))


def test_noise_has_the_radius_of_every_layer(actual, score):
  measured = []

  def record(points, models=None):
    if models is not None:
      measured.append((points, models))
    return score(points, models)

  report = distance.report(actual, record)
  [(points, models)] = measured
  mean, *noisy = map(_flat, models)
  np.testing.assert_allclose(
    mean, np.mean([_flat(w) for w in actual.models.values()], axis=0), rtol=1e-6
  )
  norms = []
  for about, share in points:
    moved = share[:, 1:] @ np.stack(noisy - mean)
    bias, kernel = moved[0, -2:], moved[1, :-2]
    norms.append([np.linalg.norm(bias), np.linalg.norm(kernel)])
    norms[-1] = np.array(norms[-1]) / (about['scale'] or 1)
  np.testing.assert_allclose(
    norms[1:], [norms[1]] * (len(norms) - 1), rtol=1e-6
  )
  np.testing.assert_allclose(norms[0], 0, atol=1e-9)
  np.testing.assert_allclose(np.linalg.norm(norms[1]), report['radius'])


@pytest.mark.parametrize('chosen', [[0, 1], [1, 3, 4]])
def test_mixtures_are_the_merges(actual, chosen):
  models = [actual.models[f'model {i}'] for i in chosen]
  stock = merging.model_stock(actual.anchor, models, layers=clip.clip_layers)
  for kind, expected in (
    ('averages', merging.uniform_soup(models)),
    ('merges', stock.params),
  ):
    shares = actual.gram.mixture(chosen, kind)
    for row, name in zip(
      shares, [x.name for x in actual.gram.layers], strict=True
    ):
      leaf = name.split('/')[1]
      w0 = actual.anchor['head'][leaf]
      mixed = w0 + sum(
        s * (m['head'][leaf] - w0)
        for s, m in zip(row, actual.models.values(), strict=True)
      )
      np.testing.assert_allclose(mixed, expected['head'][leaf], atol=2e-6)


def test_accuracy_and_distance_of_the_same_points(actual, score):
  report = distance.report(actual, score)
  flat = [_flat(model) for model in actual.models.values()]
  single = [p for p in report['averages'] if p['n'] == 1]
  np.testing.assert_allclose(
    [p['accuracy']['digits'] for p in single],
    [1 - np.sum(w**2) / 1000 for w in flat[: len(single)]],
    rtol=1e-5,
  )
  mean = np.mean(flat, axis=0)
  np.testing.assert_allclose(
    report['noise'][0]['accuracy']['digits'],
    1 - np.sum(mean**2) / 1000,
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    report['noise'][0]['distance'], report['radius'] / np.sqrt(6)
  )
  # of six models the radius is sqrt(6/5) times their spread around the mean
  spread = np.mean([np.sum((w - mean) ** 2) for w in flat])
  np.testing.assert_allclose(
    report['radius'], np.sqrt(spread * 6 / 5), rtol=1e-5
  )


def test_scatter_has_everything_between_anchor_and_models(actual, score):
  report = scatter.report(actual, score)
  methods = [point['method'] for point in report['points']]
  assert methods.count('fine_tuned') == 6
  assert methods.count('model_stock_end') == methods.count('uniform_soup') == 4
  alpha = report['curves'][0]['points'][3]
  assert alpha['alpha'] == 0.3
  w = 0.7 * _flat(actual.anchor) + 0.3 * _flat(actual.models['model 0'])
  np.testing.assert_allclose(
    alpha['accuracy']['digits'], 1 - np.sum(w**2) / 1000, rtol=1e-5
  )
