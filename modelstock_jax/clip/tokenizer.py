"""CLIP's byte-pair tokenizer, of a checkpoint or of the package open_clip."""

from collections.abc import Sequence
import dataclasses
import gzip
import hashlib
import importlib.util
import pathlib

import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from modelstock_jax.formats import text as text_lib

START = '<|startoftext|>'
END = '<|endoftext|>'

_BPE_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
_MERGES = 49408 - 2 * 256 - 2  # what bytes and special tokens leave of the ids


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A function from texts to the ids that a text tower reads.

  A row is [start, the ids of the text, end, 0, 0, ...]. The ids are those of
  Hugging Face's `CLIPTokenizer`, for any text: of its form NFC in lower case,
  whatever its white space. OpenAI's own Python tokenizer gives others where
  it mends mis-decoded characters (`ftfy`), resolves HTML entities ('&amp;' is
  three tokens here, one there), takes '<|EndOfText|>' for the end token, or
  writes a final sigma. Sound ASCII without these has the same ids in both.

  '<|endoftext|>' within a text is the end token: the text tower, which pools
  there, does not see what follows.

  Attributes:
    encoder: gives the ids of a text, without start and end.
    start: id of the first token.
    end: id of the last token; the highest of all ids.
    context_length: the most tokens a text may have, with start and end.
  """

  encoder: tokenizers.Tokenizer
  start: int
  end: int
  context_length: int = 77

  def __call__(
    self, texts: str | Sequence[str], *, truncate: bool = False
  ) -> np.ndarray:
    """Return the ids of texts.

    Args:
      texts: n texts, or one.
      truncate: True to drop what is too long of a text; the end token stays.
        Otherwise a text that is too long is an error.

    Returns:
      int32[n, context_length], zero after the end token.

    Raises:
      ValueError: a text is not a string, or too long; all such are listed.

    >>> tokens = load_tokenizer()(['a diagram', 'hello world!'])
    >>> tokens.shape
    (2, 77)
    >>> tokens[:, :6].tolist()
    [[49406, 320, 22697, 49407, 0, 0], [49406, 3306, 1002, 256, 49407, 0]]
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = np.zeros((len(texts), self.context_length), np.int32)
    problems = []
    # One by one: a batch is shared out to threads, and tokenizers warns when a
    # process that has started them forks, as data loaders do.
    for i, text in enumerate(texts):
      try:
        ids = self.encoder.encode(text, add_special_tokens=False).ids
      except TypeError:  # also of half a character
        problems.append(f'text {i} is {text_lib.shown(text)}')
        continue
      number = len(ids) + 2
      if number > self.context_length and not truncate:
        shown = text_lib.shown(text)
        problems.append(f'text {i} has {number} tokens: {shown}')
        continue
      row = [self.start, *ids[: self.context_length - 2], self.end]
      tokens[i, : len(row)] = row
    text_lib.raise_problems(
      f'{len(problems)} of {len(texts)} texts are not strings of at most '
      f'{self.context_length} tokens, start and end counted. Decode bytes, '
      'shorten what is too long, or pass truncate=True.',
      problems,
      most=10,
    )
    return tokens


def load_tokenizer(
  path: text_lib.PathLike | None = None, *, context_length: int = 77
) -> Tokenizer:
  """Build the tokenizer of a checkpoint, or OpenAI's.

  Args:
    path: a directory with `tokenizer.json`, or with `vocab.json` and
      `merges.txt`, such as a Hugging Face checkpoint; or a `tokenizer.json`.
      None: the vocabulary of OpenAI's models, which all open_clip models of
      49,408 ids share, from the distribution `open_clip_torch`; its files are
      read, it is not imported.
    context_length: the most tokens a text may have, with start and end.

  Returns:
    The tokenizer.

  Raises:
    FileNotFoundError: there is no such path, or not these files in it, or the
      distribution is not installed.
    ValueError: a file is damaged, or the vocabulary lacks a special token, or
      has ids above the end token's.

  Source: section 2.4 of arXiv:2103.00020; the ids are those of OpenAI's files.

  >>> load_tokenizer(context_length=16)('a photo of a cat.').shape
  (1, 16)
  """
  if path is None:
    source = open_clip_file('bpe_simple_vocab_16e6.txt.gz')
    encoder = _from_bpe_file(source)
  else:
    source = pathlib.Path(path)
    encoder = _from_checkpoint(source)
  vocabulary = encoder.get_vocab()
  last = max(vocabulary, key=vocabulary.__getitem__, default='')
  if START not in vocabulary or last != END:
    raise ValueError(
      f'{source}: the vocabulary of {len(vocabulary)} tokens ends with '
      f'{last!r}. It must hold {START}, and {END} with the highest id, at '
      'which the text tower pools. Take the files of a CLIP checkpoint, or '
      "path=None for OpenAI's vocabulary."
    )
  return Tokenizer(encoder, vocabulary[START], vocabulary[END], context_length)


def open_clip_file(name: str) -> pathlib.Path:
  """Return the path of a file of the package `open_clip`, without importing it.

  Args:
    name: path of the file within the package.

  Raises:
    FileNotFoundError: `open_clip_torch` is not installed, or has no such file.

  >>> open_clip_file('bpe_simple_vocab_16e6.txt.gz').is_file()
  True
  """
  spec = importlib.util.find_spec('open_clip')
  if spec and spec.origin:
    path = pathlib.Path(spec.origin).parent / name
    if path.is_file():
      return path
  # --no-deps, because open_clip needs torch and this reads a file or two.
  raise FileNotFoundError(
    f'{name} is read from open_clip_torch, which is not installed or has no '
    'such file. Run `pip install --no-deps open_clip_torch==3.3.0`.'
  )


def _from_bpe_file(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Read OpenAI's vocabulary: bytes, bytes that end a word, merged pairs."""
  packed = path.read_bytes()
  if hashlib.sha256(packed).hexdigest() != _BPE_SHA256:
    raise ValueError(
      f"{path} is not OpenAI's file of merges. Run `pip install --no-deps "
      '--force-reinstall open_clip_torch==3.3.0`.'
    )
  # The first line is a title, and the file goes on beyond what CLIP uses.
  lines = gzip.decompress(packed).decode('utf-8').split('\n')
  pairs = (line.split() for line in lines[1 : _MERGES + 1])
  merges = [(left, right) for left, right in pairs]
  # A visible character for each byte: those that print as themselves first.
  characters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [
    *characters,
    *(character + '</w>' for character in characters),
    *(left + right for left, right in merges),
    START,
    END,
  ]
  return _byte_pair_encoder(
    {token: i for i, token in enumerate(tokens)}, merges
  )


def _from_checkpoint(path: pathlib.Path) -> tokenizers.Tokenizer:
  file = path / 'tokenizer.json' if path.is_dir() else path
  parts = [path / name for name in ('vocab.json', 'merges.txt')]
  with text_lib.explained(
    f'{path}: the files of the tokenizer are damaged, or do not belong '
    'together (',
    '). Copy them again, from one checkpoint.',
    Exception,  # plain ones, with the place but not the file
  ):
    if file.is_file():
      encoder = tokenizers.Tokenizer.from_file(str(file))
      encoder.no_truncation()
      encoder.no_padding()
      return encoder
    if all(part.is_file() for part in parts):
      return _byte_pair_encoder(*models.BPE.read_file(*map(str, parts)))
  raise FileNotFoundError(
    f'{path}: there is no tokenizer.json, nor vocab.json with merges.txt. Copy '
    "them from the checkpoint, or pass path=None for OpenAI's vocabulary."
  )


def _byte_pair_encoder(
  vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
  """Return an encoder with the steps of Hugging Face's `CLIPTokenizer`."""
  encoder = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix='</w>')
  )
  # Hugging Face's also makes one space of each run of white space, which the
  # words below do without: none has white space in it.
  encoder.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase()]
  )
  # What is a word: a special token in capitals, an English ending, letters,
  # one digit, or signs. Whatever lies between words goes.
  words = tokenizers.Regex(
    r'<\|(?:start|end)oftext\|>'
    r"|'(?:[stmd]|re|ve|ll)"
    r'|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+'
  )
  encoder.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(words, 'removed', invert=True),
      # Cuts once more, by the words of GPT-2, as Hugging Face's does: the
      # special tokens in capitals fall apart here.
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  # Without this a special token in a text would be cut like any word. One that
  # the vocabulary lacks is not added to it: for load_tokenizer it is an error.
  encoder.add_special_tokens([t for t in (START, END) if t in vocabulary])
  return encoder
