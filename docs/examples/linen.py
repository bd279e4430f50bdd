"""Model Stock in Flax Linen: two TrainStates trained as one, under vmap.

An anchor that learnt from 200 of scikit-learn's digits is fine-tuned on 1,000
more, twice, each time on batches of its own; the other 597 are the test.
"""

from flax import linen as nn
from flax.training import train_state
import jax
from jax import numpy as jnp
import optax
from sklearn import datasets

import modelstock_jax as ms


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])(x)


@jax.jit
def train(params, key, images, labels):
  def step(state, key):  # on a batch of 32
    rows = jax.random.randint(key, (32,), 0, len(images))

    def loss(params):
      logits = state.apply_fn({'params': params}, images[rows])
      return optax.softmax_cross_entropy(logits, labels[rows]).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

  state = train_state.TrainState.create(
    apply_fn=Network().apply, params=params, tx=optax.adam(5e-3)
  )
  return jax.lax.scan(step, state, jax.random.split(key, 300))[0].params


def main():
  digits = datasets.load_digits()
  x, y = jnp.float32(digits.data / 16), jax.nn.one_hot(digits.target, 10)
  keys = jax.random.split(jax.random.key(0), 4)
  params = Network().init(keys[0], x)['params']
  anchor = train(params, keys[1], x[:200], y[:200])
  fine_tune = jax.vmap(train, in_axes=(None, 0, None, None))
  stack = fine_tune(anchor, keys[2:], x[200:1200], y[200:1200])
  merged = ms.model_stock(anchor, stack, stacked=True).params

  average, single = ms.uniform_soup(stack, stacked=True), ms.unstack(stack)[0]
  models = dict(anchor=anchor, single=single, average=average, merge=merged)
  for name, params in models.items():
    answers = Network().apply({'params': params}, x[1200:]).argmax(-1)
    print(f'{name}: {(answers == digits.target[1200:]).mean():.1%}')
  return anchor, stack, merged


if __name__ == '__main__':
  main()
