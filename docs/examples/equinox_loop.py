"""Model Stock in Equinox: two modules in one, merged every 100 steps.

An anchor that learnt from 200 of scikit-learn's digits is fine-tuned on 1,000
more, twice, each time on batches of its own; the other 597 are the test.
"""

import equinox as eqx
import jax
from jax import numpy as jnp
import optax
from sklearn import datasets

import modelstock_jax as ms

tx = optax.adam(5e-3)


@eqx.filter_grad
def gradient(network, images, labels):
  logits = jax.vmap(network)(images)
  return optax.softmax_cross_entropy(logits, labels).mean()


@eqx.filter_jit
def train_step(network, opt_state, key, images, labels):
  rows = jax.random.randint(key, (32,), 0, len(images))
  grads = gradient(network, images[rows], labels[rows])
  updates, opt_state = tx.update(grads, opt_state)
  return eqx.apply_updates(network, updates), opt_state


def main():
  digits = datasets.load_digits()
  x, y = jnp.float32(digits.data / 16), jax.nn.one_hot(digits.target, 10)
  keys = jax.random.split(jax.random.key(0), (300, 4))
  anchor = eqx.nn.MLP(64, 10, 128, depth=1, key=keys[0, 0])
  opt_state = tx.init(eqx.filter(anchor, eqx.is_inexact_array))
  for key in keys[:, 1]:
    anchor, opt_state = train_step(anchor, opt_state, key, x[:200], y[:200])

  stack = ms.stack([anchor, anchor])  # a module whose arrays are [2, ...]
  opt_state = jax.vmap(tx.init)(eqx.filter(stack, eqx.is_inexact_array))
  in_axes = (eqx.if_array(0), eqx.if_array(0), 0, None, None)
  step = eqx.filter_jit(eqx.filter_vmap(train_step, in_axes=in_axes))
  for i, key in enumerate(keys[:250, 2:], start=1):
    stack, opt_state = step(stack, opt_state, key, x[200:1200], y[200:1200])
    stack = ms.merge_every(100, i, anchor, stack)
  merged = ms.model_stock(anchor, stack, stacked=True).params

  average, single = ms.uniform_soup(stack, stacked=True), ms.unstack(stack)[0]
  models = dict(anchor=anchor, single=single, average=average, merge=merged)
  for name, network in models.items():
    answers = jax.vmap(network)(x[1200:]).argmax(-1)
    print(f'{name}: {(answers == digits.target[1200:]).mean():.1%}')
  return anchor, stack, merged


if __name__ == '__main__':
  main()
