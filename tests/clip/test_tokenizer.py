"""The tokenizer against published ids, and a vocabulary worked by hand."""

import json
import sys

import numpy as np
import pytest
import tokenizers

from modelstock_jax.clip import tokenizer

START, END = 49406, 49407
# Bytes, of which two end a word; what two merges make; the special tokens.
TINY = ['a', 'b', 'a</w>', 'b</w>', 'ab', 'ab</w>', 'abab</w>']
TINY = {token: i for i, token in enumerate(TINY)}
TINY |= {'<|startoftext|>': 7, '<|endoftext|>': 8}
TINY_MERGES = ['a b', 'a b</w>', 'ab ab</w>']


def write_tiny(folder, vocabulary=None, merges=TINY_MERGES):
  vocabulary = TINY if vocabulary is None else vocabulary
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']))
  return folder


def write_open_clip(folder, monkeypatch, name, content):
  """A package of that name that is found before the installed one."""
  (folder / 'open_clip').mkdir()
  (folder / 'open_clip' / '__init__.py').touch()
  if content is not None:
    (folder / 'open_clip' / name).write_bytes(content)
  monkeypatch.syspath_prepend(folder)


@pytest.fixture(scope='module')
def openai():
  return tokenizer.load_tokenizer()


def ids(encode, text):
  """The ids of one text between start and end."""
  row = encode(text)[0]
  start, *inner, end = np.trim_zeros(row, 'b').tolist()
  assert (start, end) == (encode.start, encode.end)
  return inner


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    # as OpenAI's notebooks and Hugging Face's tests print them
    ('a diagram', [320, 22697]),
    ('hello world!', [3306, 1002, 256]),
    ('a photo of a cat', [320, 1125, 539, 320, 2368]),
  ],
)
def test_published_ids(openai, text, expected):
  row = openai(text)
  assert row.dtype == np.int32
  zeros = [0] * (75 - len(expected))
  np.testing.assert_array_equal(row, [[START, *expected, END, *zeros]])


def test_signs_and_digits_are_words_by_their_byte(openai):
  # Bytes that end a word follow the 256 bytes, the printable ones from '!'.
  for code in range(0x21, 0x7F):
    expected = 256 + ord(chr(code).lower()) - 0x21
    assert ids(openai, chr(code)) == [expected], chr(code)
  assert ids(openai, '2 0 2 4') == ids(openai, '2024')
  # 94 + 12 + 82 printable bytes of Latin-1 come first, then byte 0
  assert ids(openai, '\0') == [256 + 94 + 12 + 82]


def test_normal_forms(openai):
  assert ids(openai, '  HELLO\t\n\u3000World! ') == [3306, 1002, 256]
  assert ids(openai, 'cafe\u0301') == ids(openai, 'caf\u00e9')
  assert ids(openai, 'cafe\u0301') != ids(openai, 'cafe')


def test_endings_are_cut_off_and_entities_kept(openai):
  for ending in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
    (inner,) = ids(openai, ending)
    assert ids(openai, f'cat{ending} cat') == [2368, inner, 2368]
  amp = ids(openai, 'amp')
  assert ids(openai, '&amp;') == [256 + 5, *amp, 256 + 26]


def test_special_tokens_within_a_text(openai):
  assert ids(openai, 'a<|endoftext|>a') == [320, END, 320]
  assert ids(openai, '<|startoftext|> a') == [START, 320]
  # In capitals it is three words, whatever follows.
  expected = ids(openai, '<| endoftext |> !')
  assert ids(openai, '<|EndOfText|>!') == expected
  assert END not in expected


def test_empty(openai):
  expected = [[START, END, *[0] * 75]]
  for text in ('', ' \n '):
    np.testing.assert_array_equal(openai(text), expected)
  assert openai([]).shape == (0, 77)
  assert openai([]).dtype == np.int32


def test_rows_keep_the_order_of_texts(openai):
  texts = ['a diagram', '', 'hello world!']
  rows = openai(tuple(texts))
  for row, text in zip(rows, texts, strict=True):
    np.testing.assert_array_equal(row, openai(text)[0])


@pytest.mark.parametrize('source', ['tokenizer.json', 'file', 'vocab.json'])
def test_vocabulary_worked_by_hand(tmp_path, source):
  path = write_tiny(tmp_path)
  if source != 'vocab.json':
    encoder = tokenizer.load_tokenizer(tmp_path).encoder
    # Files on the hub ask for padding and truncation of their own.
    encoder.enable_truncation(2)
    encoder.enable_padding(length=5, pad_id=8)
    encoder.save(str(tmp_path / 'tokenizer.json'))
    for name in ('vocab.json', 'merges.txt'):
      (tmp_path / name).unlink()
    if source == 'file':
      path = tmp_path / 'tokenizer.json'
  tiny = tokenizer.load_tokenizer(str(path), context_length=8)
  rows = tiny(['abab', 'aba', 'b ba', 'A', 'ab<|endoftext|>b', 'ca'])
  np.testing.assert_array_equal(
    rows,
    [
      [7, 6, 8, 0, 0, 0, 0, 0],  # a b a b</w> -> ab ab</w> -> abab</w>
      [7, 4, 2, 8, 0, 0, 0, 0],
      [7, 3, 1, 2, 8, 0, 0, 0],
      [7, 2, 8, 0, 0, 0, 0, 0],
      [7, 5, 8, 3, 8, 0, 0, 0],
      [7, 8, 2, 8, 0, 0, 0, 0],  # unknown: Hugging Face's unk_token
    ],
  )


def test_tokenizer_json_goes_first(tmp_path):
  encoder = tokenizer.load_tokenizer(write_tiny(tmp_path)).encoder
  encoder.save(str(tmp_path / 'tokenizer.json'))
  write_tiny(tmp_path, vocabulary={})
  assert ids(tokenizer.load_tokenizer(tmp_path), 'abab') == [6]


def test_openai_files_written_and_read_again(openai, tmp_path):
  openai.encoder.model.save(str(tmp_path))
  texts = ["It's 5 o'clock &amp; caf\u00e9 time \U0001f600", 'a diagram']
  expected = openai(texts)
  assert len(json.loads((tmp_path / 'vocab.json').read_text())) == 49408
  np.testing.assert_array_equal(
    tokenizer.load_tokenizer(tmp_path)(texts), expected
  )


def test_long_texts(openai):
  fits, long = ' '.join(['a'] * 75), ' '.join(['a'] * 76)
  full = [[START, *[320] * 75, END]]
  np.testing.assert_array_equal(openai(fits), full)
  np.testing.assert_array_equal(openai(long, truncate=True), full)
  short = tokenizer.Tokenizer(openai.encoder, START, END, context_length=3)
  np.testing.assert_array_equal(
    short(['cat cat', 'cat'], truncate=True), [[START, 2368, END]] * 2
  )
  with pytest.raises(
    ValueError, match=r'2 of 3 texts are not .* 77 tokens'
  ) as error:
    openai([long, fits, 'cat ' * 100])
  lines = str(error.value).splitlines()
  assert 'truncate=True' in lines[0]
  assert [line.split(':')[0].strip() for line in lines[1:]] == [
    'text 0 has 78 tokens',
    'text 2 has 102 tokens',
  ]
  with pytest.raises(ValueError, match='30 of 30 texts') as error:
    openai([long] * 30)
  lines = str(error.value).splitlines()
  assert len(lines) == 12
  assert lines[-1] == '  and 20 more'


def test_not_texts(openai):
  texts = ['a', 3, None, 'half \ud83d']
  with pytest.raises(ValueError, match='3 of 4 texts') as error:
    openai(texts)
  assert str(error.value).splitlines()[1:] == [
    '  text 1 is 3',
    '  text 2 is None',
    "  text 3 is 'half \\ud83d'",
  ]
  with pytest.raises(ValueError, match=r'9 of 9 texts.*Decode bytes'):
    openai(b'a diagram')


def test_absent_files(tmp_path):
  absent = r'there is no tokenizer\.json, nor vocab\.json with merges\.txt'
  for path in (tmp_path / 'nowhere', tmp_path):
    with pytest.raises(FileNotFoundError, match=absent):
      tokenizer.load_tokenizer(path)
  (write_tiny(tmp_path) / 'merges.txt').unlink()
  with pytest.raises(FileNotFoundError, match=absent):
    tokenizer.load_tokenizer(tmp_path)


def test_damaged_files(tmp_path):
  damaged = r'are damaged, or do not .*Copy them again'
  write_tiny(tmp_path, merges=[*TINY_MERGES, 'c d'])
  with pytest.raises(ValueError, match=damaged):
    tokenizer.load_tokenizer(tmp_path)
  (write_tiny(tmp_path) / 'vocab.json').write_text('{"a": 0')
  with pytest.raises(ValueError, match=damaged):
    tokenizer.load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    with pytest.raises(ValueError, match=damaged):
      tokenizer.load_tokenizer(path)


def test_vocabulary_without_special_tokens(tmp_path):
  letters = {token: i for token, i in TINY.items() if i < 7}
  write_tiny(tmp_path, vocabulary=letters)
  message = r"of 7 tokens ends with 'abab</w>'. It must hold <\|startoftext\|>"
  with pytest.raises(ValueError, match=message):
    tokenizer.load_tokenizer(tmp_path)
  # as GPT-2's files are
  write_tiny(tmp_path, vocabulary=letters | {'<|endoftext|>': 7})
  with pytest.raises(ValueError, match=r'It must hold <\|startoftext\|>'):
    tokenizer.load_tokenizer(tmp_path)
  model = tokenizers.models.BPE(letters, [])
  tokenizers.Tokenizer(model).save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match=message):
    tokenizer.load_tokenizer(tmp_path)


def test_end_must_be_the_highest_id(tmp_path):
  write_tiny(tmp_path, vocabulary=TINY | {'<new>': 9})
  with pytest.raises(ValueError, match=r"ends with '<new>'"):
    tokenizer.load_tokenizer(tmp_path)


def test_open_clip_is_not_imported(openai):
  assert openai.end == END
  assert 'open_clip' not in sys.modules


def test_open_clip_is_absent(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  remedy = 'not installed.*`pip install --no-deps open_clip_torch==3.3.0`'
  with pytest.raises(FileNotFoundError, match=remedy):
    tokenizer.load_tokenizer()


@pytest.mark.parametrize(
  ('content', 'error', 'message'),
  [
    (None, FileNotFoundError, 'has no such file. Run .pip install --no'),
    (b'', ValueError, "not OpenAI's file .*pip install --no-deps"),
  ],
)
def test_open_clip_is_damaged(tmp_path, monkeypatch, content, error, message):
  name = 'bpe_simple_vocab_16e6.txt.gz'
  write_open_clip(tmp_path, monkeypatch, name, content)
  with pytest.raises(error, match=message):
    tokenizer.load_tokenizer()
