import itertools

from flax import traverse_util
import numpy as np
import pytest

from experiments.geometry import family
from experiments.geometry import gram as gram_lib
from experiments.geometry import shell

SIZES = {'image/block_0/mlp/fc/kernel': 400, 'head/bias': 300}


def _vectors(number, size, *, cosine, rng, scales=None):
  """Displacements of one length, all at one angle, exactly."""
  basis, _ = np.linalg.qr(rng.standard_normal((size, number + 1)))
  shared, individual = basis[:, :1].T, basis[:, 1:].T
  vectors = np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * individual
  return vectors * (1 if scales is None else np.asarray(scales)[:, None])


def _report(gram):
  six = family.Family({}, dict.fromkeys('abcdef'))
  six.__dict__['gram'] = gram
  return shell.report(six)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def _gram(rng, *, number=6, cosine=0.6, scales=None):
  anchor = {path: rng.standard_normal(n) for path, n in SIZES.items()}
  moved = {
    path: _vectors(number, n, cosine=cosine, rng=rng, scales=scales)
    for path, n in SIZES.items()
  }
  models = [
    traverse_util.unflatten_dict(
      {path: anchor[path] + moved[path][i] for path in SIZES}, sep='/'
    )
    for i in range(number)
  ]
  return gram_lib.measure(traverse_util.unflatten_dict(anchor, sep='/'), models)


def test_vector_from_the_centre_is_the_mean_over_pairs_of_others(rng):
  steps = rng.standard_normal((7, 20))
  x, y = np.array([0.5, 0.5, 0, 0, 0, 0, 0]), np.zeros(7)
  others = np.array([False, False, True, True, False, True, True])
  expected = np.mean(
    [
      (x @ steps - steps[a]) @ (y @ steps - steps[b])
      for a, b in itertools.permutations(np.flatnonzero(others), 2)
    ]
  )
  actual = gram_lib.from_centre(steps @ steps.T, x, y, others)
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_estimate_of_the_centre_has_no_bias(rng):
  center, radius = rng.standard_normal(30), 0.7
  actual = []
  for _ in range(3000):
    models = center + radius * rng.standard_normal((4, 30)) / np.sqrt(30)
    others = np.array([False, True, True, True])
    one = np.eye(4)[0]
    actual.append(gram_lib.from_centre(models @ models.T, one, one, others))
  error = np.std(actual) / np.sqrt(len(actual))
  np.testing.assert_allclose(np.mean(actual), radius**2, atol=4 * error)


def test_exact_geometry_has_all_identities(rng):
  gram = _gram(rng, cosine=0.6)
  for name, error in shell.identities(gram).items():
    np.testing.assert_allclose(error, 0, atol=1e-9, err_msg=name)
  actual = shell.measure(gram.products)
  # |w_i - mu|^2 = l^2 (1 - c), of vectors of length one
  np.testing.assert_allclose(actual['radius'], np.sqrt(0.4), rtol=1e-9)
  np.testing.assert_allclose(actual['thickness'], 1, rtol=1e-9)
  np.testing.assert_allclose(actual['to_anchor'], 0, atol=1e-9)
  np.testing.assert_allclose(actual['between'], 0, atol=1e-9)
  np.testing.assert_allclose(actual['displacements'], 0.6, rtol=1e-9)
  report = _report(gram)
  for kind in ('mlp', 'head'):
    assert all(not e['fails'] for e in report['kinds'][kind]['errors'].values())


def test_family_of_two_distances_is_no_thin_shell(rng):
  scales = [1, 1, 1, 1, 1, 2]
  gram = _gram(rng, cosine=0.6, scales=scales)
  errors = shell.identities(gram)
  length = np.sqrt((5 + 4) / 6)  # root mean square of the scales
  np.testing.assert_allclose(
    errors['norm'], np.broadcast_to(np.array(scales) / length - 1, (2, 6))
  )
  actual = shell.measure(gram.products)
  assert actual['thickness'].max() > 1.5
  report = _report(gram)
  failing = report['kinds']['mlp']['errors']['shell']
  assert failing['rms'] > 0.3
  assert report['kinds']['mlp']['thickness']['sd'] > 0.3


def test_two_clusters_are_not_orthogonal_around_their_centre(rng):
  # Within a cluster the models are far closer than the shell says.
  far, near = rng.standard_normal((2, 300)), rng.standard_normal((6, 300))
  steps = 3 * far[[0, 0, 0, 1, 1, 1]] + 0.3 * near
  gram = np.stack([steps @ steps.T])
  actual = shell.measure(gram)
  assert np.abs(actual['between']).mean() > 0.3
  layer = gram_lib.merges.Layer('head/bias', 'head', 0)
  gram = gram_lib.Gram([layer], ['input'], gram)
  report = _report(gram)
  # Means of a cluster's pairs are as far as models are, others at the centre.
  assert report['kinds']['head']['errors']['mean']['rms'] > 0.5


def test_layer_that_nobody_moved_has_no_angles():
  products = np.stack([np.zeros((4, 4)), np.eye(4) + 1])
  actual = shell.measure(products)
  assert np.isnan(actual['between'][0]).all()
  assert np.isfinite(actual['between'][1]).all()
  gram = gram_lib.Gram([], [], products)
  assert np.isnan(shell.identities(gram)['shell'][0]).all()
