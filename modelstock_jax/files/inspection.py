"""Whether models will merge: what their displacements tell, and a verdict."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelstock_jax.files import names as names_lib
from modelstock_jax.files import work
from modelstock_jax.merging import formula

# Thresholds of the verdicts, stated in docs/files.md. Shares are of parameters.
RETURNED = 0.1  # a ratio below it returns a layer to the anchor
MOST = 0.5  # the share that decides
AVERAGE = 0.95  # a mean ratio above it is a plain average
AGAINST = -0.1  # the mean cosine of a model with the others
UNEVEN = 0.5  # sd / mean of norms; of two models, one moved 3 times as far
ROUNDED = 0.5  # displacement / (eps x anchor): below it is rounding


def summarize(measured: Sequence[work.Measured]) -> dict[str, dict[str, Any]]:
  """Summarize layers all together, by kind, and by block.

  Args:
    measured: measurements of the layers.

  Returns:
    By 'all', kind ('attention', ...) and block ('block 0', ...): number of
    'layers' and 'parameters'; means over parameters of 'cosine', 'ratio' and
    'spread' (sd / mean of the norms over models); 'norms', relative to the
    anchor's, None if that is 0; shares of parameters that are 'returned' to
    the anchor, 'unmoved' (equal to the anchor's), and 'rounded' (in layers
    whose displacement is of the size of rounding).
  """
  members: dict[tuple[int, str], list[work.Measured]] = {}
  for layer in measured:
    name = layer.names[0]
    keys = [(-1, 'all'), (-1, names_lib.layer_kind(name))]
    if (block := names_lib.layer_block(name)) is not None:
      keys.append((block, f'block {block}'))
    for key in keys:
      members.setdefault(key, []).append(layer)
  return {key[1]: _summarize(members[key]) for key in sorted(members)}


def _summarize(layers: Sequence[work.Measured]) -> dict[str, Any]:
  norms, sizes = _norms(layers), [layer.size for layer in layers]
  anchors = np.sqrt([layer.square for layer in layers])
  total, eps = np.linalg.norm(anchors), np.array([x.eps for x in layers])
  columns = {
    'cosine': [np.mean(layer.cosine) for layer in layers],
    'ratio': [np.mean(layer.ratio) for layer in layers],
    'spread': _spread(norms),
    'returned': [np.mean(layer.ratio < RETURNED) for layer in layers],
    'unmoved': [np.mean(layer.unmoved / layer.size) for layer in layers],
    'rounded': norms.mean(1) < ROUNDED * eps * anchors,
  }
  return {
    'layers': len(layers),
    'parameters': sum(sizes),
    'norms': (np.linalg.norm(norms, axis=0) / total).tolist()
    if total
    else None,
    **{k: float(np.average(x, weights=sizes)) for k, x in columns.items()},
  }


def judge(measured: Sequence[work.Measured]) -> dict[str, str]:
  """Return the verdicts on a merge, in words, by their names.

  The first is one of 'foreign', 'base', 'average' and 'merge'; 'uneven' and
  'rounding' may follow.

  Args:
    measured: measurements of the layers of at least two models.
  """
  if not measured:
    return {}
  total, norms = _summarize(measured), _norms(measured)
  squares = np.array([[layer.square] for layer in measured])
  is_far = (norms**2 > squares) & (squares > 0)
  far = np.average(is_far, 0, [layer.size for layer in measured])
  gram = np.sum([layer.gram for layer in measured], axis=0)
  square = np.diagonal(gram)
  cosines = formula.cosine(gram, square[:, None], square, np)
  against = (cosines.sum(1) - np.diagonal(cosines)) / (len(gram) - 1)
  foreign = [
    f'Model {i + 1} did not start from this anchor: in {far[i]:.0%} of its '
    'parameters the displacement is larger than the weights.'
    for i in np.flatnonzero(far > MOST)
  ] or [
    f'Model {i + 1} may not have started from this anchor: its mean cosine '
    f'with the other models is {against[i]:.2f}.'
    for i in np.flatnonzero(against < AGAINST)
  ]
  if foreign:
    verdicts = {'foreign': ' '.join(foreign)}
  elif total['returned'] > MOST:
    verdicts = {
      'base': f'The merge returns your base ({total["returned"]:.0%} of the '
      f'parameters have a ratio below {RETURNED}): these models share little.'
    }
  elif total['ratio'] > AVERAGE:
    ratio = f'mean ratio {total["ratio"]:.2f}'
    verdicts = {'average': f'A plain average will do ({ratio}).'}
  else:
    verdicts = {'merge': f'Merge: the mean ratio is {total["ratio"]:.2f}.'}
  lengths = np.sqrt(square)
  if _spread(lengths) > UNEVEN:
    times = lengths.max() / lengths.min()
    verdicts['uneven'] = (
      f'The models are not on a thin shell: model {lengths.argmax() + 1} moved '
      f'{times:.1f} times as far as model {lengths.argmin() + 1}.'
    )
  if total['rounded'] > MOST:
    verdicts['rounding'] = (
      f'{total["rounded"]:.0%} of the parameters moved by no more than their '
      'dtype rounds: these cosines are noise. Take checkpoints in float32.'
    )
  return verdicts


def _norms(layers: Sequence[work.Measured]) -> np.ndarray:
  """Return the norms of the displacements, float64[layers, N]."""
  return np.sqrt([np.diagonal(layer.gram) for layer in layers])


def _spread(norms: np.ndarray) -> np.ndarray:
  """Return sd / mean over the last axis, 0 where the mean is."""
  mean = norms.mean(-1)
  return norms.std(-1) / np.where(mean > 0, mean, 1)
