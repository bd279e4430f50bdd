"""Model Stock on real handwritten digits: the demo, in under a minute."""

from modelstock_jax import data
from modelstock_jax.training import config as config_lib


def get_config():
  """A mini-CLIP, fine-tuned on 200 of scikit-learn's digits."""
  config = config_lib.defaults()
  config.model.embed_dim = 48
  config.model.image.update(
    image_size=8, patch_size=2, channels=1, width=48, depth=3, heads=3
  )
  config.model.text.update(
    context_length=data.CONTEXT_LENGTH,
    vocab_size=data.VOCAB_SIZE,
    width=32,
    depth=1,
    heads=2,
  )
  config.model.dtype = 'float32'

  config.anchor.weights = 'mini_clip'

  config.data.dataset = 'digits'
  config.data.train = 'train[:200]'
  config.data.cache = True
  config.data.mean = (0.3,)
  config.data.std = (0.37,)

  config.train.epochs = 30
  config.train.batch_size = 50
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 12

  config.checkpoint.every_steps = 0
  config.checkpoint.every_merges = 15  # an epoch is four steps
  config.evaluate.batch_size = 200
  config.evaluate.every_epochs = 5
  config.evaluate.benchmarks = tuple(data.BENCHMARKS)
  config.log.every_steps = 20

  config.pretrain.steps = 1000
  config.pretrain.learning_rate = 2e-3
  return config
