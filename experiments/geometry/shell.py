"""The thin shell: do models lie around a centre as the merge assumes?

The merge assumes that fine-tuned weights lie on a thin shell around a centre
mu, in directions that are orthogonal to each other and to that of the anchor:
|w_i - mu| is nearly constant, and what follows for averages and merges holds.
Models that differ in their random numbers alone are orthogonal in expectation,
for any network; the claim is that every single one is, and that the shell is
thin.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any

from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import gram as gram_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots

LEAST = gram_lib.LEAST
FAILS = 0.1  # relative error of the mean, beyond which an identity fails

_COLUMNS = {  # title, and limits of the histogram
  'thickness': (r'$|w_i - \mu|\,/\,R$', 0.5, 1.5),
  'to_anchor': (r'cos of $w_0 - \mu$, $w_i - \mu$', -0.5, 0.5),
  'between': (r'cos of $w_i - \mu$, $w_j - \mu$', -0.5, 0.5),
  'displacements': (r'cos of $w_i - w_0$, $w_j - w_0$', 0.0, 1.0),
}


def _around(
  products: np.ndarray, models: tuple[int, ...]
) -> Callable[..., np.ndarray]:
  """Return `gram.from_centre` by all models but some."""
  others = ~np.isin(np.arange(products.shape[-1]), models)
  return functools.partial(gram_lib.from_centre, products, others=others)


def measure(products: np.ndarray) -> dict[str, np.ndarray]:
  """Measure the shell of N >= 4 models, with P = N(N-1)/2 pairs.

  Args:
    products: float64[L, N, N], see `gram.Gram`.

  Returns:
    By name, NaN where the estimate of a squared norm is not positive:

    * 'radius': float64[L], R, the root mean square of |w_i - mu|;
    * 'thickness': float64[L, N], |w_i - mu| / R;
    * 'to_anchor': float64[L, N], cosine between w_0 - mu and w_i - mu;
    * 'between': float64[L, P], cosine between w_i - mu and w_j - mu;
    * 'displacements': float64[L, P], cosine between w_i - w_0 and w_j - w_0.
  """
  number = products.shape[-1]
  one, anchor = np.eye(number), np.zeros(number)
  squares = gram_lib.squared_radii(products)
  to_anchor = []
  for i in range(number):
    around = _around(products, (i,))
    norms = around(anchor, anchor), squares[:, i]
    to_anchor.append(gram_lib.cosine(around(anchor, one[i]), *norms))
  between = []
  for i, j in itertools.combinations(range(number), 2):
    around = _around(products, (i, j))
    norms = around(one[i], one[i]), around(one[j], one[j])
    between.append(gram_lib.cosine(around(one[i], one[j]), *norms))
  radius = _root(squares.mean(1))
  return {
    'radius': radius,
    'thickness': _divide(_root(squares), radius[:, None]),
    'to_anchor': np.stack(to_anchor, 1),
    'between': np.stack(between, 1),
    'displacements': gram_lib.cosines(products),
  }


def identities(gram: gram_lib.Gram) -> dict[str, np.ndarray]:
  r"""Compare both sides of what follows from the geometry.

  With l^2 the mean squared displacement and c the mean pairwise cosine,

  * 'norm': |d_i| = l, for each i;
  * 'anchor': |mu - w_0|^2 = l^2 c;
  * 'shell': |w_i - mu|^2 = l^2 (1 - c), for each i;
  * 'mean': |(w_i + w_j) / 2 - mu|^2 = l^2 (1 - c) / 2, for each pair;
  * 'merge': |w_H - mu|^2 = t |(w_i + w_j) / 2 - mu|^2, for each pair and its
    merge w_H, relative to l^2 (1 - c) / 2;
  * 'foot': (w_i - w_H) . (w_j - w_0) = 0, for each ordered pair, relative to
    l^2 (1 - c).

  Args:
    gram: of N >= 4 models.

  Returns:
    For each name float64[L, K]: (left side - right side) / right side, but for
    the last two; K is 1, N, P or 2P. NaN in layers that no model moved.

  Source: Jang et al., Model Stock, ECCV 2024, section 3.
  """
  products = gram.products
  number = products.shape[-1]
  one, anchor = np.eye(number), np.zeros(number)
  diagonal = np.diagonal(products, axis1=1, axis2=2)
  length = diagonal.mean(1, keepdims=True)  # l^2
  cosine = gram_lib.cosines(products).mean(1, keepdims=True)
  radius = length * (1 - cosine)
  to_centre = _around(products, ())(anchor, anchor)[:, None]
  means, merges, feet = [], [], []
  for i, j in itertools.combinations(range(number), 2):
    around = _around(products, (i, j))
    mean = (one[i] + one[j]) / 2
    merged = gram.mixture((i, j), 'merges')
    ratio = 2 * merged[:, i]
    means.append(around(mean, mean))
    merges.append(around(merged, merged) - ratio * means[-1])
    for a, b in ((i, j), (j, i)):
      feet.append(gram_lib.product(products, one[a] - merged, one[b]))
  return {
    'norm': _divide(_root(diagonal), _root(length)) - 1,
    'anchor': _divide(to_centre, length * cosine) - 1,
    'shell': _divide(gram_lib.squared_radii(products), radius) - 1,
    'mean': _divide(np.stack(means, 1), radius / 2) - 1,
    'merge': _divide(np.stack(merges, 1), radius / 2),
    'foot': _divide(np.stack(feet, 1), radius),
  }


def report(family: family_lib.Family) -> dict[str, Any]:
  """Measure shell and identities as JSON values: each layer, and each kind.

  Args:
    family: N >= 4 models.

  Returns:
    'layers' with the radius, thickness and cosines of each; 'kinds' with their
    means and standard deviations, and for each identity the mean error (does it
    hold on average?), the typical one (root mean square: does it hold for
    each?), and 'fails', the layers where the mean is beyond a tenth.
  """
  gram = family.gram
  shell, errors = measure(gram.products), identities(gram)
  kinds = {}
  for kind, chosen in merges_lib.by_kind(gram.layers).items():
    kinds[kind] = {
      'layers': int(chosen.sum()),
      **{name: drawing.spread(shell[name][chosen]) for name in _COLUMNS},
      'errors': {
        name: {
          **_error(error[chosen]),
          'fails': [
            gram.layers[index].name
            for index in np.flatnonzero(chosen)
            if abs(_error(error[index])['mean']) > FAILS
          ],
        }
        for name, error in errors.items()
      },
    }
  layers = [
    {
      **layer._asdict(),
      **{name: values[index] for name, values in shell.items()},
      'errors': {name: _error(error[index]) for name, error in errors.items()},
    }
    for index, layer in enumerate(gram.layers)
  ]
  return {'models': family.names, 'kinds': kinds, 'layers': layers}


def _root(square: np.ndarray) -> np.ndarray:
  return np.sqrt(np.where(square >= 0, square, np.nan))


def _divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
  """Divide, with NaN where there is nothing to divide by."""
  return over / np.where(under > 0, under, np.nan)


def _error(errors: np.ndarray) -> dict[str, float]:
  """Return the mean of errors and their root mean square."""
  rms = drawing.spread(np.square(errors))['mean'] ** 0.5
  return {'mean': drawing.spread(errors)['mean'], 'rms': rms}


def draw(report: drawing.Report) -> mpl_figure.Figure:
  """Draw the distance from the centre and three cosines, by layer kind."""
  kinds = report['kinds']
  size = 9.0, 1.2 + 1.05 * len(kinds)
  figure = mpl_figure.Figure(size, layout='constrained')
  shape = len(kinds), len(_COLUMNS)
  panels = figure.subplots(*shape, sharex='col', squeeze=False)
  for row, (kind, spreads) in zip(panels, kinds.items(), strict=True):
    layers = [layer for layer in report['layers'] if layer['kind'] == kind]
    for ax, (name, (title, low, high)) in zip(
      row, _COLUMNS.items(), strict=True
    ):
      values = np.array([layer[name] for layer in layers], float)
      values = np.clip(values[np.isfinite(values)], low, high)
      color, _ = plots.KIND_STYLES[kind]
      ax.hist(values, np.linspace(low, high, 41), color=color)
      text = f'{spreads[name]["mean"]:.2f} ± {spreads[name]["sd"]:.2f}'
      ax.text(0.98, 0.8, text, transform=ax.transAxes, ha='right')
      ax.set_yticks([])
      ax.grid(visible=False)
      if kind == next(iter(kinds)):
        ax.set_title(title)
    row[0].set_ylabel(kind, rotation=0, ha='right', va='center')
  drawing.note(
    figure,
    f'{len(report["models"])} models; each layer and model, or pair, counts '
    'once; what lies outside is in the last bar',
  )
  return figure
