"""The methods that merge files."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from modelstock_jax.files import match
from modelstock_jax.files import names as names_lib
from modelstock_jax.formats import text
from modelstock_jax.merging import formula

# Of each method: the least and the largest number of models, the settings, and
# the paper.
METHODS = {
  'model_stock': (2, math.inf, (), '2403.19522'),
  'soup': (1, math.inf, ('weights', 'decay'), '2203.05482'),
  'wise_ft': (1, 1, ('alphas',), '2109.01903'),
  'lines': (1, math.inf, ('alphas', 'beta'), '2410.17146'),
}
# Exponents of the share of a run that is before a checkpoint.
DECAYS = {'linear': 1.0, 'sqrt': 0.5}
_ALPHA = {'wise_ft': 0.5, 'lines': 0.0}
_MOST = 1000


def takes(name: str) -> str:
  """Return what a method takes, in words.

  >>> takes('wise_ft')
  'the anchor and one model'
  """
  least, most, *_ = METHODS[name]
  models = 'at least two models' if least > 1 else 'at least one model'
  anchor = 'the anchor and ' * (name != 'soup')
  return f'{anchor}{models if most > 1 else "one model"}'


@dataclasses.dataclass(frozen=True)
class Method:
  """A method that merges N models, and its settings.

  Attributes:
    name: 'model_stock'; 'soup', the mean of the models; 'wise_ft', the way from
      the anchor to one model; 'lines' (LiNeS), the mean of the models with its
      displacement scaled by depth.
    weights: N numbers, the weights of a soup; None: all are equal.
    decay: 'linear' or 'sqrt': the models of a soup are checkpoints of a run at
      a constant learning rate, in their order, and have the weights with which
      their mean has the updates of a rate that decays: c_k = g((k + 1) / N) -
      g(k / N), g(x) = x or sqrt(x) (arXiv:2507.17634, with f = 1 - g).
    alphas: of WiSE-FT the weight of the model (0.5), of LiNeS the scale of the
      first block and outside of blocks (0). Several make an output each.
    beta: of LiNeS, increase of the scale to the last block; None: 1 - alpha.

  Raises:
    ValueError: settings are wrong, or of another method; all are named.

  >>> Method('soup', decay='sqrt').weigh(4)[0]
  0.5
  >>> Method('wise_ft', alphas=[0.3, 0.5]).outputs()
  {'alpha_0.3/': 0.3, 'alpha_0.5/': 0.5}
  """

  name: str = 'model_stock'
  weights: Sequence[float] | None = None
  decay: str | None = None
  alphas: Sequence[float] | None = None
  beta: float | None = None

  def __post_init__(self) -> None:
    weights, alphas = self.weights or [1], self.alphas or [0]
    low, high = (0, 1) if self.name == 'wise_ft' else (-_MOST, _MOST)
    inside = all(low <= alpha <= high for alpha in alphas)
    once = len({*map('{:g}'.format, alphas)}) == len(alphas)
    shares = min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6
    rules = {
      'name': (self.name in METHODS, f'one of {", ".join(METHODS)}'),
      'weights': (shares, 'numbers >= 0 of sum 1'),
      'decay': (self.decay in (None, *DECAYS), f'one of {", ".join(DECAYS)}'),
      'alphas': (inside and once, f'numbers from {low} to {high}, each once'),
      'beta': (abs(self.beta or 0) <= _MOST, f'at most {_MOST}'),
    }
    problems = []
    for key, (valid, rule) in rules.items():
      users = [name for name, known in METHODS.items() if key in known[2]]
      if not valid:
        shown = text.shown(getattr(self, key))
        problems.append(f'{key}: is {shown}, must be {rule}.')
      elif users and getattr(self, key) is not None and self.name not in users:
        problems.append(f'{key}: is of {" and ".join(users)}, not {self.name}.')
    if self.weights and self.decay:
      problems.append('weights, decay: give one of them.')
    text.raise_problems('The method has wrong settings.', problems)

  def weigh(self, count: int) -> Sequence[float] | None:
    """Return the weights of `count` models; None: all are equal."""
    if self.decay is None:
      return self.weights
    return np.diff(np.linspace(0, 1, count + 1) ** DECAYS[self.decay]).tolist()

  def outputs(self) -> dict[str, float]:
    """Return the alpha of each output, by its folder; '' if there is one."""
    alphas = self.alphas or [_ALPHA.get(self.name, 1.0)]
    if len(alphas) == 1:
      return {'': alphas[0]}
    return {f'alpha_{alpha:g}/': alpha for alpha in alphas}

  def scales(
    self, tensors: Mapping[str, match.Matched]
  ) -> dict[str, np.ndarray] | None:
    """Return the scale of the displacement of each tensor, for each output.

    Args:
      tensors: tensors by name. Of one with an axis of stacked layers, each
        index is a block.

    Returns:
      float64[K] by name, or for LiNeS float64[K, shape[axis]] of a tensor with
      an axis; None for Model Stock, whose weights tell.

    Raises:
      ValueError: the names have fewer than two blocks, for LiNeS.
    """
    if self.name == 'model_stock':
      return None
    alphas = np.array([*self.outputs().values()])
    if self.name != 'lines':
      return dict.fromkeys(tensors, alphas)
    depths = {
      name: names_lib.layer_block(name)
      if tensor.axis is None
      else np.arange(tensor.shape[tensor.axis])[:, None]
      for name, tensor in tensors.items()
    }
    last = max((np.max(x) for x in depths.values() if x is not None), default=0)
    if last < 1:
      raise ValueError(
        'lines: takes two blocks or more, whose numbers stand in the names of '
        'tensors, as in layers.1.weight, or which are stacked: --stacked. '
        f'There are {text.listed(tensors)}.'
      )
    beta = 1 - alphas if self.beta is None else self.beta
    return {
      name: formula.depth_scale(alphas, beta, depth, last).T
      for name, depth in depths.items()
    }
