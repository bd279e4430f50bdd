"""Model Stock on real handwritten digits: the smallest run there is.

Command: `modelstock demo` (three seeds, with one merge at the end and with
one every epoch), or `modelstock train --config=configs/digits.py
--workdir=...` for a single run.

A mini-CLIP (8x8 pixels, patches of 2, width 48, depth 3), pretrained on
captioned characters in 16 fonts, is fine-tuned on 200 of scikit-learn's
1,797 digits: 30 epochs of four steps, two models side by side.

The learning rate is the one of five at which the mean validation accuracy
of the five fine-tuned methods is highest; see experiments/README.md for the
table and its command. No test image took part in a choice.
"""

from modelstock_jax import data
from modelstock_jax.data import captions
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """Return the config of one run."""
  config = config_lib.defaults()
  config.model.embed_dim = 48
  config.model.image.update(
    image_size=8, patch_size=2, channels=1, width=48, depth=3, heads=3
  )
  config.model.text.update(
    context_length=captions.CONTEXT_LENGTH,
    vocab_size=captions.VOCAB_SIZE,
    width=32,
    depth=1,
    heads=2,
  )
  config.model.dtype = 'float32'

  config.anchor.weights = 'mini_clip'
  config.anchor.prompts = 'characters'

  config.data.dataset = 'digits'
  config.data.train = 'train[:200]'
  config.data.cache = True
  config.data.mean = (0.3,)
  config.data.std = (0.37,)

  config.train.epochs = 30
  config.train.batch_size = 50
  config.train.learning_rate = 2e-3
  config.train.warmup_steps = 12

  config.checkpoint.every_merges = 15  # an epoch is four steps
  config.checkpoint.every_steps = 0
  config.evaluate.batch_size = 200
  config.evaluate.benchmarks = ('digits', *data.SHIFTS)
  config.log.every_steps = 20

  with config.unlocked():  # see experiments/digits/pretrain.py
    config.pretrain = config_lib.section(
      steps=1000,
      batch_size=256,
      learning_rate=2e-3,
      warmup_steps=100,
      weight_decay=0.1,
      seed=0,
    )
  return config
