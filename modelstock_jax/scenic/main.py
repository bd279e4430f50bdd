"""Run the trainer as any project of Scenic is run.

python -m modelstock_jax.scenic.main --config=... --workdir=...
"""

from typing import Any

from absl import flags
import jax
from scenic import app
from scenic.model_lib import models as scenic_models
from scenic.train_lib import train_utils

from modelstock_jax.scenic import datasets  # noqa: F401, registers its dataset
from modelstock_jax.scenic import models
from modelstock_jax.scenic import trainer

scenic_models.ALL_MODELS.update(
  clip_classification=models.CLIPClassificationModel,
  vit_classification=models.ViTClassificationModel,
)


def main(rng: jax.Array, config: Any, workdir: str, writer: Any) -> None:
  """Train `config.model_name` on `config.dataset_name`."""
  data_rng, rng = jax.random.split(rng)
  address = flags.FLAGS.dataset_service_address
  trainer.train(
    rng=rng,
    config=config,
    model_cls=scenic_models.get_model_cls(config.model_name),
    dataset=train_utils.get_dataset(
      config, data_rng, dataset_service_address=address
    ),
    workdir=workdir,
    writer=writer,
  )


if __name__ == '__main__':
  app.run(main=main)
