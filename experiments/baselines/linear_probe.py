"""A linear probe by gradient descent: the head alone is trained.

Commands: `modelstock train --config=experiments/baselines/linear_probe.py
--workdir=...` on handwritten digits; on ImageNet with CLIP ViT-B/16 `modelstock
train --config=experiments/baselines/linear_probe.py:clip_vit_b16 --workdir=...
--config.data.data_dir=...`. Then `modelstock evaluate --workdir=...`, with the
same `--config`.

It starts from the logistic regression on frozen embeddings that
`anchor.head='linear_probe'` fits; gradient descent continues from there with
the tower frozen. Everything else is that of `configs/digits.py` or
`configs/clip_vit_b16.py`.

Expected on ImageNet are the paper's numbers: top-1 accuracy in per cent on
ImageNet (IN), on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  LP             79.7     48.1     71.5   52.4   27.8    40.5

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made. ImageNet: not yet run.
"""

import jax
import recipes

from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import task as task_lib


def get_config(name: str = 'digits') -> config_lib.ConfigDict:
  """Return the config of one run, on the data of a recipe."""
  config = recipes.get_config(name)
  config.anchor.head = 'linear_probe'
  config.merge.num_models = 1
  return config


def get_task(config: config_lib.ConfigDict) -> task_lib.Task:
  """Return classification with a frozen tower: its gradient is 0."""
  plain = clip_task.task(config)

  def loss(params, *arguments):
    tower = jax.lax.stop_gradient(params['image'])
    return plain.loss({**params, 'image': tower}, *arguments)

  return plain._replace(loss=loss, flops=0)  # not counted


def get_optimizer(config: config_lib.ConfigDict) -> task_lib.Optimizer:
  """Return an optimizer of the head: the tower has no moments and no decay."""
  return optimizer_lib.only('head', clip_task.optimizer(config))
