"""Figures of an analysis: drawn from what its JSON files hold."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from modelstock_jax.analysis import plots
from modelstock_jax.analysis import results

Figure = mpl_figure.Figure
Found = dict[str, Any]

# Of an identity: how its panel calls it.
IDENTITIES = {
  'norm': r'$|d_i| = \ell$',
  'anchor': r'$|\mu - w_0|^2 = \ell^2 c$',
  'shell': r'$|w_i - \mu|^2 = \ell^2 (1 - c)$',
  'mean': r'$|\bar{w} - \mu|^2 = \ell^2 (1 - c)/2$',
  'merge': r'$|w_H - \mu|^2 = t\,|\bar{w} - \mu|^2$',
  'foot': r'$(w_i - w_H) \perp (w_j - w_0)$',
}
_NOTE = '#444444'
_MARKS = {  # text, offset in points
  'w0': (r'$w_0$', (6, 6)),
  'w1': (r'$w_1$', (7, -9)),
  'w2': (r'$w_2$', (-17, 6)),
  'mean': (r'$\bar{w}$', (7, 0)),
  'wH': (r'$w_H$', (-18, -9)),
  'mu': (r'$\mu$', (6, 6)),
}
_COLUMNS = {  # of the shell: title, expected value
  'thickness': (r'$|w_i - \mu|\,/\,R$', 1.0),
  'to_anchor': (r'cos of $w_0 - \mu$, $w_i - \mu$', 0.0),
  'between': (r'cos of $w_i - \mu$, $w_j - \mu$', 0.0),
  'displacements': (r'cos of $w_i - w_0$, $w_j - w_0$', None),
}


def draw(name: str, found: Found) -> dict[str, Figure]:
  """The figures of a part of the analysis.

  Args:
    name: of the part, one of `analyses.PARTS`.
    found: what its JSON file holds.

  Returns:
    Figures by what is added to the name for their files.
  """
  drawers: dict[str, dict[str, Callable[[Found], Figure]]] = {
    'consistency': {'': consistency},
    'shell': {'': shell, '_identities': identities},
    'landscape': {'': landscape},
    'distance': {'': distance},
    'scatter': {'_wise_ft': scatter},
  }
  with mpl.rc_context(plots.STYLE):
    return {suffix: drawer(found) for suffix, drawer in drawers[name].items()}


def consistency(found: Found) -> Figure:
  """Angle and norm: by layer kind, by depth, and over epochs."""
  epochs = found['epochs']
  figure = Figure((8.4, 8.4 if epochs else 5.8), layout='constrained')
  mosaic = 'ab;cd;ef' if epochs else 'ab;cd'
  names = ('angle', 'norm', 'angle_depth', 'norm_depth')
  names += ('angle_epochs', 'norm_epochs')
  panels = figure.subplot_mosaic(mosaic)
  letters = dict(zip(names, 'abcdef', strict=True))
  rows = {name: panels[k] for name, k in letters.items() if k in panels}
  units = {'angle': '°', 'norm': ''}
  titles = {
    'angle': 'Angle, degrees',
    'norm': 'Norm of the displacement',
  }
  number = len(found['models'])
  kinds = list(found['kinds'])
  for name, title in titles.items():
    _by_kind(rows[name], found, name, units[name])
    rows[name].set_title(title)
    _by_depth(rows[f'{name}_depth'], found, name, units[name])
    rows[f'{name}_depth'].set_title(f'{title}, by depth')
    rows[f'{name}_depth'].set_xlabel('Block')
    if epochs:
      ax = rows[f'{name}_epochs']
      _over_epochs(ax, epochs, name, units[name], kinds)
      ax.set_title(f'{title}, over epochs')
  for name, ax in rows.items():
    if name.startswith('norm'):
      ax.set_yscale('log')
      _plain_ticks(ax)
    else:
      ax.set_ylim(bottom=0)
  figure.supxlabel(
    f'Means and sd over {number} models, or their pairs; above, small: each '
    'layer, large: mean of its kind',
    fontsize=8.5,
    color=_NOTE,
  )
  handles, labels = rows['angle_depth'].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=len(kinds))
  return figure


def shell(found: Found) -> Figure:
  """Histograms of the distance from the centre and of three cosines."""
  kinds = list(found['kinds'])
  figure = Figure((9.0, 1.2 + 1.05 * len(kinds)), layout='constrained')
  panels = figure.subplots(
    len(kinds), len(_COLUMNS), sharex='col', squeeze=False
  )
  for column, (name, (title, expected)) in enumerate(_COLUMNS.items()):
    of_kind = {kind: _values(found, kind, name) for kind in kinds}
    everything = np.concatenate(list(of_kind.values()))
    low, high = np.percentile(everything, [0.5, 99.5])
    if expected is not None:  # in the middle
      reach = max(expected - low, high - expected, 0.05)
      low, high = expected - reach, expected + reach
    edges = np.linspace(low, high, 41)
    for row, kind in enumerate(kinds):
      ax = panels[row, column]
      values = of_kind[kind]
      color, _ = plots.KIND_STYLES[kind]
      ax.hist(np.clip(values, low, high), edges, color=color, alpha=0.85)
      if expected is not None:
        ax.axvline(expected, color=plots.BLACK, linewidth=0.8)
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
        color=_NOTE,
        bbox=dict(facecolor='white', edgecolor='none', alpha=0.7, pad=1),
      )
      if column == 0:
        ax.set_ylabel(kind, color=color, rotation=0, ha='right', va='center')
      if row == 0:
        ax.set_title(title)
  figure.supxlabel(
    f'{len(found["models"])} models; each layer and model, or pair, counts '
    'once; what lies outside is in the last bar',
    fontsize=8.5,
    color=_NOTE,
  )
  return figure


def identities(found: Found) -> Figure:
  """Relative errors of what follows from the geometry, by layer kind."""
  kinds = list(found['kinds'])
  figure = Figure((8.4, 4.2), layout='constrained')
  ax = figure.add_subplot()
  names = list(IDENTITIES)
  for index, kind in enumerate(kinds):
    color, marker = plots.KIND_STYLES[kind]
    errors = found['kinds'][kind]['errors']
    mean, spread = (
      np.array([_number(errors[name][key]) for name in names])
      for key in ('mean', 'rms')
    )
    y = np.arange(len(names)) + 0.11 * (index - (len(kinds) - 1) / 2)
    ax.hlines(y, -spread, spread, color=color, linewidth=2.5, alpha=0.3)
    [line] = ax.plot(
      mean, y, marker, color=color, markersize=5, mec='white', label=kind
    )
    plots.hover(
      line,
      [
        f'{kind}: mean error {m:+.1%}, single (rms) {s:.1%}'
        for m, s in zip(mean, spread, strict=True)
      ],
    )
  ax.axvline(0, color=plots.BLACK, linewidth=0.8)
  ax.set_yticks(range(len(names)), list(IDENTITIES.values()))
  ax.invert_yaxis()
  ax.yaxis.grid(False)
  ax.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
  ax.set_xlabel(
    'Relative error; marker: mean, bar: of a single model or pair (rms)'
  )
  figure.legend(loc='outside upper center', ncols=len(kinds))
  return figure


def landscape(found: Found) -> Figure:
  """Test error on the plane; of benchmarks and of the mean of shifts."""
  panels = _panels(found['accuracy'])
  figure = Figure((4.4 * len(panels), 4.2), layout='constrained')
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, (title, names) in zip(all_axes, panels.items(), strict=True):
    error = 100 - 100 * np.mean([found['accuracy'][n] for n in names], axis=0)
    # What matters is around the marks; far from them all is lost.
    low, top = float(error.min()), float(np.percentile(error, 80))
    levels = low + max(top - low, 1) * np.linspace(0, 1, 13) ** 1.6
    drawn = ax.contourf(
      found['x'], found['y'], error, levels, cmap='cividis_r', extend='max'
    )
    ax.contour(
      found['x'], found['y'], error, levels, colors='white', linewidths=0.4
    )
    bar = figure.colorbar(drawn, ax=ax, shrink=0.85)
    bar.set_label(f'Error on {title}, %')
    bar.ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%.0f'))
    for name, mark in found['marks'].items():
      text, offset = _MARKS[name]
      accuracy = np.mean([mark['accuracy'][n] for n in names])
      [point] = ax.plot(
        mark['x'], mark['y'], 'o', color=plots.RED, mec='white', markersize=6
      )
      label = f'{name}: error {100 - 100 * accuracy:.1f} %'
      if mark['distance'] > 1e-3 * found['marks']['w1']['x']:
        label += f', {mark["distance"]:.2f} off the plane'
      plots.hover(point, [label])
      ax.annotate(
        text,
        (mark['x'], mark['y']),
        offset,
        textcoords='offset points',
        fontsize=9.5,
        fontweight='bold',
        bbox=dict(facecolor='white', edgecolor='none', alpha=0.75, pad=0.8),
      )
    ax.set_aspect('equal')
    ax.grid(visible=False)
    ax.set_xlabel(r'along $w_1 - w_0$')
    ax.set_ylabel(r'towards $\mu$')
  figure.supxlabel(
    rf'$\mu$: {found["centre"]}; others are projected onto the plane',
    fontsize=8.5,
    color=_NOTE,
  )
  return figure


def distance(found: Found) -> Figure:
  """Accuracy of noise, averages and merges against the distance from mu."""
  some = found['noise'][0]['accuracy']
  panels = _panels(some)
  figure = Figure((4.4 * len(panels), 4.2), layout='constrained')
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, (title, names) in zip(all_axes, panels.items(), strict=True):
    scales = dict.fromkeys(point['scale'] for point in found['noise'])
    groups = [
      [point for point in found['noise'] if point['scale'] == scale]
      for scale in scales
    ]
    _line(
      ax,
      groups,
      names,
      [f'noise of {scale:g} R' for scale in scales],
      dict(color=plots.GREY, marker='.', label='centre + noise'),
    )
    for key, color, marker, label in (
      ('averages', plots.ORANGE, 'o', 'average of n models'),
      ('merges', plots.BLUE, 's', 'Model Stock of n'),
    ):
      sizes = list(dict.fromkeys(point['n'] for point in found[key]))
      if not sizes:
        continue
      groups = [[p for p in found[key] if p['n'] == size] for size in sizes]
      _line(
        ax,
        groups,
        names,
        [f'{label}, n = {size}' for size in sizes],
        dict(color=color, marker=marker, label=label),
        sizes,
        1 if key == 'averages' else -1,
      )
    ax.set_title(f'Accuracy on {title}, %')
    ax.set_xlabel(r'Distance from $\mu$')
    ax.axvline(found['radius'], color=plots.BLACK, linewidth=0.8)
    ax.annotate(
      'R',
      (found['radius'], 0),
      (3, 3),
      xycoords=('data', 'axes fraction'),
      textcoords='offset points',
      color=_NOTE,
    )
  handles, labels = all_axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=3)
  return figure


def scatter(found: Found) -> Figure:
  """In-distribution accuracy against the mean of shifts, for everything."""
  tests, shifts = _split(found['points'][0]['accuracy'])
  ys = shifts or tests
  figure = Figure((6.6, 5.0), layout='constrained')
  ax = figure.add_subplot()

  def place(point: Found) -> tuple[float, float]:
    accuracy = point['accuracy']
    return (
      100 * float(np.mean([accuracy[name] for name in tests])),
      100 * float(np.mean([accuracy[name] for name in ys])),
    )

  for k, curve in enumerate(found['curves']):
    at = np.array([place(point) for point in curve['points']])
    [line] = ax.plot(
      *at.T,
      '.-',
      color=plots.PURPLE,
      linewidth=1,
      markersize=4,
      label='WiSE-FT, from anchor to model' if not k else None,
      zorder=2,
    )
    plots.hover(
      line,
      [
        f'WiSE-FT {point["alpha"]:g} of {curve["models"][0]}: {x:.1f}, {y:.1f}'
        for point, (x, y) in zip(curve['points'], at, strict=True)
      ],
    )
  most = max(len(point['models']) for point in found['points'])
  styles = {}
  for point in found['points']:
    method, number = point['method'], len(point['models'])
    known = results.METHODS
    title = known[method].title if method in known else method
    large = method.startswith(('uniform', 'model_stock_end')) and number == most
    if method in ('uniform_soup', 'model_stock_end'):
      title = {'uniform_soup': 'Average', 'model_stock_end': 'Model Stock'}[
        method
      ] + f' of {number}'
    styles.setdefault((title, method, large), []).append(point)
  for (title, method, large), points in styles.items():
    at = np.array([place(point) for point in points])
    marker = {'zero_shot': 'X', 'fine_tuned': 'o'}.get(method, 's')
    [line] = ax.plot(
      *at.T,
      '*' if large else marker,
      color=plots.METHOD_COLORS.get(method, plots.SKY),
      markersize=14 if large else 7 if method == 'zero_shot' else 5.5,
      mec='white',
      mew=0.7,
      label=title,
      zorder=5 if large else 4,
    )
    plots.hover(
      line,
      [
        f'{title} ({", ".join(point["models"]) or "anchor"}): {x:.1f}, {y:.1f}'
        if len(point['models']) < 5
        else f'{title}: {x:.1f}, {y:.1f}'
        for point, (x, y) in zip(points, at, strict=True)
      ],
    )
  ax.set_xlabel(f'Accuracy on {", ".join(tests)} (test), %')
  ax.set_ylabel(
    f'Mean accuracy on {len(shifts)} shifts, %'
    if shifts
    else f'Accuracy on {", ".join(tests)}, %'
  )
  ax.legend(loc='best')
  return figure


def _by_kind(ax: mpl_axes.Axes, found: Found, name: str, unit: str) -> None:
  """Means of kinds with their sd over models; small: each layer."""
  kinds = list(found['kinds'])
  for x, kind in enumerate(kinds):
    color, marker = plots.KIND_STYLES[kind]
    layers = [x for x in found['layers'] if x['kind'] == kind]
    layers = [x for x in layers if _is_drawn(name, x[name]['mean'])]
    if not layers:
      continue  # nothing of this kind has moved
    spread = np.linspace(-0.22, 0.22, len(layers)) if len(layers) > 1 else [0.0]
    [dots] = ax.plot(
      x + np.asarray(spread, float),
      [layer[name]['mean'] for layer in layers],
      'o',
      color=color,
      alpha=0.35,
      markersize=3.5,
      mew=0,
    )
    plots.hover(
      dots,
      [f'{x["name"]}: {x[name]["mean"]:.3g}{unit}' for x in layers],
    )
    value = found['kinds'][kind][name]
    sd = _number(value['sd'])
    if np.isfinite(sd):
      ax.errorbar(
        x, value['mean'], sd, color=color, capsize=3, fmt='none', zorder=3
      )
    [dot] = ax.plot(
      x, value['mean'], marker, color=color, markersize=8, mec='white', zorder=4
    )
    plots.hover(dot, [f'{kind}: {value["mean"]:.3g}{unit}, sd {sd:.2g}'])
  ax.set_xticks(range(len(kinds)), kinds)
  ax.xaxis.grid(False)


def _is_drawn(name: str, value: float | None) -> bool:
  """Where nothing has moved is no angle, and no place on a log scale."""
  return value is not None and bool(
    np.isfinite(value) and (name != 'norm' or value > 0)
  )


def _by_depth(ax: mpl_axes.Axes, found: Found, name: str, unit: str) -> None:
  """A line through the means of each kind, with a band of one sd."""
  places = found['places']
  for kind in found['kinds']:
    color, marker = plots.KIND_STYLES[kind]
    at: dict[int, list[Found]] = {}
    for layer in found['layers']:
      if layer['kind'] == kind and _is_drawn(name, layer[name]['mean']):
        at.setdefault(layer['place'], []).append(layer[name])
    x = sorted(at)
    mean = np.array([np.mean([v['mean'] for v in at[p]]) for p in x])
    sd = np.array([np.mean([_number(v['sd']) for v in at[p]]) for p in x])
    [line] = ax.plot(
      x,
      mean,
      color=color,
      marker=marker,
      markersize=4.5,
      mec='white',
      linewidth=1.2,
      label=kind,
    )
    if np.isfinite(sd).all():
      low = np.maximum(mean - sd, mean / 10)  # a log scale has no zero
      ax.fill_between(x, low, mean + sd, color=color, alpha=0.12, linewidth=0)
    plots.hover(
      line,
      [
        f'{kind}, {_place(places[p])}: {v:.3g}{unit}'
        for p, v in zip(x, mean, strict=True)
      ],
    )
  ax.set_xticks(range(len(places)), places)
  ax.xaxis.grid(False)


def _over_epochs(
  ax: mpl_axes.Axes, epochs: Found, name: str, unit: str, kinds: Sequence[str]
) -> None:
  for kind in kinds:
    if kind not in epochs[name]:
      continue
    color, marker = plots.KIND_STYLES[kind]
    runs = np.array(epochs[name][kind], float)
    known = np.array([_is_drawn(name, v) for v in runs.mean(0)])
    at, runs = np.array(epochs['epochs'])[known], runs[:, known]
    mean = runs.mean(0)
    [line] = ax.plot(
      at,
      mean,
      color=color,
      marker=marker,
      markersize=4.5,
      mec='white',
      linewidth=1.2,
    )
    plots.hover(
      line,
      [
        f'{kind}, epoch {e}: {v:.3g}{unit}'
        for e, v in zip(at, mean, strict=True)
      ],
    )
    if len(runs) > 1:
      sd = runs.std(0, ddof=1)
      ax.fill_between(
        at,
        mean - sd,
        mean + sd,
        color=color,
        alpha=0.12,
        linewidth=0,
      )
  ax.set_xlabel('Epoch')
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _line(
  ax: mpl_axes.Axes,
  groups: Sequence[Sequence[Found]],
  names: Sequence[str],
  texts: Sequence[str],
  style: dict[str, Any],
  sizes: Sequence[int] = (),
  side: int = 1,
) -> None:
  """A line through the means of groups of points, with their sd."""
  x = np.array([np.mean([p['distance'] for p in group]) for group in groups])
  values = [
    [100 * np.mean([p['accuracy'][n] for n in names]) for p in group]
    for group in groups
  ]
  y = np.array([np.mean(v) for v in values])
  sd = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
  ax.errorbar(
    x, y, sd, color=style['color'], elinewidth=0.8, alpha=0.5, fmt='none'
  )
  [line] = ax.plot(x, y, linewidth=1.2, mec='white', markersize=7, **style)
  plots.hover(
    line,
    [
      f'{text}: {b:.1f} % at {a:.2f}'
      for text, a, b in zip(texts, x, y, strict=True)
    ],
  )
  for size, a, b in zip(sizes, x, y, strict=False):
    if size & (size - 1):  # room for the powers of two
      continue
    ax.annotate(
      str(size),
      (a, b),
      (7 * side, 4 * side),
      textcoords='offset points',
      ha='left' if side > 0 else 'right',
      va='bottom' if side > 0 else 'top',
      fontsize=7.5,
      color=style['color'],
    )


def _values(found: Found, kind: str, name: str) -> np.ndarray:
  """All numbers of the layers of a kind."""
  values = [
    _number(value)
    for layer in found['layers']
    if layer['kind'] == kind
    for value in layer[name]
  ]
  array = np.array(values)
  return array[np.isfinite(array)]


def _split(accuracy: Found) -> tuple[list[str], list[str]]:
  """Benchmarks in distribution, and shifts."""
  tests = [name for name in accuracy if name in results.IN_DISTRIBUTION]
  aside = (*tests, *results.ASIDE)
  return tests, [name for name in accuracy if name not in aside]


def _panels(accuracy: Found) -> dict[str, list[str]]:
  """For each panel its title and the benchmarks it is the mean of."""
  tests, shifts = _split(accuracy)
  found = {f'{", ".join(tests)} (test)': tests}
  if shifts:
    found[f'{len(shifts)} shifts (mean)' if len(shifts) > 1 else shifts[0]] = (
      shifts
    )
  return found


def _number(value: float | None) -> float:
  return float('nan') if value is None else value


def _plain_ticks(ax: mpl_axes.Axes) -> None:
  ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def _place(name: str) -> str:
  return f'block {name}' if name.isdigit() else name
