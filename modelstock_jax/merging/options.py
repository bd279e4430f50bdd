"""The options of a merge: standard library only, so nobody waits for jax."""

import dataclasses
import reprlib
from typing import Literal
from typing import get_args

Unit = Literal['layer', 'filter', 'model']
Average = Literal['cosine', 'angle']
UNITS: tuple[Unit, ...] = get_args(Unit)
AVERAGES: tuple[Average, ...] = get_args(Average)
Clip = bool | Literal['authors', 'mergekit']
# What a merge during training does to the optimizers.
OptState = Literal['keep', 'average', 'reset']


@dataclasses.dataclass(frozen=True)
class StockOptions:
  """Options of a Model Stock merge, the same for trees, files and runs.

  Attributes:
    unit: what shares a cosine: a 'layer'; a 'filter', each slice of a leaf
      along its output axis; the 'model'.
    average: for N > 2, the mean of the pairwise 'cosine's or of the 'angle's.
    clip: clip the cosine to [0, 1] before it becomes a ratio. Or, for parity,
      take the cosine of other code, in [-1, 1]: that of the 'authors' notebook,
      d_i.d_j / (|d_i| |d_j| + 1e-8), or of 'mergekit', d_i.d_j / max(|d_i|
      |d_j|, 1e-6).

  Raises:
    ValueError: if a value is not one of the choices; all are named at once.

  >>> StockOptions(unit='filter')
  StockOptions(unit='filter', average='cosine', clip=True)
  """

  unit: Unit = 'layer'
  average: Average = 'cosine'
  clip: Clip = True

  def __post_init__(self) -> None:
    clips = (True, False, 'authors', 'mergekit')
    choices = {'unit': UNITS, 'average': AVERAGES, 'clip': clips}
    problems = [
      f'{name}: must be one of {known}, got {reprlib.repr(value)}.'
      for name, known in choices.items()
      # Nor 1, which is equal to True.
      if type(value := getattr(self, name)) not in map(type, known)
      or value not in known
    ]
    if problems:
      raise ValueError('\n'.join(problems))
