"""Model Stock in Haiku: a transformed function, its parameters stacked.

An anchor that learnt from 200 of scikit-learn's digits is fine-tuned on 1,000
more, twice, each time on batches of its own; the other 597 are the test.
"""

import haiku as hk
import jax
from jax import numpy as jnp
import optax
from sklearn import datasets

import modelstock_jax as ms


@hk.without_apply_rng
@hk.transform
def network(x):
  return hk.nets.MLP([128, 10])(x)


def loss(params, x, y):
  return optax.softmax_cross_entropy(network.apply(params, x), y).mean()


@jax.jit
def train(params, key, images, labels):
  tx = optax.adam(5e-3)

  def step(carry, key):  # on a batch of 32
    params, opt_state = carry
    rows = jax.random.randint(key, (32,), 0, len(images))
    grads = jax.grad(loss)(params, images[rows], labels[rows])
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  carry = params, tx.init(params)
  return jax.lax.scan(step, carry, jax.random.split(key, 300))[0][0]


def main():
  digits = datasets.load_digits()
  x, y = jnp.float32(digits.data / 16), jax.nn.one_hot(digits.target, 10)
  keys = jax.random.split(jax.random.key(0), 4)
  anchor = train(network.init(keys[0], x), keys[1], x[:200], y[:200])
  fine_tune = jax.vmap(train, in_axes=(None, 0, None, None))
  stack = fine_tune(anchor, keys[2:], x[200:1200], y[200:1200])
  merged = ms.model_stock(anchor, stack, stacked=True).params

  average, single = ms.uniform_soup(stack, stacked=True), ms.unstack(stack)[0]
  models = dict(anchor=anchor, single=single, average=average, merge=merged)
  for name, params in models.items():
    answers = network.apply(params, x[1200:]).argmax(-1)
    print(f'{name}: {(answers == digits.target[1200:]).mean():.1%}')
  return anchor, stack, merged


if __name__ == '__main__':
  main()
