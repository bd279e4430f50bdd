"""Names and templates of classes, for zero-shot classification."""

import ast
import collections
from collections.abc import Sequence
import difflib
import hashlib
import os
import re
from typing import Any
from typing import NamedTuple

from modelstock_jax.clip import tokenizer
from modelstock_jax.formats import text as text_lib

PathLike = str | os.PathLike[str]

_NAMES_MD5 = '871eb44b824bbb49541461114d943d7f'
_NUM_NAMES, _NUM_TEMPLATES = 1000, 80
_WNID = re.compile('n[0-9]{8}')  # a class of ImageNet, such as n01440764
_SHOWN = 5  # the most positions that an error lists


class Prompts(NamedTuple):
  """K classes, each described by T templates.

  Attributes:
    names: K names, as they read within a text.
    templates: T texts, each with one '{}' where the name goes.
    labels: what the data set calls the K classes, in the order of `names`.
      None where it is not known.
  """

  names: tuple[str, ...]
  templates: tuple[str, ...]
  labels: tuple[str, ...] | None = None


def captions(prompts: Prompts) -> list[str]:
  """Every template with every name in it, class by class.

  Args:
    prompts: K names and T templates.

  Returns:
    K * T texts; text k * T + t describes class k by template t.

  >>> captions(Prompts(('cat', 'dog'), ('a {}.', 'my {}.')))
  ['a cat.', 'my cat.', 'a dog.', 'my dog.']
  """
  return [
    template.replace('{}', name)
    for name in prompts.names
    for template in prompts.templates
  ]


def imagenet_prompts() -> Prompts:
  """CLIP's names of the 1000 classes of ImageNet, and its 80 templates.

  They are read from the distribution `open_clip_torch`, which is not imported.

  Returns:
    Names in the order of ImageNet's wnids, which the distribution does not
    list: `labels` is None.

  Raises:
    FileNotFoundError: the distribution is not installed.
    ValueError: its lists are others than CLIP's.

  Source: section 3.1.4 of arXiv:2103.00020.

  >>> prompts = imagenet_prompts()
  >>> len(prompts.names), len(prompts.templates)
  (1000, 80)
  >>> captions(prompts)[0]
  'a bad photo of a tench.'
  """
  path = tokenizer.open_clip_file('zero_shot_metadata.py')
  names, templates = _read_metadata(path.read_text('utf-8'))
  joined = '\n'.join(names).encode()
  md5 = hashlib.md5(joined, usedforsecurity=False).hexdigest()
  found = (len(names), md5, len(templates))
  if found != (_NUM_NAMES, _NAMES_MD5, _NUM_TEMPLATES):
    raise ValueError(
      f"{path} is not CLIP's list: it has {len(names)} class names of md5 "
      f'{md5} and {len(templates)} templates with one name in each; CLIP has '
      f'{_NUM_NAMES} of md5 {_NAMES_MD5} and {_NUM_TEMPLATES}. Run '
      '`pip install --no-deps --force-reinstall open_clip_torch==3.3.0`.'
    )
  return Prompts(names, templates)


def read_prompts(path: PathLike) -> Prompts:
  """Reads names and templates from a JSON file of one's own.

  Args:
    path: a file such as
      `{"names": ["cat", "dog"], "templates": ["a photo of a {}."]}`. It may
      also hold "labels", what the data set calls the classes, in the order of
      the names.

  Returns:
    The prompts.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not JSON, or not of this form; every problem is
      listed.

  >>> import pathlib, tempfile
  >>> text = '{"names": ["cat", "dog"], "templates": ["a photo of a {}."]}'
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, 'pets.json')
  ...   _ = path.write_text(text)
  ...   prompts = read_prompts(path)
  >>> captions(prompts)
  ['a photo of a cat.', 'a photo of a dog.']
  """
  path = text_lib.existing_file(path)
  try:
    content = text_lib.read_json(path)
  except ValueError as error:  # of the JSON, or of its bytes
    raise ValueError(f'{path} is not JSON: {error}.') from error
  if not isinstance(content, dict):
    raise ValueError(
      f'{path} holds a {type(content).__name__}, not an object with the keys '
      "'names' and 'templates'."
    )
  text_lib.raise_problems(
    f'{path} does not hold prompts. Mend these:', _problems(content)
  )
  labels = content.get('labels')
  return Prompts(
    tuple(content['names']),
    tuple(content['templates']),
    None if labels is None else tuple(labels),
  )


def check_labels(prompts: Prompts, labels: Sequence[str]) -> None:
  """Refuses prompts that are not for the classes of a data set.

  Args:
    prompts: with `labels`, these must be the data set's. Without, only the
      number is checked, and that wnids ascend, as CLIP's names of ImageNet do.
    labels: the data set's class names, in the order of its integer labels.

  Raises:
    ValueError: the number or the order differs.

  >>> check_labels(Prompts(('cat', 'dog'), ('a {}.',)), ['felis', 'canis'])
  """
  counts = {'names': len(prompts.names)}
  if prompts.labels is not None:
    counts['labels'] = len(prompts.labels)
  wrong = [f'{n} {what}' for what, n in counts.items() if n != len(labels)]
  if wrong:
    raise ValueError(
      f'the data set has {len(labels)} classes, but the prompts have '
      f'{" and ".join(wrong)}. Give one for each class, in the order of the '
      'data set.'
    )
  if prompts.labels is not None:
    pairs = zip(labels, prompts.labels, strict=True)
    different = [
      f'class {i} is {label!r} in the data set, {expected!r} in the prompts'
      for i, (label, expected) in enumerate(pairs)
      if label != expected
    ]
    text_lib.raise_problems(
      f'{len(different)} of {len(labels)} labels of the prompts differ from '
      "the data set's. Put names and labels in its order.",
      different,
      most=_SHOWN,
    )
  elif all(_WNID.fullmatch(label) for label in labels):
    falling = [
      f'class {i} is {labels[i]}, after {labels[i - 1]}'
      for i in range(1, len(labels))
      if labels[i] <= labels[i - 1]
    ]
    text_lib.raise_problems(
      "the data set's wnids do not ascend, as those of CLIP's names do. Put "
      'its classes in that order; or, if the names are in its order, give '
      'the prompts its labels.',
      falling,
      most=_SHOWN,
    )


def _read_metadata(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Return names and templates of open_clip's source, which is not run."""
  try:
    statements = ast.parse(source).body
  except SyntaxError:
    return (), ()
  lists = {
    ast.unparse(statement.targets[0]): statement.value.elts
    for statement in statements
    if isinstance(statement, ast.Assign)
    and isinstance(statement.value, ast.Tuple)
  }
  names = tuple(
    node.value
    for node in lists.get('IMAGENET_CLASSNAMES', [])
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )
  templates = map(_template, lists.get('OPENAI_IMAGENET_TEMPLATES', []))
  return names, tuple(filter(None, templates))


def _template(node: ast.expr) -> str:
  """Return 'a {}.' for the source `lambda c: f'a {c}.'`, '' for any other."""
  match = re.fullmatch(r"lambda (\w+): f(['\"])(.*)\2", ast.unparse(node))
  template = match[3].replace(f'{{{match[1]}}}', '{}') if match else ''
  return template if template.count('{') == template.count('{}') == 1 else ''


def _problems(content: dict[str, Any]) -> list[str]:
  """List what is wrong with the content of a user's file."""
  problems = []
  lists: dict[str, list[str]] = {'names': [], 'templates': [], 'labels': []}
  for key in lists:
    if key in content and not (wrong := _not_texts(content[key])):
      lists[key] = content[key]
    elif key in content:
      problems.append(f'{key!r} {wrong}')
    elif key != 'labels':
      problems.append(f'{key!r} is missing')
  for key in sorted(content.keys() - Prompts._fields):
    near = difflib.get_close_matches(key, Prompts._fields, n=1, cutoff=0.0)[0]
    problems.append(f'{key!r} is not a key; the nearest is {near!r}')
  for i, template in enumerate(lists['templates']):
    if template.count('{}') != 1:
      problems.append(
        f"'templates'[{i}] = {template!r} has {template.count('{}')} times "
        "'{}', where the name goes, not once"
      )
  names, labels = lists['names'], lists['labels']
  for label, times in collections.Counter(labels).items():
    if times > 1:
      problems.append(f"'labels' has {label!r} {times} times, not once")
  if names and labels and len(names) != len(labels):
    problems.append(f'there are {len(names)} names, but {len(labels)} labels')
  return problems


def _not_texts(value: Any) -> str:
  """Explain why `value` is not a list of texts; '' if it is."""
  if not isinstance(value, list):
    return f'is {text_lib.shown(value)}, not a list of texts'
  if not value:
    return 'is an empty list'
  wrong = [
    f'[{i}] = {text_lib.shown(text)}'
    for i, text in enumerate(value)
    if not isinstance(text, str) or not text.strip()
  ]
  if wrong:
    return f'holds what is no text: {", ".join(text_lib.first(wrong, _SHOWN))}'
  return ''
