import hashlib
import json
import sys

import pytest

from modelstock_jax.clip import prompts as clip_prompts
from modelstock_jax.clip import tokenizer

PETS = clip_prompts.Prompts(('cat', 'dog', 'eel'), ('a {}.', 'my {}!'))
METADATA = 'zero_shot_metadata.py'


def write(tmp_path, content):
  path = tmp_path / 'prompts.json'
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    path.write_text(json.dumps(content))
  return path


@pytest.fixture
def open_clip(tmp_path, monkeypatch):
  """Puts another source of the lists in the place of the installed one."""

  def replace(source):
    (tmp_path / 'open_clip').mkdir()
    (tmp_path / 'open_clip' / '__init__.py').touch()
    (tmp_path / 'open_clip' / METADATA).write_text(source, 'utf-8')
    monkeypatch.syspath_prepend(tmp_path)

  return replace


@pytest.fixture(scope='module')
def source():
  return tokenizer.open_clip_file(METADATA).read_text('utf-8')


def test_imagenet():
  prompts = clip_prompts.imagenet_prompts()
  md5 = hashlib.md5('\n'.join(prompts.names).encode(), usedforsecurity=False)
  assert md5.hexdigest() == '871eb44b824bbb49541461114d943d7f'
  # CLIP's own names: WordNet calls these cock and toilet tissue.
  assert [prompts.names[i] for i in (0, 7, 999)] == [
    'tench',
    'rooster',
    'toilet paper',
  ]
  assert prompts.templates[0] == 'a bad photo of a {}.'
  assert prompts.templates[-1] == 'a tattoo of the {}.'
  assert all(text.count('{}') == 1 for text in prompts.templates)
  assert len(set(prompts.templates)) == 80
  assert prompts.labels is None
  texts = clip_prompts.captions(prompts)
  assert len(texts) == 80_000
  assert texts[7 * 80] == 'a bad photo of a rooster.'
  assert texts[-1] == 'a tattoo of the toilet paper.'


def test_source_is_read_not_run(open_clip, source):
  expected = clip_prompts.imagenet_prompts()
  open_clip(f'{source}\nraise RuntimeError("was run")\n')
  assert clip_prompts.imagenet_prompts() == expected
  assert 'open_clip' not in sys.modules


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('"tench", ', ''),
    ('"tench", "goldfish"', '"goldfish", "tench"'),
    ('IMAGENET_CLASSNAMES =', 'NAMES ='),
    ("lambda c: f'a bad photo of a {c}.',", ''),
    ('a bad photo of a {c}.', 'a photo of a {c!r}.'),
  ],
)
def test_other_lists_are_refused(open_clip, source, old, new):
  assert source.count(old) >= 1
  open_clip(source.replace(old, new, 1))
  with pytest.raises(
    ValueError, match=r'does not hold .*pip install --no-deps'
  ):
    clip_prompts.imagenet_prompts()


def test_open_clip_is_absent(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  with pytest.raises(FileNotFoundError, match='pip install --no-deps'):
    clip_prompts.imagenet_prompts()


def test_captions_leave_other_braces_alone():
  prompts = clip_prompts.Prompts(('{} of {0}', '{}'), ('{c}: {}',))
  assert clip_prompts.captions(prompts) == ['{c}: {} of {0}', '{c}: {}']


def test_prompts_file(tmp_path):
  content = {'names': list(PETS.names), 'templates': list(PETS.templates)}
  assert clip_prompts.read_prompts(write(tmp_path, content)) == PETS
  content['labels'] = ['c', 'd', 'e']
  expected = PETS._replace(labels=('c', 'd', 'e'))
  assert clip_prompts.read_prompts(str(write(tmp_path, content))) == expected


def test_prompts_file_keeps_what_it_may(tmp_path):
  # Two classes of ImageNet are both 'missile', two are 'sunglasses'.
  text = '\ufeff{"names": ["\u732b", "\u732b"], "templates": ["{}"]}'
  path = write(tmp_path, text.encode())
  assert clip_prompts.read_prompts(path).names == ('\u732b', '\u732b')


def test_prompts_file_is_absent(tmp_path):
  for path in (tmp_path / 'no.json', tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no such file'):
      clip_prompts.read_prompts(path)


@pytest.mark.parametrize(
  'content', [b'', b'{"names": [', b'\xff\xfe\xfa', b'a']
)
def test_prompts_file_is_not_json(tmp_path, content):
  with pytest.raises(ValueError, match=r'prompts\.json is not JSON: '):
    clip_prompts.read_prompts(write(tmp_path, content))


@pytest.mark.parametrize(
  ('content', 'problems'),
  [
    (
      {},
      ['names: Field required, got {}', 'templates: Field required, got {}'],
    ),
    (
      {'names': 'cat', 'templates': None, 'labels': {'cat': 0}},
      [
        "names: Input should be a valid tuple, got 'cat'",
        'templates: Input should be a valid tuple, got None',
        "labels: Input should be a valid tuple, got {'cat': 0}",
      ],
    ),
    (
      {'names': ['cat', 3, ' '], 'templates': ['{}']},
      [
        'names.1: Input should be a valid string, got 3',
        r"names.2: String should match pattern '\S', got ' '",
      ],
    ),
    (
      {
        'names': ['cat'],
        'templates': ['a cat', '{}', '{} or {}'],
        'lables': ['c'],
      },
      [
        f"templates.{i}: Value error, must have '{{}}' once, where the name "
        f'goes, got {text!r}'
        for i, text in ((0, 'a cat'), (2, '{} or {}'))
      ]
      + ["lables: Extra inputs are not permitted, got ['c']"],
    ),
    (
      {'names': [0] * 12, 'templates': ['{}']},
      [f'names.{i}: Input should be a valid string, got 0' for i in range(10)]
      + ['and 3 more'],
    ),
  ],
)
def test_every_problem_of_a_file_is_listed(tmp_path, content, problems):
  with pytest.raises(ValueError, match=r'prompts\.json does not') as error:
    clip_prompts.read_prompts(write(tmp_path, content))
  _, *lines = str(error.value).splitlines()
  assert [line.strip() for line in lines] == problems


@pytest.mark.parametrize('content', [['cat'], 'cat', None])
def test_prompts_file_holds_no_object(tmp_path, content):
  with pytest.raises(ValueError, match=r'prompts\.json does not hold prompts'):
    clip_prompts.read_prompts(write(tmp_path, content))


def test_labels_of_the_data_set():
  clip_prompts.check_labels(PETS, ['x', 'z', 'y'])
  labeled = PETS._replace(labels=('x', 'z', 'y'))
  clip_prompts.check_labels(labeled, ['x', 'z', 'y'])
  order = "2 of 3 .*\n  class 1 is 'y' in the data set, 'z' in the prompts\n"
  with pytest.raises(ValueError, match=order):
    clip_prompts.check_labels(labeled, ['x', 'y', 'z'])


@pytest.mark.parametrize(
  ('prompts', 'labels', 'message'),
  [
    (PETS, ['x', 'y'], '2 classes, but the prompts have 3 names'),
    (
      PETS._replace(labels=('x', 'y')),
      ['x', 'y'],
      '2 classes, but the prompts have 3 names',
    ),
    (
      PETS._replace(labels=('x', 'y')),
      ['x', 'y', 'z', 'w'],
      '4 classes, but the prompts have 3 names and 2 labels',
    ),
  ],
)
def test_labels_of_another_number(prompts, labels, message):
  with pytest.raises(ValueError, match=f'{message}. Give one for each'):
    clip_prompts.check_labels(prompts, labels)


def test_many_labels_that_differ():
  names = tuple(map(str, range(9)))
  prompts = clip_prompts.Prompts(names, ('{}',), names)
  with pytest.raises(ValueError, match='9 of 9 classes') as error:
    clip_prompts.check_labels(prompts, names[1:] + names[:1])
  lines = str(error.value).splitlines()
  assert len(lines) == 7
  assert lines[-1] == '  and 4 more'


def test_wnids_must_ascend():
  prompts = clip_prompts.imagenet_prompts()
  wnids = [f'n{1440764 + 37 * i:08d}' for i in range(1000)]
  clip_prompts.check_labels(prompts, wnids)
  clip_prompts.check_labels(prompts, ['tench', *wnids[:0:-1]])  # not all wnids
  swapped = [*wnids[:3], wnids[4], wnids[3], *wnids[5:]]
  message = f"class 3 is '{wnids[4]}' in the data set, '{wnids[3]}' in"
  with pytest.raises(ValueError, match=message):
    clip_prompts.check_labels(prompts, swapped)
  # With labels of their own, prompts may have any order.
  clip_prompts.check_labels(prompts._replace(labels=tuple(swapped)), swapped)
