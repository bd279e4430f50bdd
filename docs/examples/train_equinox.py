"""Train your own Equinox network: regression, with a score of its own.

The arrays of the network are the params; the rest stays in the closure.
"""

import equinox as eqx
import jax
from jax import numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from modelstock_jax import data
from modelstock_jax import training


def create(key):
  network = eqx.nn.MLP(10, 'scalar', width_size=64, depth=2, key=key)
  return eqx.partition(network, eqx.is_inexact_array)


def get_task(config):
  _, static = create(jax.random.key(0))

  def init(key):
    return create(key)[0], {}

  def errors(params, batch):
    network = eqx.combine(params, static)
    return jnp.square(jax.vmap(network)(batch['x']) - batch['y'])

  def loss(params, variables, batch, key, anchor, consts):
    return errors(params, batch).mean(), ({}, variables)

  def score(params, variables, batch):
    return {'minus_error': -errors(params, batch)}

  example = {
    'x': jax.ShapeDtypeStruct((10,), jnp.float32),
    'y': jax.ShapeDtypeStruct((), jnp.float32),
  }
  return training.Task(init, loss, score, example, select='minus_error')


def get_optimizer(config):
  return training.from_optax(optax.adam(1.0))


def get_source(config):
  x, y = datasets.load_diabetes(return_X_y=True)
  x, y = np.float32(x / x.std()), np.float32((y - y.mean()) / y.std())
  return training.Sources(
    data.ArraySource('diabetes', {'x': x[:320], 'y': y[:320]}),
    data.ArraySource('held-out diabetes', {'x': x[320:], 'y': y[320:]}),
  )


def get_config():
  config = training.defaults()
  config.train.update(
    epochs=4, batch_size=32, learning_rate=3e-3, warmup_steps=10
  )
  config.evaluate.batch_size = 64
  return config


def main(workdir='runs/equinox'):
  config = get_config()
  task, sources = get_task(config), get_source(config)
  result = training.train(task, get_optimizer(config), sources, config, workdir)
  held_out = sources.validation.take(np.arange(len(sources.validation)))
  scores = task.score(result.merged.params, result.variables, held_out)
  print(f'mean squared error: {-np.mean(scores["minus_error"]):.2f}')
  return result


if __name__ == '__main__':
  main()
