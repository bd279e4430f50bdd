"""The thin shell: do models lie around a centre as the merge assumes?

The merge assumes that fine-tuned weights lie on a thin shell around a centre
mu, in directions that are orthogonal to each other and to that of the anchor:
|w_i - mu| is nearly constant, and what follows for averages and merges holds.
Models that differ in their random numbers alone are orthogonal in expectation,
for any network; the claim is that every single one is, and that the shell is
thin.
"""

from typing import Any
from typing import NamedTuple

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from experiments.geometry import centre
from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from modelstock_jax.report import plots

LEAST = centre.LEAST
FAILS = 0.1  # relative error of the mean, beyond which an identity fails

# The identities, as the panels name them.
IDENTITIES = {
  'norm': r'$|d_i| = \ell$',
  'anchor': r'$|\mu - w_0|^2 = \ell^2 c$',
  'shell': r'$|w_i - \mu|^2 = \ell^2 (1 - c)$',
  'mean': r'$|\bar{w} - \mu|^2 = \ell^2 (1 - c)/2$',
  'merge': r'$|w_H - \mu|^2 = t\,|\bar{w} - \mu|^2$',
  'foot': r'$(w_i - w_H) \perp (w_j - w_0)$',
}
_COLUMNS = {  # title, expected value
  'thickness': (r'$|w_i - \mu|\,/\,R$', 1.0),
  'to_anchor': (r'cos of $w_0 - \mu$, $w_i - \mu$', 0.0),
  'between': (r'cos of $w_i - \mu$, $w_j - \mu$', 0.0),
  'displacements': (r'cos of $w_i - w_0$, $w_j - w_0$', None),
}


class Shell(NamedTuple):
  """L layers of N models; P = N(N-1)/2 pairs (i, j) with i < j.

  Attributes:
    radius: float64[L], R: root mean square of |w_i - mu|.
    thickness: float64[L, N], |w_i - mu| / R.
    to_anchor: float64[L, N], cosine between w_0 - mu and w_i - mu.
    between: float64[L, P], cosine between w_i - mu and w_j - mu.
    displacements: float64[L, P], cosine between w_i - w_0 and w_j - w_0.
  """

  radius: np.ndarray
  thickness: np.ndarray
  to_anchor: np.ndarray
  between: np.ndarray
  displacements: np.ndarray


def measure(products: np.ndarray) -> Shell:
  """Measure the shell of N >= 4 models.

  Args:
    products: float64[L, N, N], see `family.Gram`.

  Returns:
    A `Shell`; NaN where the estimate of a squared norm is not positive, so
    that there is no angle.

  Raises:
    ValueError: there are fewer than four models.
  """
  number = products.shape[-1]
  centre.check(number)
  points, anchor = np.eye(number), np.zeros(number)
  pairs = centre.pairs_of(number)
  squares, to_anchor = [], []
  for i in range(number):
    others = np.arange(number) != i
    square = centre.from_centre(products, points[i], points[i], others)
    distance = centre.from_centre(products, anchor, anchor, others)
    dot = centre.from_centre(products, anchor, points[i], others)
    squares.append(square)
    to_anchor.append(_cosine(dot, distance, square))
  between, displacements = [], []
  for i, j in pairs:
    others = ~np.isin(np.arange(number), (i, j))
    dots = [
      centre.from_centre(products, points[a], points[b], others)
      for a, b in ((i, j), (i, i), (j, j))
    ]
    between.append(_cosine(*dots))
    displacements.append(
      _cosine(products[:, i, j], products[:, i, i], products[:, j, j])
    )
  square = np.stack(squares, 1)
  radius = _root(square.mean(1))
  return Shell(
    radius,
    _divide(_root(square), radius[:, None]),
    np.stack(to_anchor, 1),
    np.stack(between, 1),
    np.stack(displacements, 1),
  )


def identities(products: np.ndarray) -> dict[str, np.ndarray]:
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
    products: float64[L, N, N], see `family.Gram`; N >= 4.

  Returns:
    For each name float64[L, K]: (left side - right side) / right side, but for
    the last two; K is 1, N, P or 2P. NaN in layers that no model moved.

  Raises:
    ValueError: there are fewer than four models.

  Source: Jang et al., Model Stock, ECCV 2024, section 3.
  """
  number = products.shape[-1]
  centre.check(number)
  points, anchor = np.eye(number), np.zeros(number)
  pairs = centre.pairs_of(number)
  diagonal = np.diagonal(products, axis1=1, axis2=2)
  square = diagonal.mean(1)  # l^2
  cosines = np.stack(
    [
      _cosine(products[:, i, j], diagonal[:, i], diagonal[:, j])
      for i, j in pairs
    ],
    axis=1,
  )
  cosine = cosines.mean(1)
  everyone = np.ones(number, bool)
  errors = {
    'norm': _error(_root(diagonal), _root(square)[:, None]),
    'anchor': _error(
      centre.from_centre(products, anchor, anchor, everyone), square * cosine
    )[:, None],
  }
  shells = [
    centre.from_centre(products, points[i], points[i], np.arange(number) != i)
    for i in range(number)
  ]
  radius = (square * (1 - cosine))[:, None]
  errors['shell'] = _error(np.stack(shells, 1), radius)
  means, merges, feet = [], [], []
  for (i, j), c in zip(pairs, cosines.T, strict=True):
    others = ~np.isin(np.arange(number), (i, j))
    mean = (points[i] + points[j]) / 2
    ratio = 2 * np.clip(c, 0, 1) / (1 + np.clip(c, 0, 1))
    merged = ratio[:, None] * mean[None]
    to_mean = centre.from_centre(products, mean, mean, others)
    to_merged = centre.from_centre(products, merged, merged, others)
    half = radius[:, 0] / 2
    means.append(_error(to_mean, half))
    merges.append(_divide(to_merged - ratio * to_mean, half))
    for a, b in ((i, j), (j, i)):
      dot = centre.product(products, points[a][None] - merged, points[b])
      feet.append(_divide(dot, radius[:, 0]))
  errors['mean'] = np.stack(means, 1)
  errors['merge'] = np.stack(merges, 1)
  errors['foot'] = np.stack(feet, 1)
  return errors


def report(gram: family_lib.Gram, names: list[str]) -> dict[str, Any]:
  """Measure shell and identities as JSON values: each layer, and each kind.

  Args:
    gram: inner products of the displacements.
    names: N names of the models.

  Returns:
    'layers' with the radius, thickness and cosines of each; 'kinds' with their
    means and standard deviations, and for each identity the mean error (does it
    hold on average?), the typical one (root mean square: does it hold for
    each?), and 'fails', the layers where the mean is beyond a tenth.
  """
  shell, errors = measure(gram.products), identities(gram.products)
  layers = [
    {
      **layer._asdict(),
      **{name: values[index] for name, values in shell._asdict().items()},
      'errors': {
        name: {'mean': _mean(error[index]), 'rms': _rms(error[index])}
        for name, error in errors.items()
      },
    }
    for index, layer in enumerate(gram.layers)
  ]
  kinds = {}
  for kind in gram.kinds:
    chosen = gram.of_kind(kind)
    kinds[kind] = {
      'layers': int(chosen.sum()),
      **{
        name: {'mean': _mean(values[chosen]), 'sd': _sd(values[chosen])}
        for name, values in shell._asdict().items()
        if name != 'radius'
      },
      'errors': {
        name: {
          'mean': _mean(error[chosen]),
          'rms': _rms(error[chosen]),
          'fails': [
            gram.layers[index].name
            for index in np.flatnonzero(chosen)
            if abs(_mean(error[index])) > FAILS
          ],
        }
        for name, error in errors.items()
      },
    }
  return {'models': names, 'kinds': kinds, 'layers': layers}


def _root(square: np.ndarray) -> np.ndarray:
  return np.sqrt(np.where(square >= 0, square, np.nan))


def _divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
  """Divide, with NaN where there is nothing to divide by."""
  return over / np.where(under > 0, under, np.nan)


def _cosine(dot: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
  return _divide(dot, _root(left) * _root(right))


def _error(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  return _divide(left - right, right)


def _mean(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(values.mean()) if values.size else float('nan')


def _sd(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(values.std(ddof=1)) if values.size > 1 else float('nan')


def _rms(values: np.ndarray) -> float:
  return float(np.sqrt(_mean(np.square(values))))


def draw(report: drawing.Report) -> dict[str, mpl_figure.Figure]:
  """Draw the histograms of the shell, and the errors of the identities."""
  return {
    '': _draw_histograms(report),
    '_identities': _draw_identities(report),
  }


def _draw_histograms(report: drawing.Report) -> mpl_figure.Figure:
  """Draw the distance from the centre and three cosines, by layer kind."""
  kinds = list(report['kinds'])
  figure = mpl_figure.Figure(
    (9.0, 1.2 + 1.05 * len(kinds)), layout='constrained'
  )
  panels = figure.subplots(
    len(kinds), len(_COLUMNS), sharex='col', squeeze=False
  )
  for column, (name, (title, expected)) in enumerate(_COLUMNS.items()):
    by_kind = {kind: _values(report, kind, name) for kind in kinds}
    low, high = np.percentile(
      np.concatenate(list(by_kind.values())), [0.5, 99.5]
    )
    if expected is not None:  # in the middle
      reach = max(expected - low, high - expected, 0.05)
      low, high = expected - reach, expected + reach
    for ax, (kind, values) in zip(
      panels[:, column], by_kind.items(), strict=True
    ):
      color, _ = plots.KIND_STYLES[kind]
      edges = np.linspace(low, high, 41)
      ax.hist(np.clip(values, low, high), edges, color=color, alpha=0.85)
      if expected is not None:
        ax.axvline(expected, color=plots.BLACK, linewidth=0.8)
      _write_mean(ax, values)
      if column == 0:
        ax.set_ylabel(kind, color=color, rotation=0, ha='right', va='center')
    panels[0, column].set_title(title)
  drawing.note(
    figure,
    f'{len(report["models"])} models; each layer and model, or pair, counts '
    'once; what lies outside is in the last bar',
  )
  return figure


def _write_mean(ax: mpl_axes.Axes, values: np.ndarray) -> None:
  """Write mean and sd into a histogram, and leave out its scale."""
  ax.set_yticks([])
  ax.grid(visible=False)
  ax.spines['left'].set_visible(False)
  ax.text(
    0.98,
    0.92,
    f'{values.mean():.2f} ± {values.std(ddof=1):.2f}',
    transform=ax.transAxes,
    ha='right',
    va='top',
    fontsize=7.5,
    color=drawing.NOTE,
    bbox=dict(facecolor='white', edgecolor='none', alpha=0.7, pad=1),
  )


def _draw_identities(report: drawing.Report) -> mpl_figure.Figure:
  """Draw the relative errors of the identities, by layer kind."""
  kinds = list(report['kinds'])
  figure = mpl_figure.Figure((8.4, 4.2), layout='constrained')
  ax = figure.add_subplot()
  for index, kind in enumerate(kinds):
    color, marker = plots.KIND_STYLES[kind]
    errors = report['kinds'][kind]['errors']
    mean, spread = (
      np.array([drawing.number(errors[name][key]) for name in IDENTITIES])
      for key in ('mean', 'rms')
    )
    y = np.arange(len(IDENTITIES)) + 0.11 * (index - (len(kinds) - 1) / 2)
    ax.hlines(y, -spread, spread, color=color, linewidth=2.5, alpha=0.3)
    texts = [
      f'{kind}: mean error {m:+.1%}, single (rms) {s:.1%}'
      for m, s in zip(mean, spread, strict=True)
    ]
    style = dict(color=color, marker=marker, ls='', mec='white', label=kind)
    plots.points(ax, mean, y, texts, ms=5, **style)
  ax.axvline(0, color=plots.BLACK, linewidth=0.8)
  ax.set_yticks(range(len(IDENTITIES)), list(IDENTITIES.values()))
  ax.invert_yaxis()
  ax.yaxis.grid(False)
  ax.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
  ax.set_xlabel(
    'Relative error; marker: mean, bar: of a single model or pair (rms)'
  )
  plots.legend(figure, ax, len(kinds))
  return figure


def _values(report: drawing.Report, kind: str, name: str) -> np.ndarray:
  """Return all finite numbers of the layers of a kind."""
  values = np.array(
    [
      drawing.number(value)
      for layer in report['layers']
      if layer['kind'] == kind
      for value in layer[name]
    ]
  )
  return values[np.isfinite(values)]
