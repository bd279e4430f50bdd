"""Train your own Flax Linen network: BatchNorm and dropout, on digits.

The running statistics are the task's variables; dropout draws from the key.
"""

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from modelstock_jax import data
from modelstock_jax import training


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Dense(64)(x))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(10)(x)


def get_task(config):
  def init(key):
    variables = Network().init(key, jnp.zeros((1, 64)), train=False)
    return variables.pop('params'), variables

  def loss(params, variables, batch, key, anchor, consts):
    logits, variables = Network().apply(
      {'params': params, **variables},
      batch['x'],
      train=True,
      rngs={'dropout': key},
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return losses.mean(), ({}, variables)

  def score(params, variables, batch):
    both = {'params': params, **variables}
    answers = Network().apply(both, batch['x'], train=False).argmax(-1)
    return {'accuracy': jnp.float32(answers == batch['label'])}

  example = {
    'x': jax.ShapeDtypeStruct((64,), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }
  return training.Task(init, loss, score, example)


def get_optimizer(config):
  return training.from_optax(optax.adamw(1.0, weight_decay=0.01))


def get_source(config):
  x, label = datasets.load_digits(return_X_y=True)
  arrays = {'x': np.float32(x / 16), 'label': np.int32(label)}
  train, held_out = (
    data.ArraySource(name, {key: a[rows] for key, a in arrays.items()})
    for name, rows in [
      ('digits', slice(1200)),
      ('held-out digits', slice(1200, None)),
    ]
  )
  return training.Sources(train, held_out)


def get_config():
  config = training.defaults()
  config.train.update(
    epochs=4, batch_size=60, learning_rate=1e-2, warmup_steps=10
  )
  config.evaluate.batch_size = 200
  return config


def main(workdir='runs/linen'):
  config = get_config()
  task, sources = get_task(config), get_source(config)
  result = training.train(task, get_optimizer(config), sources, config, workdir)
  held_out = sources.validation.take(np.arange(len(sources.validation)))
  scores = task.score(result.merged.params, result.variables, held_out)
  print(f'accuracy: {np.mean(scores["accuracy"]):.1%}')
  return result


if __name__ == '__main__':
  main()
