import numpy as np
import pytest

from modelstock_jax.data import captions
from modelstock_jax.data import sources

NAMES = [captions.describe(name) for name in sources.class_names('glyphs')]


def test_tokens_of_all_captions():
  assert len(captions.TEMPLATES) >= 8
  rows = captions.tokenize(
    [template.format(name) for name in NAMES for template in captions.TEMPLATES]
  )
  assert rows.shape == (36 * len(captions.TEMPLATES), captions.CONTEXT_LENGTH)
  assert rows.dtype == np.int32
  assert rows.min() == 0
  assert rows.max() == captions.VOCAB_SIZE - 1

  end = rows.argmax(-1)
  assert len(np.unique(rows, axis=0)) == len(rows)
  for row, place in zip(rows, end, strict=True):
    assert (row[: place + 1] > 0).all()
    assert (row[place + 1 :] == 0).all()
    assert (row == captions.VOCAB_SIZE - 1).sum() == 1  # one end
    assert row[0] == captions.VOCAB_SIZE - 2
    assert (row == captions.VOCAB_SIZE - 2).sum() == 1  # one start
  # The longest fills the context, and every id is some caption's.
  assert end.max() == captions.CONTEXT_LENGTH - 1
  np.testing.assert_array_equal(np.unique(rows), np.arange(captions.VOCAB_SIZE))


def test_tokens_follow_the_words():
  one, two = captions.tokenize(['a photo of the digit 7', 'the digit 7'])
  np.testing.assert_array_equal(one[4:8], two[1:5])
  # The letter is another word than the article.
  letter = captions.tokenize([f'a photo of the {captions.describe("A")}'])[0]
  assert letter[6] not in letter[:6]


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    (['a photo of the zebra'], "'zebra'.*not in the vocabulary"),
    ([' '.join(['the'] * 40)], 'has 40 words'),
  ],
)
def test_bad_text(texts, message):
  with pytest.raises(ValueError, match=message):
    captions.tokenize(texts)


def test_bad_character():
  with pytest.raises(ValueError, match=r"'cat'.*0-9 and A-Z"):
    captions.describe('cat')
