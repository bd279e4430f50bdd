"""Programs that end in one line, whichever error or signal stops them."""

from collections.abc import Callable
import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

# Errors that a user can correct, which are printed without a traceback.
_EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def run(
  name: str,
  program: Callable[[], int | None],
  explain: Callable[[BaseException], str] = str,
) -> int:
  """Run a program; print in one line what has stopped it.

  SIGINT and SIGTERM raise KeyboardInterrupt in it, so that it removes what is
  incomplete. While a module is imported, which extensions written in C do not
  survive, they wait for its end.

  Args:
    name: of the program.
    program: what to run; returns its exit status, None for 0.
    explain: returns the text of an error that a user can correct.

  Returns:
    The exit status: that of the program; 1 after an error that was explained;
    130 or 143 when interrupted by SIGINT or SIGTERM.
  """
  numbers: list[int] = []

  def fail(line: object, status: int) -> int:
    print(f'{name}: {line}', file=sys.stderr, flush=True)
    return status

  def interrupted(number: int) -> int:
    return fail(f'interrupted by {signal.Signals(number).name}.', 128 + number)

  def receive(number: int, frame: types.FrameType | None) -> None:
    numbers.append(number)
    if not _is_importing(frame):
      raise KeyboardInterrupt
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    stack.callback(timer.cancel)
    timer.start()

  with contextlib.ExitStack() as stack:
    if threading.current_thread() is threading.main_thread():
      _raise_again()
      for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        # Other handlers are of who started this program, such as nohup.
        if handler in (signal.SIG_DFL, signal.default_int_handler):
          signal.signal(number, receive)
          stack.callback(signal.signal, number, handler)
    try:
      status = program() or 0
      return interrupted(numbers[0]) if numbers else status
    except BaseException as error:
      number = getattr(error, 'signal', None)  # of training.loop.Interrupted
      if number:
        return fail(error, 128 + number)
      # Libraries may have made another error of the interrupt.
      if numbers or isinstance(error, KeyboardInterrupt):
        # Python kills itself after an interrupt in an exec, such as that of
        # namedtuple, unless there is another exec.
        exec('')
        # Progress bars print when they go: now, not after the last line.
        traceback.clear_frames(error.__traceback__)
        return interrupted(numbers[0] if numbers else signal.SIGINT)
      if not isinstance(error, _EXPLAINED):
        raise
      jax = sys.modules.get('jax')  # imported by the program, or not
      if jax is not None and jax.distributed.is_initialized():
        traceback.print_exc()  # to show which process failed, and where
      return fail(explain(error), 1)


@functools.cache
def _raise_again() -> None:
  """Raise a KeyboardInterrupt again that Python would only print.

  Python prints what is raised in callbacks, such as that of jax for each
  garbage collection. The next call of any function after it raises again.
  """
  hook = sys.unraisablehook

  def filtered(unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
      sys.setprofile(interrupt)
    else:
      hook(unraisable)

  def interrupt(_: types.FrameType, event: str, __: Any) -> None:
    if event in ('call', 'c_call'):  # not the return from the hook
      sys.setprofile(None)
      raise KeyboardInterrupt

  sys.unraisablehook = filtered


def _is_importing(frame: types.FrameType | None) -> bool:
  """Return True if the program of `run` is importing a module."""
  while frame is not None and frame.f_code is not run.__code__:
    if frame.f_code.co_filename == '<frozen importlib._bootstrap>':
      return True
    frame = frame.f_back
  return False
