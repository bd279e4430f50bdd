"""Train your own Flax NNX network: a language model on bytes of text.

The text is Python's own help; the model predicts each next byte of 32.
"""

import functools
from pydoc_data import topics

from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import optax

from modelstock_jax import data
from modelstock_jax import training

LENGTH, WIDTH = 32, 32


class Network(nnx.Module):
  def __init__(self, rngs):
    linear = functools.partial(nnx.Linear, rngs=rngs)
    self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
    self.place = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
    self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
    self.head = linear(WIDTH, 256)

  def __call__(self, text):
    x = self.embed(text) + self.place(jnp.arange(text.shape[-1]))[None]
    q, k, v = jnp.split(self.qkv(self.norm(x))[:, :, None], 3, axis=-1)
    heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(heads[:, :, 0])
    return self.head(x + self.down(nnx.gelu(self.up(x))))


def get_task(config):
  graph = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))

  def init(key):
    return nnx.to_pure_dict(nnx.state(Network(nnx.Rngs(key)))), {}

  def predict(params, batch):
    text = jnp.int32(batch['text'])
    return nnx.merge(graph, nnx.State(params))(text[:, :-1]), text[:, 1:]

  def loss(params, variables, batch, key, anchor, consts):
    logits, text = predict(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text)
    return losses.mean(), ({}, variables)

  def score(params, variables, batch):
    logits, text = predict(params, batch)
    return {'accuracy': jnp.float32(logits.argmax(-1) == text).mean(-1)}

  example = {'text': jax.ShapeDtypeStruct((LENGTH + 1,), jnp.uint8)}
  return training.Task(init, loss, score, example)


def get_optimizer(config):
  return training.from_optax(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0))
  )


def get_source(config):
  text = '\n'.join(topics.topics.values()).encode()[: 1280 * (LENGTH + 1)]
  rows = np.frombuffer(text, np.uint8).reshape(-1, LENGTH + 1)
  return training.Sources(
    data.ArraySource('help', {'text': rows[:1024]}),
    data.ArraySource('held-out help', {'text': rows[1024:]}),
  )


def get_config():
  config = training.defaults()
  config.train.update(
    epochs=2, batch_size=32, learning_rate=1e-2, warmup_steps=10
  )
  config.evaluate.batch_size = 64
  return config


def main(workdir='runs/nnx'):
  config = get_config()
  task, sources = get_task(config), get_source(config)
  result = training.train(task, get_optimizer(config), sources, config, workdir)
  held_out = sources.validation.take(np.arange(len(sources.validation)))
  scores = task.score(result.merged.params, result.variables, held_out)
  print(f'accuracy of the next byte: {np.mean(scores["accuracy"]):.1%}')
  return result


if __name__ == '__main__':
  main()
