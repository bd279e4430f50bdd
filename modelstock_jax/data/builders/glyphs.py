"""36 characters in 16 fonts, as TFDS: what the demo's anchor learns from."""

import tensorflow_datasets as tfds

from modelstock_jax.data.builders import fonts


class Glyphs(tfds.core.GeneratorBasedBuilder):
  """32x32 grey characters 0-9 and A-Z, one of each per font."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'The digits and capital letters drawn white on black, 30 pixels '
        'high, in the DejaVu and STIX fonts that ship with matplotlib.'
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(fonts.SIZE, fonts.SIZE, 1), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=list(fonts.CHARACTERS)),
          'font': tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for turn, font in enumerate(fonts.TRAIN_FONTS):
      for label, character in enumerate(fonts.CHARACTERS):
        yield (
          turn * len(fonts.CHARACTERS) + label,
          {
            'image': fonts.draw(font, character)[..., None],
            'label': label,
            'font': font,
          },
        )
