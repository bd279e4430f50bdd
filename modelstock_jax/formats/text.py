"""Text that others wrote: JSON files within limits, values in messages."""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import difflib
import json
import os
import pathlib
import re
import reprlib
from typing import Any

PathLike = str | os.PathLike[str]

# Limits of a JSON document: bytes, levels of nesting, and values, of which a
# file that lists tensors may have more. They bound the time and the memory.
MAX_BYTES = 100_000_000
MAX_DEPTH = 100
MAX_VALUES = 100_000
MANY_VALUES = 1_000_000
# Problems that a message lists.
MAX_PROBLEMS = 100

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80
_MAX_CHARACTERS = 200


def shown(value: object) -> str:
  r"""Return a value as a message quotes it: one short, printable line.

  >>> shown('a\x1b[2J')
  "'a\\x1b[2J'"
  >>> shown(['w'] * 9)
  "['w', 'w', 'w', 'w', 'w', 'w', ...]"
  """
  return plain(_REPR.repr(value))


def plain(name: str) -> str:
  """Return a name as a message has it: as `shown`, without quotes.

  Args:
    name: a text, of which the middle goes if it exceeds 200 characters.
  """
  if len(name) > _MAX_CHARACTERS:
    name = f'{name[:120]}...{name[-60:]}'
  return _escape(name)


def _escape(text: str) -> str:
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[str], most: int = 8) -> str:
  """Return the first names as a message lists them.

  >>> listed(['a', 'b', 'c'], most=2)
  "['a', 'b'] (3 of them)"
  """
  names = list(names)
  total = f' ({len(names)} of them)' if len(names) > most else ''
  return f'[{", ".join(map(shown, names[:most]))}]{total}'


def first(lines: list[str], most: int) -> list[str]:
  """Return the first lines, and one that counts the rest if there are more.

  >>> first(['a', 'b', 'c'], most=1)
  ['a', 'and 2 more']
  """
  more = len(lines) - most
  return lines[:most] + ([f'and {more} more'] if more > 0 else [])


def nearest(key: str, known: Iterable[str]) -> str:
  """Return the known key that is spelt most like this one.

  >>> nearest('basemodel', ['models', 'base_model'])
  'base_model'
  """
  return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def raise_problems(
  summary: str, problems: list[str], most: int = MAX_PROBLEMS
) -> None:
  """Raise one ValueError over all problems, if there are any.

  Args:
    summary: the first line: what is wrong, and what to do.
    problems: one a line.
    most: lines to show.

  >>> raise_problems('two are wrong.', ['a: is 3', 'b: is 4'], most=1)
  Traceback (most recent call last):
  ValueError: two are wrong.
    a: is 3
    and 1 more
  """
  if problems:
    lines = first(problems, most)
    raise ValueError('\n  '.join([summary, *lines]))


def first_line(error: BaseException) -> str:
  r"""Return the first line of an error's message, of 400 characters at most.

  >>> first_line(ValueError('NOT_FOUND: no such array\nSource: ...'))
  'NOT_FOUND: no such array'
  """
  text = str(error).strip().split('\n')[0]
  text = re.sub(r" \[tensorstore_spec='.*?'\]", '', text)  # a page of JSON
  return _cut(text, 400)


def _cut(line: str, most: int) -> str:
  if len(line) <= most:
    return line
  # What was tried comes first, the reason last.
  return f'{line[: most * 3 // 8]} ... {line[-most * 3 // 5 :]}'


def line(error: BaseException) -> str:
  r"""Return an error as one line: its type, and `first_line`.

  >>> line(ValueError('NOT_FOUND: no such array\nSource: ...'))
  'ValueError: NOT_FOUND: no such array'
  """
  text = first_line(error)
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


@contextlib.contextmanager
def explained(
  before: str,
  after: str = '',
  kinds: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> Iterator[None]:
  """Add to the message of an error what it is about.

  Args:
    before: text before the message.
    after: text after it.
    kinds: of the errors; others are passed on as they are.

  Raises:
    ValueError: an error of these kinds. A FileNotFoundError remains one.

  >>> with explained('config.json: ', kinds=KeyError):
  ...   {}['model']
  Traceback (most recent call last):
  ValueError: config.json: 'model'
  """
  try:
    yield
  except kinds as error:
    kind = type(error) if isinstance(error, FileNotFoundError) else ValueError
    cause = '\n'.join(
      _cut(_escape(line), 700) for line in str(error).split('\n')
    )
    raise kind(f'{before}{cause}{after}') from error


def parse_json(data: str | bytes, max_values: int = MAX_VALUES) -> Any:
  """Parse a JSON document that others wrote.

  Args:
    data: the text, or its UTF-8 bytes.
    max_values: the most values that it may have.

  Returns:
    What the document holds.

  Raises:
    ValueError: it is not JSON, has a key twice, or exceeds 100 MB, 100 levels
      or `max_values`. The message does not name the file: its reader does.

  >>> parse_json('{"a": 1, "a": 2}')
  Traceback (most recent call last):
  ValueError: the key 'a' stands twice
  """
  if len(data) > MAX_BYTES:
    raise ValueError(f'it has {len(data)} bytes, more than {MAX_BYTES}')
  if isinstance(data, bytes):
    data = data.decode('utf-8-sig')
  if sum(map(data.count, ',[{')) > max_values:
    raise ValueError(f'it has more than {max_values} values')
  try:
    value = json.loads(data, object_pairs_hook=_unique)
    if _depth(value) <= MAX_DEPTH:
      return value
  except RecursionError:
    pass
  raise ValueError(f'it is nested more than {MAX_DEPTH} deep')


def read_json(path: PathLike, max_values: int = MAX_VALUES) -> Any:
  """Parse a JSON file, see `parse_json`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: as `parse_json`.
  """
  with existing_file(path).open('rb') as file:
    return parse_json(file.read(MAX_BYTES + 1), max_values)


# How files begin that are not what they are named as, in lower case.
_STRANGERS = {
  b'version https://git-lfs': 'a pointer of git-lfs. Run `git lfs pull`',
  b'<!doctype': 'a web page. Log in where it comes from, and download the file',
}


def existing_file(path: PathLike) -> pathlib.Path:
  """Return the path of a file that exists, and is no pointer or web page.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a pointer of git-lfs, or a web page.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file.')
  with path.open('rb') as file:
    begin = file.read(30).lower()
  for start, what in _STRANGERS.items():
    if begin.startswith(start):
      raise ValueError(f'{path} is {what}.')
  return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  members = dict(pairs)
  if len(members) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {shown(twice)} stands twice')
  return members


def _depth(value: Any) -> int:
  """Return the number of levels of nesting of a JSON value."""
  if isinstance(value, dict):
    value = value.values()
  elif not isinstance(value, list):
    return 0
  return 1 + max(map(_depth, value), default=0)
