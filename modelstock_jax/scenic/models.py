"""Classification models for Scenic's trainers, of Scenic's own networks."""

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
from scenic.model_lib.base_models import classification_model
from scenic.projects.baselines import vit
from scenic.projects.baselines.clip import layers
from scenic.projects.baselines.clip import model as scenic_clip

from modelstock_jax.clip import heads


class ViTClassificationModel(classification_model.ClassificationModel):
  """Scenic's vision transformer under a softmax.

  Scenic itself has it with the sigmoids of many labels. The config is that of
  `vit.ViTMultiLabelClassificationModel`.
  """

  _multi_label = vit.ViTMultiLabelClassificationModel
  build_flax_model = _multi_label.build_flax_model
  default_flax_model_config = _multi_label.default_flax_model_config


class CLIPClassificationModel(classification_model.ClassificationModel):
  """The image tower of Scenic's CLIP, with a head on its embeddings.

  `config.model` holds arguments of `layers.VisionTransformer`; those that are
  missing are taken from 'variant', one of Scenic's CLIPs, such as 'vit_b32'.
  The head is zero until it is read with an anchor (see `options.defaults`).
  """

  def build_flax_model(self) -> nn.Module:
    """Return the tower with its head."""
    num_classes = self.dataset_meta_data['num_classes']
    return CLIPClassifier(_tower(self.config.model), num_classes)


class CLIPClassifier(nn.Module):
  """Logits of the image embeddings of Scenic's CLIP.

  Its params are {'visual': as in Scenic's CLIP, 'head': {'kernel': [D, K],
  'bias': [K]}}.
  """

  visual: layers.VisionTransformer
  num_classes: int

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool = False, debug: bool = False
  ) -> jax.Array:
    """Return logits float32[B, K] of normalised images [B, H, W, 3]."""
    del train, debug  # without dropout or running statistics
    embedding, _ = self.visual(x)
    shape = (embedding.shape[-1], self.num_classes)
    head = self.param(
      'head',
      lambda key: {'kernel': jnp.zeros(shape), 'bias': jnp.zeros(shape[1:])},
    )
    return heads.classify(head, embedding)


def _tower(config: ml_collections.ConfigDict) -> layers.VisionTransformer:
  """Return the tower of `config.model`."""
  sizes = dict(config)
  variant = sizes.pop('variant', None)
  if variant is not None:
    known = [name for name in scenic_clip.CONFIGS if name.startswith('vit')]
    if variant not in known:
      raise ValueError(
        f'config.model.variant: must be one of {known}, got {variant!r}.'
      )
    clip = scenic_clip.CONFIGS[variant]
    sizes = {
      'patch_size': clip['vision_patch_size'],
      'features': clip['vision_features'],
      'num_layers': clip['vision_num_layers'],
      'num_heads': clip['vision_features'] // 64,  # as Scenic's CLIP has it
      'out_features': clip['embed_dim'],
    } | sizes
  return layers.VisionTransformer(**sizes)
