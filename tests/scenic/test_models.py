"""The models that are registered by name, and their configs."""

import jax
import ml_collections
import numpy as np
import pytest

pytestmark = pytest.mark.oracle

META = {'num_classes': 5, 'target_is_onehot': False}


@pytest.mark.parametrize(
  'name', ['ViTClassificationModel', 'CLIPClassificationModel']
)
def test_tiny_models(scenic, name):
  sizes = dict(patch_size=4, features=16, num_layers=1, num_heads=2)
  clip = ml_collections.ConfigDict({'model': {**sizes, 'out_features': 8}})
  config = clip if name.startswith('CLIP') else None  # Scenic's own default
  model = getattr(scenic.models, name)(config, META)
  x = np.ones((2, 8, 8, 3), np.float32)
  variables = model.flax_model.init(jax.random.PRNGKey(0), x, train=False)
  logits = model.flax_model.apply(variables, x, train=True)
  assert logits.shape == (2, 5)
  batch = {'inputs': x, 'label': np.array([0, 1])}
  # Heads are zero: the loss is that of five equal classes.
  loss = model.loss_function(logits, batch, variables['params'])
  assert float(loss) == pytest.approx(np.log(5), rel=1e-6)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'variant': 'resnet_50'}, "must be one of .*got 'resnet_50'"),
    ({'patch_size': 4}, 'missing .* required .*features'),
    ({'variant': 'vit_b32', 'width': 3}, "unexpected .* 'width'"),
  ],
)
def test_sizes_that_cannot_be(scenic, sizes, message):
  config = ml_collections.ConfigDict({'model': sizes})
  with pytest.raises((ValueError, TypeError), match=message):
    scenic.models.CLIPClassificationModel(config, META)
