import numpy as np

from experiments.geometry import analyses
from experiments.geometry import consistency
from experiments.geometry import family
from modelstock_jax.report import plots


def _line(epoch, norms, cosine=0.5):
  """Return the line that a run logs of a merge."""
  cosines = dict.fromkeys(norms, cosine)
  return {'kind': 'merge', 'epoch': epoch, 'cosine': cosines, 'norm': norms}


def test_angles_and_norms_of_known_vectors():
  models = [
    {'head': {'bias': np.array(b, float), 'kernel': np.array([k], float)}}
    for b, k in (([1, 0], [3, 0]), ([0, 2], [3, 3]), ([1, 1], [0, 6]))
  ]
  anchor = {'head': {'bias': np.zeros(2), 'kernel': np.zeros((1, 2))}}
  three = family.Family(anchor, dict(zip('abc', models, strict=True)))
  report = consistency.report(three)
  bias, kernel = report['layers']
  assert bias['name'] == 'head/bias'
  np.testing.assert_allclose(bias['angle']['mean'], (90 + 45 + 45) / 3)
  np.testing.assert_allclose(bias['norm']['mean'], (1 + 2 + np.sqrt(2)) / 3)
  np.testing.assert_allclose(kernel['angle']['mean'], (45 + 90 + 45) / 3)
  head = report['kinds']['head']
  # of the layers' means: 67.5, 67.5 and 45 degrees
  np.testing.assert_allclose(head['angle']['mean'], 60)
  np.testing.assert_allclose(
    head['angle']['sd'], np.std([67.5, 67.5, 45], ddof=1)
  )
  assert report['epochs'] == {}


def test_angle_over_epochs():
  paths = ['attention/out/kernel', 'mlp/fc/kernel', 'ln_1/scale']
  paths = ['head/kernel', *(f'image/block_0/{path}' for path in paths)]

  def line(epoch, cosine):
    return _line(epoch, dict.fromkeys(paths, 2.0), cosine)

  runs = [
    [line(5, 0.5), line(10, 0.0)],
    [line(5, np.sqrt(0.5)), line(10, 0.0), line(15, 0.0)],
  ]
  actual = consistency.over_epochs(runs)
  assert actual['epochs'] == [5, 10]
  for kind in ('attention', 'mlp', 'norm', 'head'):
    np.testing.assert_allclose(
      actual['angle'][kind], [[60, 90], [45, 90]], rtol=1e-9
    )


def test_norm_over_epochs():
  """Query, key and value are one layer, whose squares add up."""
  query, value = (
    f'image/block_0/attention/{x}/kernel' for x in ('query', 'value')
  )
  lines = [
    _line(epoch, {query: 3.0 * epoch, value: 4.0 * epoch, 'head/kernel': 7.0})
    for epoch in (1, 2)
  ]
  actual = consistency.over_epochs([lines])
  assert actual['norm'] == {'attention': [[5.0, 10.0]], 'head': [[7.0, 7.0]]}


def test_without_metrics_there_are_no_epochs():
  assert consistency.over_epochs([[]]) == {}
  assert consistency.over_epochs([]) == {}


def test_layers_that_have_not_moved():
  """Compare two linear probes: they have no angle, and are not drawn."""
  anchor = {
    'head': {'bias': np.zeros(2)},
    'image': {'block_0': {'mlp': {'fc': {'kernel': np.ones((2, 2))}}}},
  }
  models = [
    {**anchor, 'head': {'bias': np.array(bias)}} for bias in ([3, 4.0], [0, 1])
  ]
  lines = [
    _line(epoch, {'image/block_0/mlp/fc/kernel': 0.0, 'head/bias': 1.0})
    for epoch in (1, 2)
  ]
  probes = family.Family(
    anchor, dict(zip('ab', models, strict=True)), histories=[lines, lines]
  )
  report = analyses.plain(consistency.report(probes))
  assert report['kinds']['mlp']['angle']['mean'] is None
  assert report['kinds']['head']['angle']['mean'] > 0
  assert set(report['epochs']['angle']['mlp'][0]) == {None}
  figure = consistency.draw(report)
  drawn = {
    container.get_label()
    for container in figure.axes[2].containers
    if np.isfinite(container[0].get_ydata()).any()
  }
  assert drawn == {'head'}
  assert plots.svg(figure)
