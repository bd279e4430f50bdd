import logging

import pytest

from modelstock_jax import clip
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import sharding


def test_class_names_are_put_into_a_generic_template():
  prompts = class_texts.read_prompts('class_names', ['red_fox', 'sea lion'])
  assert clip.captions(prompts) == [
    'a photo of a red fox.',
    'a photo of a sea lion.',
  ]


def test_prompts_of_other_classes_name_the_remedy():
  with pytest.raises(ValueError, match=r"Set anchor[.]prompts='class_names'"):
    class_texts.read_prompts('imagenet', ['cat', 'dog'])


def test_names_of_labels_are_logged(tiny_config, caplog):
  config = tiny_config()
  caplog.set_level(logging.INFO, 'modelstock_jax')
  anchor_lib.load(config, sharding.place())
  assert 'Labels: 0 is digit 0, 1 is digit 1,' in caplog.text
