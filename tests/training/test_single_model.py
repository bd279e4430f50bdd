"""One model is plain fine-tuning: its merge is itself."""

import json

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import merging
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

ALONE = {'train.epochs': 2, 'merge.num_models': 1, 'merge.every': 'end'}


@pytest.fixture(scope='module')
def alone(tiny_config, prepare_on):
  config = tiny_config(ALONE)
  return config, prepare_on(2, config)


def lines(workdir, kind):
  text = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, text) if x['kind'] == kind]


def losses(setup, number, num_models):
  """Losses of the first model in a few steps, on batches of noise."""
  models = np.arange(num_models)
  state = setup.programs.create(setup.anchor, {}, np.uint32(0), models)
  rng = np.random.default_rng(0)
  for _ in range(number):
    batch = {
      'image': rng.integers(0, 256, (2, 8, 8, 8, 1), np.uint8),
      'label': rng.integers(0, 10, (2, 8), np.int32),
    }
    batch = jax.tree.map(lambda x: x[:num_models], batch)
    batch = jax.device_put(batch, setup.placement.batch)
    state, metrics = setup.programs.train(
      state, batch, setup.anchor, setup.consts, {}
    )
    yield metrics['loss'][0]


def test_the_merge_of_one_model_is_the_model(alone, tmp_path):
  config, setup = alone
  result = loop.train(config, tmp_path, setup=setup)
  for model, merged in zip(
    jax.tree.leaves(result.models),
    jax.tree.leaves(result.merged.params),
    strict=True,
  ):
    assert merged.tobytes() == model[0].tobytes()
  for line in lines(tmp_path, 'merge'):
    assert line['mean_ratio'] == 1
    assert set(line['ratio'].values()) == {1}
    assert line['cosine'] == {}


def test_one_model_alone_is_the_first_of_two(alone, setup):
  pairs = zip(losses(alone[1], 3, 1), losses(setup, 3, 2), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_one_model_that_diverges_is_seen(alone):
  _, setup = alone
  broken = jax.tree.map(lambda x: x[None] * jnp.nan, setup.anchor)
  broken = jax.device_put(broken, setup.placement.stacked(broken))
  cosine = merging.by_path(setup.programs.merge(setup.anchor, broken).cosine)
  assert not np.isfinite(list(cosine.values())).any()


def test_one_model_has_no_strength(tiny_flags):
  flags = tiny_flags({'merge.num_models': 1, 'merge.strength': 0.5})
  with pytest.raises(ValueError, match=r'merge\.strength.*num_models=1'):
    config_lib.override(config_lib.defaults(), flags)
