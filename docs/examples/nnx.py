"""Model Stock in Flax NNX: split modules, merge their states, join them again.

An anchor that learnt from 200 of scikit-learn's digits is fine-tuned on 1,000
more, twice, each time on batches of its own; the other 597 are the test.
"""

from flax import nnx
import jax
from jax import numpy as jnp
import optax
from sklearn import datasets

import modelstock_jax as ms


def loss(network, images, labels):
  return optax.softmax_cross_entropy(network(images), labels).mean()


@jax.jit
def train(graph, params, key, images, labels):
  def step(states, key):  # on a batch of 32
    network, optimizer = nnx.merge(graphs, states)
    rows = jax.random.randint(key, (32,), 0, len(images))
    grads = nnx.grad(loss)(network, images[rows], labels[rows])
    optimizer.update(network, grads)
    return nnx.state((network, optimizer)), None

  network = nnx.merge(graph, params)
  optimizer = nnx.Optimizer(network, optax.adam(5e-3), wrt=nnx.Param)
  graphs, states = nnx.split((network, optimizer))
  states, _ = jax.lax.scan(step, states, jax.random.split(key, 300))
  return nnx.state(nnx.merge(graphs, states)[0])


def main():
  digits, rngs = datasets.load_digits(), nnx.Rngs(0)
  x, y = jnp.float32(digits.data / 16), jax.nn.one_hot(digits.target, 10)
  layers = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)
  graph, params = nnx.split(nnx.Sequential(layers[0], nnx.relu, layers[1]))
  keys = jax.random.split(jax.random.key(0), 3)
  anchor = train(graph, params, keys[0], x[:200], y[:200])
  fine_tune = jax.vmap(train, in_axes=(None, None, 0, None, None))
  stack = fine_tune(graph, anchor, keys[1:], x[200:1200], y[200:1200])
  merged = ms.model_stock(anchor, stack, stacked=True).params

  average, single = ms.uniform_soup(stack, stacked=True), ms.unstack(stack)[0]
  models = dict(anchor=anchor, single=single, average=average, merge=merged)
  for name, params in models.items():
    answers = nnx.merge(graph, params)(x[1200:]).argmax(-1)
    print(f'{name}: {(answers == digits.target[1200:]).mean():.1%}')
  return anchor, stack, merged


if __name__ == '__main__':
  main()
