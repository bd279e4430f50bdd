"""A linear probe by gradient descent: the head alone is trained.

It starts from the logistic regression on frozen embeddings that
`anchor.head='linear_probe'` fits.
"""

import jax

from modelstock_jax.clip import flops
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import task as task_lib


def configure(config: config_lib.ConfigDict) -> config_lib.ConfigDict:
  """Set what a linear probe is, in the config of a run; return it."""
  config.anchor.head = 'linear_probe'
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config


def task(config: config_lib.ConfigDict) -> task_lib.Task:
  """Return classification with a frozen tower: its gradient is 0."""
  num_classes = clip_task.count_classes(config.data)
  plain = clip_task.task(config, num_classes)

  def loss(params, *arguments):
    tower = jax.lax.stop_gradient(params['image'])
    return plain.loss({**params, 'image': tower}, *arguments)

  sizes = config.model.network()
  # No gradient but that of the head's kernel.
  head = 2 * sizes.embed_dim * num_classes
  total = flops.forward(sizes, num_classes) + head
  return plain._replace(loss=loss, flops=total)


def optimizer(config: config_lib.ConfigDict) -> task_lib.Optimizer:
  """Return an optimizer of the head: the tower has no moments and no decay."""
  return optimizer_lib.only('head', clip_task.optimizer(config.train))
