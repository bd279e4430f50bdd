"""Draws the pictures of the method, for light and dark pages.

python docs/pictures/draw.py    # docs/pictures/*.svg anew

Nothing is placed by eye: four points in space with the right angles that the
paper finds, projected; the same in the plane; and the formula as a curve.
"""

import pathlib
from typing import Any
from typing import NamedTuple

import matplotlib as mpl
from matplotlib import patches
import matplotlib.pyplot as plt
import numpy as np

FOLDER = pathlib.Path(__file__).parent
DEGREES = 50.0  # between the displacements of the two models


class Palette(NamedTuple):
  """Colours of one page scheme."""

  ink: str
  faint: str
  plane: str
  anchor: str
  model: str
  mean: str
  merge: str
  halo: str


PALETTES = {
  'light': Palette(
    ink='#1f2430',
    faint='#8a90a0',
    plane='#5b6cff',
    anchor='#4b5563',
    model='#3f51d5',
    mean='#0f8f83',
    merge='#d6481f',
    halo='#ffffff',
  ),
  'dark': Palette(
    ink='#e6e8ef',
    faint='#8d93a6',
    plane='#8b98ff',
    anchor='#aab1c2',
    model='#93a2ff',
    mean='#3fd0bf',
    merge='#ff8a5c',
    halo='#1e2129',
  ),
}


class Points(NamedTuple):
  """The anchor, two models, and the centre of all fine-tuned weights."""

  w0: np.ndarray
  w1: np.ndarray
  w2: np.ndarray
  mu: np.ndarray

  @property
  def mean(self) -> np.ndarray:
    """Return the mean of the two models."""
    return (self.w1 + self.w2) / 2

  @property
  def merge(self) -> np.ndarray:
    """The point of the plane of anchor and models that is nearest to mu."""
    basis = np.stack([self.w1 - self.w0, self.w2 - self.w0], axis=1)
    steps, *_ = np.linalg.lstsq(basis, self.mu - self.w0, rcond=None)
    return self.w0 + basis @ steps


def points(degrees: float = DEGREES) -> Points:
  """Displacements of length 1, at an angle; mu at the origin.

  All edges from mu are at right angles, so that the squared length of w0 is
  the cosine, and of the models one minus it.
  """
  cosine = np.cos(np.radians(degrees))
  to_anchor, to_model = np.sqrt(cosine), np.sqrt(1 - cosine)
  x, y, z = np.eye(3)
  found = Points(to_anchor * x, to_model * y, to_model * z, np.zeros(3))
  # The formula of the paper is the foot of this perpendicular.
  t = 2 * cosine / (1 + cosine)
  np.testing.assert_allclose(
    found.merge, t * found.mean + (1 - t) * found.w0, atol=1e-12
  )
  return found


def flat(p: Points) -> dict[str, np.ndarray]:
  """Coordinates in the plane: w0 at 0, the mean of the models above it."""
  up = p.mean - p.w0
  across = p.w1 - p.w2
  axes = np.stack([across / np.linalg.norm(across), up / np.linalg.norm(up)])
  names = ('w0', 'w1', 'w2', 'mean', 'merge')
  return {name: axes @ (getattr(p, name) - p.w0) for name in names}


def seen(p: Points, turn: float = 33, tilt: float = 27) -> dict[str, Any]:
  """The points as seen in space, with the plane of w0, w1, w2 lying flat."""
  up = p.mean - p.w0
  across = p.w1 - p.w2
  away = p.merge - p.mu
  frame = np.stack([v / np.linalg.norm(v) for v in (across, up, -away)])
  a, b = np.radians(turn), np.radians(tilt)
  around = np.array(
    [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
  )
  view = np.array([[1, 0, 0], [0, np.sin(b), np.cos(b)]])
  project = view @ around @ frame
  names = ('w0', 'w1', 'w2', 'mu', 'mean', 'merge')
  found = {name: project @ (getattr(p, name) - p.w0) for name in names}
  found['project'] = lambda point: project @ (point - p.w0)
  return found


def _line(axes, a, b, colour, *, width=1.6, style='-', order=2, alpha=1.0):
  axes.plot(
    [a[0], b[0]],
    [a[1], b[1]],
    style,
    color=colour,
    lw=width,
    zorder=order,
    alpha=alpha,
    solid_capstyle='round',
  )


def _corner(axes, at, one, other, colour, size=0.055):
  """Marks a right angle at a corner between two unit steps, as projected."""
  a, b = at + size * one, at + size * other
  path = np.stack([a, a + size * other, b])
  axes.plot(*path.T, color=colour, lw=1.1, zorder=3)


def _dot(axes, at, colour, palette, size=9.0):
  axes.plot(
    *at,
    'o',
    color=colour,
    ms=size,
    zorder=6,
    mec=palette.halo,
    mew=1.4,
  )


def _word(axes, at, shift, text, colour, size=14, **options):
  axes.annotate(
    text,
    at,
    shift,
    textcoords='offset points',
    color=colour,
    fontsize=size,
    zorder=7,
    **{'ha': 'center', 'va': 'center', **options},
  )


def _in_space(axes, p: Points, palette: Palette) -> None:
  s = seen(p)

  def unit(a, b):
    step = getattr(p, b) - getattr(p, a)
    return s['project'](p.w0 + step / np.linalg.norm(step))

  corners = [s['w0'], s['w1'], s['w2']]
  axes.add_patch(
    patches.Polygon(corners, color=palette.plane, alpha=0.13, lw=0, zorder=1)
  )
  for a, b in (('w0', 'w1'), ('w0', 'w2'), ('w1', 'w2')):
    _line(axes, s[a], s[b], palette.model, alpha=0.9)
  for name in ('w0', 'w1', 'w2'):
    _line(axes, s['mu'], s[name], palette.faint, width=1.3)
  for a, b in (('w0', 'w1'), ('w0', 'w2'), ('w1', 'w2')):
    _corner(axes, s['mu'], unit('mu', a), unit('mu', b), palette.faint)
  _line(axes, s['w0'], s['mean'], palette.mean, width=1.4, style='--')
  _line(axes, s['mu'], s['merge'], palette.merge, width=2.0, order=4)
  _corner(
    axes,
    s['merge'],
    unit('merge', 'mu'),
    unit('merge', 'w0'),
    palette.merge,
    size=0.045,
  )
  _dot(axes, s['w0'], palette.anchor, palette)
  for name in ('w1', 'w2'):
    _dot(axes, s[name], palette.model, palette)
  _dot(axes, s['mu'], palette.ink, palette)
  _dot(axes, s['mean'], palette.mean, palette, size=8)
  _dot(axes, s['merge'], palette.merge, palette, size=11)
  _word(axes, s['w0'], (-4, -15), '$w_0$', palette.anchor)
  _word(axes, s['w1'], (13, 4), '$w_1$', palette.model)
  _word(axes, s['w2'], (-14, 2), '$w_2$', palette.model)
  _word(axes, s['mu'], (0, 14), r'$\mu$', palette.ink)
  _word(axes, s['mean'], (9, 12), r'$\bar w$', palette.mean)
  _word(axes, s['merge'], (23, 4), '$w_H$', palette.merge)


def _in_the_plane(axes, p: Points, palette: Palette) -> None:
  f = flat(p)
  axes.add_patch(
    patches.Polygon(
      [f['w0'], f['w1'], f['w2']],
      color=palette.plane,
      alpha=0.10,
      lw=0,
      zorder=1,
    )
  )
  for name in ('w1', 'w2'):
    axes.annotate(
      '',
      f[name],
      f['w0'],
      arrowprops=dict(
        arrowstyle='-|>,head_length=.55,head_width=.22',
        color=palette.model,
        lw=1.8,
        shrinkA=4,
        shrinkB=5,
      ),
      zorder=3,
    )
  _line(axes, f['w1'], f['w2'], palette.model, width=1.2, alpha=0.8)
  _line(axes, f['w0'], f['mean'], palette.mean, width=1.4, style='--')
  # Altitudes: each model's displacement is at right angles to the way from
  # w_H to the other model.
  for a, b in (('w1', 'w2'), ('w2', 'w1')):
    along = f[b] / np.linalg.norm(f[b])
    foot = along * (f[a] @ along)
    _line(axes, f[a], foot, palette.merge, width=1.1, style=':', order=2)
    back = (f[a] - foot) / np.linalg.norm(f[a] - foot)
    _corner(axes, foot, -along, back, palette.merge, size=0.036)
  half = DEGREES / 2
  axes.add_patch(
    patches.Arc(
      f['w0'],
      0.44,
      0.44,
      theta1=90 - half,
      theta2=90 + half,
      color=palette.ink,
      lw=1.3,
      zorder=3,
    )
  )
  _word(axes, f['w0'] + [0.042, 0.275], (0, 0), r'$\theta$', palette.ink)
  _dot(axes, f['w0'], palette.anchor, palette)
  for name in ('w1', 'w2'):
    _dot(axes, f[name], palette.model, palette)
  _dot(axes, f['mean'], palette.mean, palette, size=8)
  _dot(axes, f['merge'], palette.merge, palette, size=11)
  _word(axes, f['w0'], (0, -15), '$w_0$', palette.anchor)
  _word(axes, f['w1'], (15, 4), '$w_1$', palette.model)
  _word(axes, f['w2'], (-15, 4), '$w_2$', palette.model)
  _word(axes, f['mean'], (0, 14), r'$\bar w$', palette.mean)
  _word(axes, f['merge'], (19, -13), '$w_H$', palette.merge)
  # The ratio, as a length beside the dashed line.
  x = f['w1'][0] + 0.19
  _line(axes, (x, 0), (x, f['merge'][1]), palette.merge, width=2.2)
  _line(axes, (x, f['merge'][1]), (x, f['mean'][1]), palette.faint, width=2.2)
  for y in (0, f['merge'][1], f['mean'][1]):
    _line(axes, (x - 0.02, y), (x + 0.02, y), palette.ink, width=1.2, order=4)
  _word(axes, (x, f['merge'][1] / 2), (12, 0), '$t$', palette.merge)
  _word(
    axes,
    (x, (f['merge'][1] + f['mean'][1]) / 2),
    (24, 0),
    '$1 - t$',
    palette.faint,
  )
  for name in ('merge', 'mean'):
    y = f[name][1]
    _line(axes, (0.04, y), (x - 0.03, y), palette.faint, width=0.7, alpha=0.6)


def geometry(palette: Palette) -> plt.Figure:
  """Both views, side by side."""
  p = points()
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.2, 4.3), gridspec_kw=dict(wspace=0.06)
  )
  _in_space(left, p, palette)
  _in_the_plane(right, p, palette)
  for axes, title in (
    (left, 'in the space of weights'),
    (right, 'in the plane of $w_0$, $w_1$, $w_2$'),
  ):
    axes.set_aspect('equal')
    axes.axis('off')
    axes.margins(0.16)
    axes.set_title(title, color=palette.faint, fontsize=11.5, y=-0.06)
  return figure


def ratio(palette: Palette) -> plt.Figure:
  """The ratio t against the angle, for several N."""
  figure, axes = plt.subplots(figsize=(6.4, 3.5))
  degrees = np.linspace(0, 90, 361)
  cosine = np.cos(np.radians(degrees))
  colours = (palette.merge, palette.model, palette.mean, palette.anchor)
  curves = zip((2, 3, 4, 8), (40, 55, 68, 82), colours, strict=True)
  for number, at, colour in curves:
    t = number * cosine / (1 + (number - 1) * cosine)
    axes.plot(degrees, t, color=colour, lw=2.2 if number == 2 else 1.5)
    here = np.cos(np.radians(at))
    y = number * here / (1 + (number - 1) * here)
    axes.annotate(
      f'N = {number}',
      (at, y),
      ha='center',
      va='center',
      fontsize=10,
      color=colour,
      bbox=dict(boxstyle='round,pad=.15', fc=palette.halo, ec='none'),
    )
  axes.set_xlim(0, 90)
  axes.set_ylim(0, 1.03)
  axes.set_xticks(range(0, 91, 15), [f'{d}°' for d in range(0, 91, 15)])
  axes.set_xlabel('angle between displacements', color=palette.ink)
  axes.set_ylabel('ratio $t$', color=palette.ink)
  axes.annotate(
    'they agree: the mean',
    (2, 0.9),
    color=palette.faint,
    fontsize=10,
  )
  axes.annotate(
    'right angles: the anchor',
    (82, 0.05),
    color=palette.faint,
    fontsize=10,
    ha='right',
  )
  axes.tick_params(colors=palette.ink)
  axes.grid(color=palette.faint, alpha=0.22, lw=0.7)
  for side, spine in axes.spines.items():
    spine.set_visible(side in ('left', 'bottom'))
    spine.set_color(palette.faint)
  return figure


def main(folder: pathlib.Path = FOLDER) -> None:
  """Writes all pictures."""
  mpl.use('agg')
  mpl.rcParams.update(
    {
      'mathtext.fontset': 'stix',
      'font.family': 'DejaVu Sans',
      'svg.fonttype': 'path',
      'svg.hashsalt': 'modelstock',  # names not drawn by chance
    }
  )
  for name, draw in (('geometry', geometry), ('ratio', ratio)):
    for scheme, palette in PALETTES.items():
      figure = draw(palette)
      figure.savefig(
        folder / f'{name}_{scheme}.svg',
        transparent=True,
        bbox_inches='tight',
        metadata={'Date': None},
      )
      plt.close(figure)


if __name__ == '__main__':
  main()
