"""The options of a merge: standard library only, so nobody waits for jax."""

import dataclasses
import reprlib
from typing import Literal
from typing import get_args

Unit = Literal['layer', 'filter', 'model']
Average = Literal['cosine', 'angle']
UNITS: tuple[Unit, ...] = get_args(Unit)
AVERAGES: tuple[Average, ...] = get_args(Average)


@dataclasses.dataclass(frozen=True)
class StockOptions:
  """Options of a Model Stock merge, the same for trees, files and runs.

  Attributes:
    unit: what shares a cosine: a 'layer'; a 'filter', each slice of a leaf
      along its output axis; the 'model'.
    average: for N > 2, the mean of the pairwise 'cosine's or of the 'angle's.
    clip: clip the cosine to [0, 1] before it becomes a ratio.

  Raises:
    ValueError: if a value is not one of the choices; all are named at once.

  >>> StockOptions(unit='filter')
  StockOptions(unit='filter', average='cosine', clip=True)
  """

  unit: Unit = 'layer'
  average: Average = 'cosine'
  clip: bool = True

  def __post_init__(self) -> None:
    choices = {'unit': UNITS, 'average': AVERAGES, 'clip': (True, False)}
    problems = [
      f'{name}: must be one of {known}, got {reprlib.repr(value)}.'
      for name, known in choices.items()
      if not isinstance(value := getattr(self, name), type(known[0]))
      or value not in known
    ]
    if problems:
      raise ValueError('\n'.join(problems))
