"""Prompts and tokens for the classes of a data set."""

from collections.abc import Sequence
import pathlib

import numpy as np

from modelstock_jax import clip
from modelstock_jax.clip import prompts as prompts_lib
from modelstock_jax.clip import tokenizer as tokenizer_lib
from modelstock_jax.data import captions
from modelstock_jax.formats import hub
from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import config_keys

# Of class names that no one has written templates for.
TEMPLATE = 'a photo of a {}.'

# About a setting that names a file.
ERRORS = (FileNotFoundError, ValueError)


def read_prompts(source: str, classes: Sequence[str]) -> prompts_lib.Prompts:
  """Read prompts, checked against the labels of a data set.

  Args:
    source: `config.anchor.prompts`.
    classes: names of the K classes, in label order.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: they do not fit the classes.
  """
  if source == 'class_names':
    names = tuple(label.replace('_', ' ') for label in classes)
    return prompts_lib.Prompts(names, (TEMPLATE,))
  with text_lib.explained(
    f'anchor.prompts: {source!r}: ',
    " Set anchor.prompts='class_names' for the data set's own names.",
    kinds=ERRORS,
  ):
    if source == 'characters':
      names = tuple(captions.describe(label) for label in classes)
      return prompts_lib.Prompts(names, captions.TEMPLATES)
    if source == 'imagenet':
      prompts = prompts_lib.imagenet_prompts()
    else:
      prompts = prompts_lib.read_prompts(pathlib.Path(source).expanduser())
    prompts_lib.check_labels(prompts, classes)
  return prompts


def tokenize(
  anchor: config_keys.Anchor,
  prompts: prompts_lib.Prompts,
  text: clip.TextConfig,
  weights: pathlib.Path,
) -> np.ndarray:
  """Tokenize every class in every template, for a text tower.

  Args:
    anchor: `prompts`, `tokenizer` and `weights` matter.
    prompts: K classes and T templates.
    text: sizes of the text tower.
    weights: the file or folder beside which a tokenizer may be.

  Returns:
    int32[K, T, L].

  Raises:
    FileNotFoundError: there is no such tokenizer.
    ValueError: the tokenizer does not fit the tower.
  """
  texts = prompts_lib.captions(prompts)
  if anchor.prompts == 'characters':
    source, ids = 'the vocabulary of characters', captions.VOCAB_SIZE
    fits = ids == text.vocab_size
    tokens = captions.tokenize(texts)
  else:
    folder = tokenizer_folder(weights)
    if anchor.tokenizer:
      folder = pathlib.Path(anchor.tokenizer).expanduser()
    setting = f'anchor.tokenizer: {anchor.tokenizer!r}: '
    with text_lib.explained(setting, kinds=ERRORS):
      tokenizer = tokenizer_lib.load_tokenizer(
        folder, context_length=text.context_length
      )
    with text_lib.explained(f'anchor.prompts: {anchor.prompts!r}: '):
      tokens = tokenizer(texts)
    source, ids = f'the tokenizer of {folder or "OpenAI"}', tokenizer.end + 1
    fits = ids <= text.vocab_size
  if not fits:
    raise ValueError(
      f'anchor.prompts: {anchor.prompts!r}: {source} has {ids} ids, the text '
      f'tower of {anchor.weights!r} takes {text.vocab_size}. Set '
      'anchor.tokenizer to that of the weights; use '
      "anchor.prompts='characters' with the weights that ship only."
    )
  return tokens.reshape(len(prompts.names), len(prompts.templates), -1)


def tokenizer_folder(path: pathlib.Path) -> pathlib.Path | None:
  """Return the folder of a checkpoint, or of one of its files.

  Args:
    path: the folder or file, or the id of a model of the hub that was read.

  Returns:
    The folder, or None if it has no tokenizer.
  """
  path = hub.local_path(path)
  folder = path if path.is_dir() else path.parent
  for names in (('tokenizer.json',), ('vocab.json', 'merges.txt')):
    if all((folder / name).is_file() for name in names):
      return folder
  return None
