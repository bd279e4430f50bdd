"""Ids against transformers' CLIPTokenizer, and against OpenAI's own code."""

import gzip
import importlib.metadata
import importlib.util
import json
import random
import shutil
import sys
import types

import numpy as np
import pytest
import transformers

from modelstock_jax.clip import prompts
from modelstock_jax.clip import tokenizer

pytestmark = pytest.mark.oracle
NUM_TEXTS = 10_000
# Of each script some letters: with cases, marks, joining forms, no spaces.
SCRIPTS = (
  (0x20, 0x7E),  # ASCII
  (0xA0, 0x24F),  # Latin with accents
  (0x300, 0x36F),  # combining marks
  (0x370, 0x3FF),  # Greek, whose final sigma is a matter of lower case
  (0x400, 0x52F),  # Cyrillic
  (0x531, 0x58A),  # Armenian
  (0x5B0, 0x5F4),  # Hebrew
  (0x600, 0x6FF),  # Arabic
  (0x900, 0x97F),  # Devanagari
  (0xE01, 0xE5B),  # Thai
  (0x10A0, 0x10FF),  # Georgian
  (0x1100, 0x11FF),  # Hangul, in parts that NFC puts together
  (0x1E00, 0x1FFF),  # Latin and Greek, more accents
  (0x2000, 0x206F),  # spaces, joiners, dashes, directions
  (0x2100, 0x218F),  # letter-like signs, Roman numerals
  (0x2200, 0x22FF),  # mathematics
  (0x3040, 0x30FF),  # kana
  (0x4E00, 0x9FFF),  # Chinese
  (0xAC00, 0xD7A3),  # Hangul
  (0xF900, 0xFAFF),  # compatibility forms
  (0xFF00, 0xFFEF),  # full width
  (0x10400, 0x1044F),  # Deseret, which has cases beyond the first plane
  (0x1D400, 0x1D7FF),  # mathematical letters and digits
  (0x1F300, 0x1FAFF),  # emoji
)
PLAIN = """
a an the photo of cat dog it's I'LL we've don't o'clock 'Tis rock'n'roll ''s
they'd I'm x2 3.14 1,000,000 007 2024-01-31 #tag @user e-mail </w> the</w>
http://a.b/c?d=e <b>bold</b> <|end|> x-<|y|>!
"""
ENTITIES = '&amp; &lt;br&gt; &#39; &#x1F600; &nbsp; R&D'
FOREIGN = """
caf\u00e9 cafe\u0301 STRASSE stra\u00dfe \u0130stanbul \ufb01n na\u00efve
\u039f\u0394\u039f\u03a3 \u2460 \u00bd \u0663 \u096a
"""
SPECIAL = """
<|endoftext|> <|startoftext|> <|EndOfText|> <|STARTOFTEXT|>! x<|endoftext|>y
<|endoftext <|<|endoftext|>|>
"""
WORDS = ' '.join([PLAIN, ENTITIES, FOREIGN, SPECIAL]).split()
EMOJI = (
  '\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466',  # a family
  '\U0001f3f3\ufe0f\u200d\U0001f308',  # a flag of two
  '\U0001f1f0\U0001f1f7',  # a flag of two letters
  '\U0001f44d\U0001f3fd',  # with a skin tone
  '1\ufe0f\u20e3',  # a digit in a key
  '\u2764\ufe0f',
)
SPACES = (
  *' \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029'
  '\u200b\u202f\u205f\u2060\u3000\ufeff',
  '   ',
  '\r\n',
  ' \t ',
)
CONTROLS = (*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), '\ufffd')


def _texts():
  """10,000 texts, all different: pieces of all kinds, joined at random."""
  rng = random.Random(0)

  def letters():
    low, high = rng.choice(SCRIPTS)
    return ''.join(
      chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))
    )

  def anything():
    code = rng.randrange(0x110000 - 0x800)  # all but half characters
    return chr(code if code < 0xD800 else code + 0x800)

  kinds = (
    letters,
    lambda: rng.choice(WORDS),
    lambda: rng.choice(EMOJI),
    lambda: rng.choice(CONTROLS),
    anything,
    lambda: str(rng.randrange(10 ** rng.randint(1, 9))),
    lambda: rng.choice(WORDS).swapcase(),
  )
  weights = (6, 8, 2, 1, 1, 2, 1)
  texts = dict.fromkeys(['', *WORDS, *EMOJI, *SPACES, *CONTROLS])
  while len(texts) < NUM_TEXTS:
    # One in twenty is long; most have spaces between pieces, some of them odd.
    most = 120 if rng.random() < 0.05 else 12
    pieces = []
    for kind in rng.choices(kinds, weights, k=rng.randint(1, most)):
      pieces.append(kind())
      pieces.append(rng.choices((' ', '', rng.choice(SPACES)), (5, 3, 2))[0])
    texts[''.join(pieces)] = None
  return list(texts)


@pytest.fixture(scope='module')
def texts():
  return _texts()


@pytest.fixture(scope='module')
def bpe():
  """Vocabulary and merges, as OpenAI's code takes them from its file."""
  distribution = importlib.metadata.distribution('open_clip_torch')
  name = 'open_clip/bpe_simple_vocab_16e6.txt.gz'
  with gzip.open(
    distribution.locate_file(name), 'rt', encoding='utf-8'
  ) as file:
    lines = file.read().split('\n')
  merges = [tuple(line.split()) for line in lines[1:48895]]
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  characters = [*map(chr, printable), *map(chr, range(256, 256 + 68))]
  assert len(characters) == 256
  tokens = characters + [c + '</w>' for c in characters]
  tokens += [left + right for left, right in merges]
  tokens += ['<|startoftext|>', '<|endoftext|>']
  return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope='module')
def folders(bpe, tmp_path_factory):
  """A checkpoint's files in the new form and in the old one."""
  vocabulary, merges = bpe
  new, old = (tmp_path_factory.mktemp(name) for name in ('new', 'old'))
  transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(
    new
  )
  assert not (new / 'vocab.json').exists()
  (old / 'vocab.json').write_text(json.dumps(vocabulary), 'utf-8')
  lines = ['#version: 0.2', *map(' '.join, merges), '']
  (old / 'merges.txt').write_text('\n'.join(lines), 'utf-8')
  return {'tokenizer.json': new, 'vocab.json': old, 'open_clip': None}


@pytest.fixture(params=['tokenizer.json', 'vocab.json', 'open_clip'])
def pair(request, folders, bpe):
  """Our loader's argument, and transformers' tokenizer of the same files."""
  folder = folders[request.param]
  if folder is None:
    vocabulary, merges = bpe
    return None, transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
  return folder, transformers.CLIPTokenizer.from_pretrained(str(folder))


def _rows(tokens):
  """Ids without the zeros after the end token."""
  return [np.trim_zeros(row, 'b').tolist() for row in tokens]


def test_generated_texts_are_of_all_kinds(texts):
  assert len(set(texts)) == len(texts) == NUM_TEXTS
  joined = ''.join(texts)
  for low, high in SCRIPTS:
    seen = {c for c in joined if low <= ord(c) <= high}
    assert len(seen) >= 0.9 * min(high - low, 256), hex(low)
  for piece in (*WORDS, *EMOJI, *SPACES, *CONTROLS):
    assert joined.count(piece) >= 5, ascii(piece)


def test_transformers(texts, pair):
  path, theirs = pair
  ours = tokenizer.load_tokenizer(path, context_length=8192)
  expected = theirs(texts)['input_ids']
  different = [
    text
    for text, row, ids in zip(texts, _rows(ours(texts)), expected, strict=True)
    if row != ids
  ]
  assert different == []
  lengths = list(map(len, expected))
  print(
    f'{len(texts)} texts, {sum(lengths)} ids, {sum(n > 77 for n in lengths)} '
    f'texts of more than 77, {len(different)} differences'
  )
  assert sum(n > 77 for n in lengths) > 500


def test_transformers_truncated(texts, pair):
  path, theirs = pair
  got = tokenizer.load_tokenizer(path)(texts, truncate=True)
  assert got.shape == (NUM_TEXTS, 77)
  assert got.dtype == np.int32
  expected = theirs(texts, truncation=True, max_length=77)['input_ids']
  assert _rows(got) == expected


@pytest.fixture
def openai(monkeypatch):
  """OpenAI's tokenizer, its `ftfy` replaced by one that mends nothing.

  That library is not needed for what is compared: sound ASCII passes through.
  """
  ftfy = types.ModuleType('ftfy')
  monkeypatch.setattr(ftfy, 'fix_text', lambda text: text, raising=False)
  monkeypatch.setitem(sys.modules, 'ftfy', ftfy)
  path = importlib.metadata.distribution('clip-anytorch').locate_file(
    'clip/simple_tokenizer.py'
  )
  spec = importlib.util.spec_from_file_location('simple_tokenizer', path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.SimpleTokenizer()


def test_openai_on_the_captions_of_imagenet(openai):
  captions = prompts.captions(prompts.imagenet_prompts())
  assert all(caption.isascii() for caption in captions)
  got = _rows(tokenizer.load_tokenizer()(captions))
  expected = [[49406, *openai.encode(text), 49407] for text in captions]
  assert got == expected


def test_openai_on_ascii(openai):
  rng = random.Random(1)
  words = PLAIN.split()
  characters = [chr(code) for code in range(32, 127) if chr(code) != '&']
  texts = [
    ' '.join(
      rng.choice(words)
      if rng.random() < 0.7
      else ''.join(rng.choices(characters, k=rng.randint(1, 8)))
      for _ in range(rng.randint(0, 20))
    )
    for _ in range(5000)
  ]
  ours = tokenizer.load_tokenizer(context_length=1024)
  expected = [[49406, *openai.encode(text), 49407] for text in texts]
  assert _rows(ours(texts)) == expected


def test_openai_differs_where_the_docstring_says(openai):
  ours = tokenizer.load_tokenizer()
  (entity,), (sign,) = _rows(ours('&amp;')), _rows(ours('&'))
  assert openai.encode('&amp;') == openai.encode('&') == sign[1:-1]
  assert len(entity[1:-1]) == 3
  # It also knows the special tokens in capitals, and the final sigma.
  assert openai.encode('<|EndOfText|>') == [49407]
  assert 49407 not in _rows(ours('<|EndOfText|>'))[0][:-1]
  assert openai.encode('\u039f\u03a3') == openai.encode('\u03bf\u03c2')
  assert _rows(ours('\u039f\u03a3')) == _rows(ours('\u03bf\u03c3'))


def test_the_head_of_a_run_is_that_of_transformers(
  folders, imagenet_run, tmp_path
):
  """A rung of the ladder of the first run; 10 classes, one template."""
  from experiments import first_run
  from modelstock_jax.training import config as config_lib

  config = imagenet_run(tmp_path)
  for path in folders['tokenizer.json'].iterdir():
    shutil.copy(path, tmp_path / 'clip')
  flags = ['--config.train.batch_size=8', '--config.train.warmup_steps=0']
  figures = first_run.head(config_lib.load(config, flags), tmp_path)
  assert first_run.missed('head', figures) == []
  assert first_run.missed('head', {'largest difference': 2e-3}) != []
