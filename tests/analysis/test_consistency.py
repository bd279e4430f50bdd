import numpy as np

from modelstock_jax.analysis import consistency
from modelstock_jax.analysis import family


def _family(models, histories=()):
  names = [f'model {i}' for i in range(len(models))]
  anchor = {'head': {'bias': np.zeros(2), 'kernel': np.zeros((1, 2))}}
  return family.Family('run', anchor, models, names, {}, list(histories), [])


def test_angles_and_norms_of_known_vectors():
  models = [
    {'head': {'bias': np.array(b, float), 'kernel': np.array([k], float)}}
    for b, k in (([1, 0], [3, 0]), ([0, 2], [3, 3]), ([1, 1], [0, 6]))
  ]
  found = _family(models)
  gram = family.measure(found.anchor, models)
  report = consistency.report(gram, found)
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


def test_angle_over_epochs(merge_line):
  runs = [
    [merge_line(5, 0.5), merge_line(10, 0.0)],
    [merge_line(5, np.sqrt(0.5)), merge_line(10, 0.0), merge_line(15, 0.0)],
  ]
  found = consistency.over_epochs(runs)
  assert found['epochs'] == [5, 10]
  for kind in ('attention', 'mlp', 'norm', 'head'):
    np.testing.assert_allclose(
      found['angle'][kind], [[60, 90], [45, 90]], rtol=1e-9
    )


def test_norm_over_epochs(merge_line):
  """Query, key and value are one layer, whose squares add up."""
  parts = [f'image/block_0/attention/{x}/kernel' for x in ('query', 'value')]
  lines = []
  for epoch in (1, 2):
    line = merge_line(epoch, 0.5)
    for name in ('cosine', 'ratio', 'norm'):
      line[name] = dict.fromkeys([*parts, 'head/kernel'], 0.5)
    line['norm'] = {parts[0]: 3.0 * epoch, parts[1]: 4.0 * epoch}
    line['norm'] |= {'head/kernel': 7.0}
    lines.append(line)
  found = consistency.over_epochs([lines])
  assert found['norm'] == {'attention': [[5.0, 10.0]], 'head': [[7.0, 7.0]]}


def test_without_metrics_there_are_no_epochs():
  assert consistency.over_epochs([[]]) == {}
  assert consistency.over_epochs([]) == {}
