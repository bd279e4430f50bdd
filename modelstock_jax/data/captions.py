"""Captions of characters, in words, as token ids for the text tower."""

from collections.abc import Sequence

import numpy as np

TEMPLATES = (
  'a photo of the {}',
  'a scan of the {}',
  'a drawing of the {}',
  'a blurry photo of the {}',
  'a small picture of the {}',
  'the {} in print',
  'the {} written by hand',
  'one {} on paper',
)


def describe(character: str) -> str:
  """Name a character in the words that captions use.

  Args:
    character: one of 0-9 and A-Z, as in the data sets' class names.

  Returns:
    Its kind and itself.

  Raises:
    ValueError: it is no such character.

  >>> describe('7'), describe('A')
  ('digit 7', 'letter A')
  """
  if character not in _CHARACTERS:
    raise ValueError(
      f'no words for class {character!r}: captions know 0-9 and A-Z'
    )
  return f'{"digit" if character.isdigit() else "letter"} {character}'


def tokenize(texts: Sequence[str]) -> np.ndarray:
  """Turn texts into token ids: start, one id per word, end, zeros.

  The end token has the highest id, so that `argmax` over a row finds it: that
  is where CLIP reads a text's embedding.

  Args:
    texts: words of the vocabulary, separated by spaces.

  Returns:
    `int32[len(texts), CONTEXT_LENGTH]`.

  Raises:
    ValueError: a word is not in the vocabulary, or a text is too long.

  >>> tokens = tokenize(['a photo of the digit 7'])
  >>> tokens.shape, tokens.argmax(-1).tolist(), tokens.max() == VOCAB_SIZE - 1
  ((1, 9), [7], np.True_)
  """
  tokens = np.zeros((len(texts), CONTEXT_LENGTH), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    words = text.split()
    unknown = sorted(set(words) - _IDS.keys())
    if unknown:
      raise ValueError(
        f'{text!r}: {unknown} not in the vocabulary {", ".join(_WORDS)}'
      )
    if len(words) + 2 > CONTEXT_LENGTH:
      raise ValueError(
        f'{text!r} has {len(words)} words, at most {CONTEXT_LENGTH - 2} fit'
      )
    ids = [_START, *(_IDS[word] for word in words), _END]
    row[: len(ids)] = ids
  return tokens


_CHARACTERS = tuple('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ')
_TEXTS = [
  template.format(describe(character)).split()
  for template in TEMPLATES
  for character in _CHARACTERS
]
_WORDS = tuple(sorted({word for words in _TEXTS for word in words}))
_IDS = {word: number for number, word in enumerate(_WORDS, start=1)}
_START, _END = len(_WORDS) + 1, len(_WORDS) + 2

VOCAB_SIZE = _END + 1
CONTEXT_LENGTH = max(map(len, _TEXTS)) + 2
