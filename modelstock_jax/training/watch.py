"""Whether a run moves, and how all of its processes come to a stop together.

A daemon thread of each process writes a word to the others every few seconds.
When one of them is lost, the others would wait for it in a collective for
ever, so their threads end them: at once if it was process 0; after
`SUSPECT_SECONDS` if it has died, which closes its line to process 0, or broken
a collective; after `LOST_SECONDS` if it is only silent.
"""

import ctypes
import faulthandler
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import jax

from modelstock_jax.training import hosts
from modelstock_jax.training import rollcall

_log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
_TICK_SECONDS = 0.25
LOST_SECONDS = 60.0
SUSPECT_SECONDS = 10.0
# A process that fails stays this long, so that the others hear why.
LEAVE_SECONDS = 10.0
# Steps may be slow, or wait for an evaluation: so many heartbeats of silence.
_STALLED_HEARTBEATS = 5

_ABORT_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Watch:
  """Watches a run of one process or several, from before it is prepared."""

  def __init__(
    self,
    heartbeat_seconds: float,
    *,
    together: tuple[type[BaseException], ...] = (),
  ):
    """Describes what to watch; entering it begins.

    Args:
      heartbeat_seconds: between lines that say how far the run is; 0 is none.
      together: errors that all processes raise at the same step. Any other
        that leaves the watch on one process ends the others as well.
    """
    self.checkpoints: pathlib.Path | None = None
    self.asked: int | None = None  # the signal that came to this process
    self._heartbeat = heartbeat_seconds
    self._together = together
    self._several = hosts.several()
    self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
    self._closing = threading.Event()
    self._ending = threading.Lock()
    self._failing = False
    # Guards what follows: the thread must not read a step that is left.
    self._steps = threading.Condition()
    self._step: int | None = None
    self._moved = time.monotonic()
    self._frozen = False  # while all agree where to stop
    self._stop_at: int | None = None
    self._signal: int | None = None
    # Of the thread alone.
    self._count = 0
    self._beats: dict[int, Any] = {}
    self._heard: dict[int, float] = {}
    self._reported = time.monotonic()
    self._stalled_at: int | None = None

  def reached(self, step: int) -> int | None:
    """Notes that a step was given to the devices; whether to stop after it.

    Args:
      step: optimizer steps, counted from 1; called for each of them.

    Returns:
      The signal that some process got, if all are to stop after this step;
      the same step on all of them.

    Raises:
      TimeoutError: if the others do not say how far they are.
    """
    with self._steps:
      if self._frozen and not self._steps.wait_for(
        lambda: self._stop_at is not None, LOST_SECONDS
      ):
        raise TimeoutError(
          f'Step {step}: a signal came, and for {LOST_SECONDS:g} s the '
          'processes could not agree where to stop.'
        )
      self._step, self._moved = step, time.monotonic()
      if not self._several:
        return self.asked
      if self._stop_at is not None and step >= self._stop_at:
        return self._signal
      return None

  def __enter__(self) -> 'Watch':
    if self._several:
      hosts.introduce()
      if hosts.index():  # process 0 has nobody to lose in that way
        # The client of the coordination service aborts the process as soon as
        # its server is gone, and can be told nothing else.
        self._on_abort = _ABORT_HANDLER(self._abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
    if self._several or self._heartbeat:
      self._thread.start()
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if not self._several or error is None or isinstance(error, self._together):
      self._close()
    else:
      self._fail(error)

  def _close(self) -> None:
    self._closing.set()
    if self._thread.is_alive():
      self._thread.join(BEAT_SECONDS)
    if self._several:
      hosts.put(f'beat/{hosts.index()}', json.dumps(None))  # that is all
      ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)

  def _fail(self, error: BaseException) -> None:
    """Tells the others; in the end does not wait for them as jax would."""
    if isinstance(error, jax.errors.JaxRuntimeError):
      # Perhaps another process is lost, and its thread will say so.
      hosts.put('news/suspect', '')
      time.sleep(SUSPECT_SECONDS + 4 * BEAT_SECONDS)
    self._failing = True
    text = f'{type(error).__name__}: {error}'
    hosts.put(f'news/failed {hosts.index()}', text)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    leave = threading.Timer(LEAVE_SECONDS, os._exit, [code])
    leave.daemon = True
    leave.start()

  def _run(self) -> None:
    last = -BEAT_SECONDS
    while not self._closing.wait(_TICK_SECONDS):
      now = time.monotonic()
      urgent = self._frozen or self.asked is not None
      if self._several and (urgent or now - last >= BEAT_SECONDS):
        last = now
        try:
          self._talk(now)
        except jax.errors.JaxRuntimeError as error:
          if hosts.index() and not rollcall.answers(hosts.coordinator()):
            self._end(self._without_process_0())
          _log.warning('The coordination service: %s', error)
      self._report(now)

  def _talk(self, now: float) -> None:
    """Tells the others how far this process is, and hears of them."""
    self._count += 1
    seconds = round(now - self._moved, 1)
    beat = [self._count, self._step, seconds]
    hosts.put(f'beat/{hosts.index()}', json.dumps(beat))
    if self.asked is not None and self._signal is None:
      hosts.put('news/signal', str(self.asked))
    news = hosts.read('news')
    if 'signal' in news:
      self._agree(int(news['signal']))
    if hosts.index() == 0:
      self._judge(now, 'suspect' in news)
    self._hear(news)

  def _agree(self, number: int) -> None:
    """Finds the first step that no process has left yet, the same for all."""
    self._signal = number
    if self._stop_at is not None:
      return
    with self._steps:
      self._frozen = True
      step = self._step or 0
    hosts.put(f'stop/{hosts.index()}', str(step))
    found = hosts.read('stop')
    if len(found) == hosts.count():
      with self._steps:
        self._stop_at = 1 + max(map(int, found.values()))
        self._steps.notify_all()

  def _judge(self, now: float, suspect: bool) -> None:
    """On process 0: tells all of them when one has been silent for long."""
    for process, text in hosts.read('beat').items():
      beat = json.loads(text)
      if beat != self._beats.get(int(process), ()):
        self._beats[int(process)] = beat
        self._heard[int(process)] = now
    suspects = set(self._beats) if suspect else hosts.hung_up()
    silent = {
      process: now - self._heard[process]
      for process, beat in self._beats.items()
      if beat is not None
    }
    lost = [
      process
      for process, seconds in silent.items()
      if seconds > (SUSPECT_SECONDS if process in suspects else LOST_SECONDS)
    ]
    if lost:
      steps = ', '.join(_step_name(self._beats[i][1]) for i in lost)
      seconds = min(silent[i] for i in lost)
      hosts.put(
        'news/lost',
        f'{hosts.describe_all(lost)} is lost: not heard of for {seconds:.0f} '
        f's, last at {steps}.',
      )

  def _hear(self, news: dict[str, str]) -> None:
    if 'lost' in news:
      if hosts.index() == 0:  # who holds the news
        time.sleep(2 * BEAT_SECONDS)
      self._end(news['lost'])
    failed = {
      int(key.split()[1]): text
      for key, text in news.items()
      if key.startswith('failed ')
    }
    failed.pop(hosts.index(), None)
    if failed and not self._failing:
      time.sleep(BEAT_SECONDS)  # this one may be about to raise the same
      if not self._failing:
        process, text = min(failed.items())
        self._end(f'{hosts.describe(process)} has stopped: {text}')

  def _end(self, text: str) -> None:
    """Ends this process, whatever its other threads wait for."""
    if self._failing:  # and has said why
      os._exit(1)
    if not self._ending.acquire(blocking=False):
      time.sleep(LOST_SECONDS)  # another thread is at it
    print(
      f'\nmodelstock: {text}\nProcess {hosts.index()} stops as well. '
      f'{self._what_next()}',
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    os._exit(1)

  def _abort(self, _: int) -> None:
    """On SIGABRT, in the thread that aborts: returning lets it."""
    # A process that dies closes its sockets one after another: what it hears
    # with may outlive for a moment the line that broke.
    patience = time.monotonic() + BEAT_SECONDS
    while not self._failing and rollcall.answers(hosts.coordinator()):
      if time.monotonic() > patience:
        return  # process 0 is there: the abort has another reason
      time.sleep(_TICK_SECONDS)
    self._end(self._without_process_0())

  def _without_process_0(self) -> str:
    return f'process 0 ({hosts.coordinator()}) is lost.'

  def _what_next(self) -> str:
    if self.checkpoints is None:
      return 'Run the same command again.'
    steps = []
    if self.checkpoints.is_dir():
      names = [path.name for path in self.checkpoints.iterdir()]
      steps = [int(name) for name in names if name.isdecimal()]
    if not steps:
      return 'There is no checkpoint yet: the same command begins again.'
    return f'The same command goes on from step {max(steps)}.'

  def _report(self, now: float) -> None:
    """The heartbeat of process 0, and every process's word when it stalls."""
    if not self._heartbeat:
      return
    step, idle = self._step, now - self._moved
    if hosts.index() == 0 and now - self._reported >= self._heartbeat:
      self._reported = now
      where = 'Preparing' if step is None else f'Step {step}'
      _log.info('%s, for %.1f s.%s', where, idle, self._who_was_heard(now))
    stalled = idle > _STALLED_HEARTBEATS * self._heartbeat
    if step is None or not stalled or self._stalled_at == step:
      return
    self._stalled_at = step
    _log.warning(
      'No step for %.0f s after step %d.%s%s Stacks of all threads follow.',
      idle,
      step,
      self._who_was_heard(now),
      self._who_is_behind(),
    )
    if sys.__stderr__ is not None:
      faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

  def _who_was_heard(self, now: float) -> str:
    if not self._heard:
      return ''
    ages = {process: now - then for process, then in self._heard.items()}
    late = {i: age for i, age in ages.items() if age > 3 * BEAT_SECONDS}
    if not late:
      return f' All {len(ages)} processes were heard of within 6 s.'
    names = [f'{hosts.describe(i)} for {age:.0f} s' for i, age in late.items()]
    return f' Not heard of {", ".join(names[:8])}.'

  def _who_is_behind(self) -> str:
    steps = {i: beat[1] or 0 for i, beat in self._beats.items() if beat}
    if not steps:
      return ''
    least, most = min(steps.values()), max(steps.values())
    if least == most:
      return f' All {len(steps)} processes are at step {least}.'
    behind = [i for i, step in steps.items() if step == least]
    return f' Behind, at step {least}: {hosts.describe_all(behind)}.'


def _step_name(step: int | None) -> str:
  return 'its preparation' if step is None else f'step {step}'


class Signals:
  """Remembers SIGINT and SIGTERM; a second SIGINT is not waited for."""

  def __init__(self, watch: Watch):
    self._watch = watch
    self._before: dict[int, Any] = {}

  def __enter__(self) -> None:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._receive)

  def _receive(self, number: int, _: Any) -> None:
    if self._watch.asked is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._watch.asked = number

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._before.items():
      # Python cannot put back what other code has set, such as jax's own.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
