"""Model Stock in jax and optax alone: merged every 100 steps, inside a loop.

An anchor that learnt from 200 of scikit-learn's digits is fine-tuned on 1,000
more, twice, each time on batches of its own; the other 597 are the test.
"""

import jax
from jax import numpy as jnp
import optax
from sklearn import datasets

import modelstock_jax as ms

tx = optax.adam(5e-3)


def network(params, x):
  return jax.nn.relu(x @ params['w']) @ params['v']


@jax.jit
def train_step(params, opt_state, x, y):
  def loss(params):
    return optax.softmax_cross_entropy(network(params, x), y).mean()

  updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
  return optax.apply_updates(params, updates), opt_state


def fine_tune(anchor, stack, batches, x, y):  # leaves of the stack: [2, ...]
  def body(step, carry):
    rows = batches[step - 1]  # [2, 32], of each model its own
    stack, opt_state = jax.vmap(train_step)(*carry, x[rows], y[rows])
    return ms.merge_every(100, step, anchor, stack), opt_state

  carry = stack, jax.vmap(tx.init)(stack)
  return jax.lax.fori_loop(1, len(batches) + 1, body, carry)[0]


def main():
  digits, draw = datasets.load_digits(), jax.nn.initializers.he_normal()
  x, y = jnp.float32(digits.data / 16), jax.nn.one_hot(digits.target, 10)
  anchor = {'w': draw(jax.random.key(0), (64, 128)), 'v': jnp.zeros((128, 10))}
  opt_state = tx.init(anchor)
  for rows in jax.random.randint(jax.random.key(1), (300, 32), 0, 200):
    anchor, opt_state = train_step(anchor, opt_state, x[rows], y[rows])
  batches = jax.random.randint(jax.random.key(2), (250, 2, 32), 200, 1200)
  stack = fine_tune(anchor, ms.stack([anchor, anchor]), batches, x, y)
  merged = ms.model_stock(anchor, stack, stacked=True).params
  average, single = ms.uniform_soup(stack, stacked=True), ms.unstack(stack)[0]
  models = dict(anchor=anchor, single=single, average=average, merge=merged)
  for name, params in models.items():
    answers = network(params, x[1200:]).argmax(-1)
    print(f'{name}: {(answers == digits.target[1200:]).mean():.1%}')
  return anchor, stack, merged


if __name__ == '__main__':
  main()
