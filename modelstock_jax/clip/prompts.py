"""Names and templates of classes, for zero-shot classification."""

from collections.abc import Sequence
import hashlib
import re
from typing import Annotated
from typing import NamedTuple

import pydantic

from modelstock_jax.clip import tokenizer
from modelstock_jax.formats import text as text_lib

# SHA-256 of CLIP's 1000 names and 80 templates, one a line.
_SHA256 = 'e407fe7b3c574805c8c92e4ed5bda0d066f68431744233a766275aa163be3d2f'
_WNID = re.compile('n[0-9]{8}')  # a class of ImageNet, such as n01440764


def _check_template(template: str) -> str:
  if template.count('{}') != 1:
    raise ValueError("must have '{}' once, where the name goes")
  return template


_Text = Annotated[str, pydantic.StringConstraints(strict=True, pattern=r'\S')]
_Template = Annotated[_Text, pydantic.AfterValidator(_check_template)]
_NotEmpty = pydantic.Field(min_length=1)


class Prompts(NamedTuple):
  """K classes, each described by T templates.

  Attributes:
    names: K names, as they read within a text.
    templates: T texts, each with one '{}' where the name goes.
    labels: what the data set calls the K classes, in the order of `names`.
      None where it is not known.
  """

  names: Annotated[tuple[_Text, ...], _NotEmpty]
  templates: Annotated[tuple[_Template, ...], _NotEmpty]
  labels: tuple[_Text, ...] | None = None


def captions(prompts: Prompts) -> list[str]:
  """Return every template with every name in it, class by class.

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
  """Read CLIP's names of the 1000 classes of ImageNet, and its 80 templates.

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
  source = path.read_text('utf-8')
  after = source.partition('IMAGENET_CLASSNAMES')[2]
  names = re.findall('"(.*?)"', after)[:1000]
  lambdas = re.findall(r"lambda c: f'(.*)',\n", source)[:80]
  templates = [template.replace('{c}', '{}') for template in lambdas]
  lines = '\n'.join([*names, *templates])
  if hashlib.sha256(lines.encode()).hexdigest() != _SHA256:
    raise ValueError(
      f"{path} does not hold CLIP's class names and templates of ImageNet. Run "
      '`pip install --no-deps --force-reinstall open_clip_torch==3.3.0`.'
    )
  return Prompts(tuple(names), tuple(templates))


def read_prompts(path: text_lib.PathLike) -> Prompts:
  """Read names and templates from a JSON file.

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
  with text_lib.explained(f'{path} is not JSON: ', '.'):
    content = text_lib.read_json(path)
  try:
    return pydantic.TypeAdapter(Prompts).validate_python(content)
  except pydantic.ValidationError as error:
    problems = [
      text_lib.plain('.'.join(map(str, problem['loc'])))
      + f': {problem["msg"]}, got {text_lib.shown(problem["input"])}'
      for problem in error.errors()
    ]
    raise ValueError(
      f"{path} does not hold prompts. It takes 'names' and 'templates', lists "
      "of texts, and perhaps 'labels':\n  "
      + '\n  '.join(text_lib.first(problems, 10))
    ) from error


def check_labels(prompts: Prompts, labels: Sequence[str]) -> None:
  """Check that prompts are for the classes of a data set.

  Args:
    prompts: with `labels`, these must be the data set's. Without, only the
      number is checked, and that wnids ascend, as CLIP's names of ImageNet do.
    labels: the data set's class names, in the order of its integer labels.

  Raises:
    ValueError: the number or the order differs.

  >>> check_labels(Prompts(('cat', 'dog'), ('a {}.',)), ['felis', 'canis'])
  """
  is_imagenet = all(map(_WNID.fullmatch, labels))
  expected = prompts.labels or (sorted(labels) if is_imagenet else labels)
  counts = {'names': len(prompts.names), 'labels': len(expected)}
  wrong = [f'{n} {what}' for what, n in counts.items() if n != len(labels)]
  if wrong:
    raise ValueError(
      f'the data set has {len(labels)} classes, but the prompts have '
      f'{" and ".join(wrong)}. Give one for each class, in the order of the '
      'data set.'
    )
  different = [
    f'class {i} is {label!r} in the data set, {other!r} in the prompts'
    for i, (label, other) in enumerate(zip(labels, expected, strict=True))
    if label != other
  ]
  text_lib.raise_problems(
    f'{len(different)} of {len(labels)} classes of the prompts differ from '
    "the data set's. Put the names, and the data set's as 'labels', into its "
    'order.',
    different,
    most=5,
  )
