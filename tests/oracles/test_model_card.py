"""The model card of a merged folder, read by huggingface_hub."""

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files

pytestmark = pytest.mark.oracle


def test_the_hub_reads_the_card(tmp_path):
  paths = []
  for number, name in enumerate(('base', 'one', 'two')):
    (tmp_path / name).mkdir()
    weight = np.eye(3, dtype=np.float32)[number]
    safetensors.numpy.save_file(
      {'w': weight}, tmp_path / name / 'model.safetensors'
    )
    (tmp_path / name / 'config.json').write_text('{"model_type": "bert"}')
    paths.append(tmp_path / name)
  files.merge(paths[0], paths[1:], tmp_path / 'out')
  card = huggingface_hub.ModelCard.load(tmp_path / 'out/README.md')
  assert card.data.base_model == ['base', 'one', 'two']
  assert card.data.library_name == 'transformers'
  assert card.data.tags == ['merge', 'model_stock']
  assert '# Merge of one, two' in card.text
