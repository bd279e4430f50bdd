import dataclasses

import pytest

from modelstock_jax import clip


def vision(**changes):
  values = {
    'image_size': 8,
    'patch_size': 2,
    'width': 48,
    'depth': 3,
    'heads': 3,
    'channels': 1,
  }
  return clip.VisionConfig(**values | changes)


def text(**changes):
  values = {
    'context_length': 16,
    'vocab_size': 64,
    'width': 48,
    'depth': 2,
    'heads': 3,
  }
  return clip.TextConfig(**values | changes)


@pytest.mark.parametrize(
  ('make', 'changes', 'message'),
  [
    (vision, {'patch_size': 3}, 'patch_size=3 does not divide image_size=8'),
    (vision, {'heads': 5}, 'heads=5 does not divide width=48'),
    (vision, {'depth': 0}, 'depth=0 must be an integer from 1'),
    (vision, {'width': 48.0}, r'width=48\.0 must be an integer from 1'),
    (vision, {'channels': True}, 'channels=True must be an integer from 1'),
    (text, {'heads': 7}, 'heads=7 does not divide width=48'),
    (text, {'vocab_size': -1}, 'vocab_size=-1 must be an integer from 1'),
    (text, {'context_length': None}, 'context_length=None must be an int'),
  ],
)
def test_impossible_tower(make, changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_every_problem_is_listed_at_once():
  with pytest.raises(ValueError, match=r'patch_size=3 .*; heads=5 '):
    vision(patch_size=3, heads=5)
  with pytest.raises(ValueError, match=r'depth=0 .*; heads=0 '):
    text(depth=0, heads=0)


def test_clip_config_checks_its_parts():
  with pytest.raises(ValueError, match=r"embed_dim=0 .*activation='relu'"):
    clip.CLIPConfig(0, vision(), text(), 'relu')  # pyright: ignore[reportArgumentType]


def test_configs_are_frozen_values():
  assert vision() == vision()
  assert hash(vision()) == hash(vision())
  with pytest.raises(dataclasses.FrozenInstanceError):
    vision().width = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_tokens_of_the_published_sizes():
  # Grids of 7, 16, ... patches and the class token, as in the CLIP paper.
  tokens = {name: size.vision.tokens for name, size in clip.SIZES.items()}
  assert tokens == {
    'ViT-B/32': 7 * 7 + 1,
    'ViT-B/16': 14 * 14 + 1,
    'ViT-L/14': 16 * 16 + 1,
    'ViT-L/14@336': 24 * 24 + 1,
  }
