"""Calls that read remote paths, within a time limit."""

from collections.abc import Callable
import os
import threading
from typing import Any
from typing import TypeVar

# Seconds that a remote path may take to answer.
TIMEOUT = 60.0

T = TypeVar('T')


def with_timeout(path: str | os.PathLike[str], function: Callable[[], T]) -> T:
  """Call a function that reads `path`, with a time limit if it is remote.

  Args:
    path: of data; remote if it has a scheme, as 'gs://bucket'.
    function: what to call.

  Returns:
    The result of the function.

  Raises:
    TimeoutError: there is no result after `TIMEOUT` seconds.
    ImportError: the package that reads such paths is not installed.

  >>> with_timeout('/data', lambda: 'there')
  'there'
  """
  if '://' not in str(path):
    return function()
  outcome: dict[str, Any] = {}

  def call() -> None:
    try:
      outcome['result'] = function()
    except BaseException as error:  # raised in the calling thread
      outcome['error'] = error

  # A pool would wait for its threads at exit; this one may never end.
  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(TIMEOUT)
  advice = (
    'Mount the bucket (gcsfuse, with its metadata cache) and give the folder, '
    'which is also the faster way to read single records.'
  )
  if not outcome:
    raise TimeoutError(
      f'{path} has not answered for {TIMEOUT:g} s. Is the name right, the '
      f'network up and the login valid (gcloud auth login)? {advice}'
    )
  error = outcome.get('error')
  if isinstance(error, ImportError):
    raise ImportError(f'{path} cannot be read: {error}. {advice}') from error
  if error is not None:
    raise error
  return outcome['result']
