"""The steps at which a run merges, evaluates and saves."""

import math
from typing import NamedTuple

from modelstock_jax.training import config as config_lib

# Merges of a run that are logged layer by layer: 10 kB and more each.
_BY_LAYER = 100


class Due(NamedTuple):
  """The work that is due after a step.

  Attributes:
    epoch: epochs that are done.
    last: True after the last step of the run.
    merge: True if the models are merged; after the last step they are not put
      back on the merge.
    evaluate: True if the merge is evaluated on the validation split.
    save: True if a checkpoint is saved.
    by_layer: True if a merge is logged layer by layer.
  """

  epoch: int
  last: bool
  merge: bool
  evaluate: bool
  save: bool
  by_layer: bool


class Clock(NamedTuple):
  """The length of a run, and when things happen in it.

  Attributes:
    steps_per_epoch: optimizer steps.
    total_steps: optimizer steps of the run; a multiple of `steps_per_epoch`.
    merge_every: 'epoch', 'end', a number of epochs, or 'never'.
    evaluate_epochs: epochs from an evaluation to the next.
    save_merges: merges (epochs, where nothing is merged) from a checkpoint to
      the next.
    save_steps: steps from a checkpoint to the next, in addition; 0 is off.
  """

  steps_per_epoch: int
  total_steps: int
  merge_every: str | int
  evaluate_epochs: int
  save_merges: int
  save_steps: int

  @property
  def merges(self) -> bool:
    """True if models are ever merged."""
    return self.merge_every != 'never'

  def due(self, step: int) -> Due:
    """Return the work that is due after a step.

    >>> clock = Clock(4, 12, merge_every=2, evaluate_epochs=1, save_merges=1,
    ...   save_steps=0)
    >>> due = clock.due(4)
    >>> due.epoch, due.merge, due.evaluate, due.save
    (1, False, True, False)
    >>> due = clock.due(8)
    >>> due.epoch, due.merge, due.evaluate, due.save
    (2, True, True, True)
    """
    epoch, rest = divmod(step, self.steps_per_epoch)
    last = step == self.total_steps
    every = self.merge_every
    period = every if isinstance(every, int) else 1
    periodic = not rest and every != 'end' and epoch % period == 0
    save = last or (periodic and epoch // period % self.save_merges == 0)
    epochs = self.total_steps // self.steps_per_epoch
    logged = math.ceil(epochs / period / _BY_LAYER) * period
    if self.save_steps and step % self.save_steps == 0:
      save = True
    return Due(
      epoch,
      last,
      merge=self.merges and (last or periodic),
      evaluate=self.merges
      and not rest
      and (last or epoch % self.evaluate_epochs == 0),
      save=save,
      by_layer=last or epoch % logged == 0,
    )


def of_config(config: config_lib.Config, steps_per_epoch: int) -> Clock:
  """Return the clock of a run.

  Args:
    config: of the run.
    steps_per_epoch: optimizer steps.
  """
  return Clock(
    steps_per_epoch,
    steps_per_epoch * config.train.epochs,
    merge_every=config.merge.every,
    evaluate_epochs=config.evaluate.every_epochs,
    save_merges=config.checkpoint.every_merges,
    save_steps=config.checkpoint.every_steps,
  )
