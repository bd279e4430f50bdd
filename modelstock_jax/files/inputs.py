"""The checkpoints of a merge, read and named alike."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import pathlib

from modelstock_jax.files import axes
from modelstock_jax.files import lora
from modelstock_jax.files import match
from modelstock_jax.formats import detect
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

AnchorOfRuns = Callable[
  [pathlib.Path, list[pathlib.Path]], Mapping[str, tensors_lib.Tensor]
]


def read(
  anchor: text.PathLike | None,
  models: Sequence[text.PathLike],
  select: str | None,
  dense: bool,
) -> list[detect.Checkpoint]:
  """Find the tensors of the anchor, if there is one, and of all models."""
  if anchor is None:
    base, *checkpoints = [detect.read(path, select) for path in models]
  else:
    base, *checkpoints = lora.read(anchor, models, select, dense)
  replicas = (axes.replicas(model, base) for model in checkpoints)
  return [base, *itertools.chain(*replicas)]


def alike(
  checkpoints: Sequence[detect.Checkpoint],
  anchor_of_runs: AnchorOfRuns | None,
) -> tuple[list[detect.Checkpoint], bool]:
  """Name the tensors of all as the anchor does; complete the anchor of runs.

  Args:
    checkpoints: the anchor, then the models.
    anchor_of_runs: see `merge`.

  Returns:
    The checkpoints, and True if the models are runs of this library.
  """
  anchor, *models = checkpoints
  of_runs = all('run' in c.metadata and 'model' in c.metadata for c in models)
  names = models[0].tensors
  lacks_head = 'head/kernel' in names and 'head/kernel' not in anchor.tensors
  if of_runs and lacks_head and anchor_of_runs is not None:
    made = anchor_of_runs(anchor.path, [model.path for model in models])
    anchor = anchor._replace(
      kind='run',
      tensors={name: made[name] for name in names if name in made},
      metadata=models[0].metadata,
    )
  named = [match.by_names_of(anchor, model) for model in models]
  return [anchor, *named], of_runs
