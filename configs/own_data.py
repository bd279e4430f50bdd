"""Fine-tuning of a CLIP on your own pictures, and their merge.

Commands, as in the guide docs/own_data.md: `modelstock data import pictures
--data_dir=prepared`, then `modelstock train --config=configs/own_data.py
--workdir=...` (`--config=own_data` in any folder).

Copy this file, or set its keys by flags. The sizes of the network are those of
`anchor.weights`, and so are the tokenizer and the mean and deviation of the
pixels if they come with them. Images are transformed as CLIP does.
All else has its default, such as two models, which are merged after each epoch.
"""

from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """Return the config of one run."""
  config = config_lib.defaults()
  config.anchor.weights = 'openai/clip-vit-base-patch32'
  config.anchor.prompts = 'class_names'
  config.data.data_dir = 'prepared'
  config.data.dataset = 'pictures'
  config.train.epochs = 5
  config.train.batch_size = 32
  config.train.learning_rate = 1e-5
  config.train.warmup_steps = 0
  config.evaluate.batch_size = 32
  return config
