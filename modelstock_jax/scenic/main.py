"""Run the trainer as any project of Scenic is run.

python -m modelstock_jax.scenic.main --config=... --workdir=...
"""

from collections.abc import Callable
from typing import Any

from absl import flags
import jax
from scenic import app
from scenic.model_lib import models as scenic_models
from scenic.train_lib import train_utils

from modelstock_jax.scenic import datasets
from modelstock_jax.scenic import models
from modelstock_jax.scenic import trainer

MODELS = {
  'clip_classification': models.CLIPClassificationModel,
  'vit_classification': models.ViTClassificationModel,
}


def model_class(name: str) -> Callable[..., Any]:
  """Return the model of `config.model_name`: ours, or Scenic's own.

  >>> model_class('clip_classification').__name__
  'CLIPClassificationModel'
  """
  known = {**scenic_models.ALL_MODELS, **MODELS}
  if name not in known:
    raise ValueError(
      f'config.model_name: must be one of {sorted(known)}, got {name!r}. A '
      'model of your own takes a main.py of your own, with '
      '`modelstock_jax.scenic.trainer.train` for its trainer.'
    )
  return known[name]


def main(rng: jax.Array, config: Any, workdir: str, writer: Any) -> None:
  """Train `config.model_name` on `config.dataset_name`."""
  model_cls = model_class(config.model_name)
  if config.dataset_name == datasets.NAME and 'shuffle_seed' not in config:
    # Given, so that a run which is resumed sees what it would have seen.
    config.shuffle_seed = config.rng_seed
  data_rng, rng = jax.random.split(rng)
  dataset = train_utils.get_dataset(
    config,
    data_rng,
    dataset_service_address=flags.FLAGS.dataset_service_address,
  )
  trainer.train(
    rng=rng,
    config=config,
    model_cls=model_cls,
    dataset=dataset,
    workdir=workdir,
    writer=writer,
  )


if __name__ == '__main__':
  app.run(main=main)
