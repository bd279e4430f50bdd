"""One process; several are in `test_hosts.py`."""

import logging
import re
import time

import pytest

from modelstock_jax.training import hosts
from modelstock_jax.training import rollcall
from modelstock_jax.training import watch as watch_lib


def _wait_for(text, caplog):
  deadline = time.monotonic() + 30
  while text not in caplog.text:
    assert time.monotonic() < deadline, caplog.text
    time.sleep(0.01)


def test_signs_of_life(caplog):
  with (
    caplog.at_level(logging.INFO, 'modelstock_jax'),
    watch_lib.Watch(0.3) as watch,
  ):
    _wait_for('Preparing, for ', caplog)
    watch.reached(7)
    _wait_for('Step 7, for ', caplog)
  lines = [record.getMessage() for record in caplog.records]
  assert re.match(r'Preparing, for \d+\.\d s\.', lines[0])
  assert re.match(r'Step 7, for \d+\.\d s\.', lines[-1])
  assert not any('processes' in line for line in lines)


def test_a_stall_shows_the_stacks_once(caplog, capfd):
  with watch_lib.Watch(0.1) as watch:
    time.sleep(1.0)  # a long preparation is no stall
    assert 'No step' not in caplog.text
    watch.reached(3)
    _wait_for('after step 3.', caplog)
    time.sleep(1.0)  # it has said so
    assert caplog.text.count('No step for') == 1
    watch.reached(4)
    _wait_for('after step 4.', caplog)
  assert caplog.text.count('No step for') == 2
  stacks = capfd.readouterr().err
  assert stacks.count('test_a_stall_shows_the_stacks_once') == 2


def test_off_it_has_no_thread(caplog):
  with (
    caplog.at_level(logging.INFO, 'modelstock_jax'),
    watch_lib.Watch(0) as watch,
  ):
    assert not watch._thread.is_alive()
    assert watch.reached(1) is None
  assert not caplog.records


def test_it_ends_with_the_run():
  watch = watch_lib.Watch(60.0)
  with pytest.raises(ZeroDivisionError), watch:
    assert 1 / (not watch._thread.is_alive())
  assert not watch._thread.is_alive()


def test_a_signal_is_for_the_step_it_came_in():
  with watch_lib.Watch(60.0) as watch:
    assert watch.reached(1) is None
    watch.asked = 15
    assert watch.reached(2) == 15


@pytest.mark.parametrize(
  ('answers', 'ends'),
  [([False], True), ([True, True, False], True), ([], False)],
)
def test_an_abort_is_told_when_process_0_is_gone(monkeypatch, answers, ends):
  """It may listen for a moment after the line to it is broken."""
  left = iter(answers)
  told = []
  monkeypatch.setattr(watch_lib, 'BEAT_SECONDS', 0.5)
  monkeypatch.setattr(hosts, 'coordinator', lambda: '10.0.0.1:1234')
  monkeypatch.setattr(rollcall, 'answers', lambda _: next(left, True))
  watch = watch_lib.Watch(60.0)
  monkeypatch.setattr(watch, '_end', told.append)
  watch._abort(6)
  assert told == ['process 0 (10.0.0.1:1234) is lost.'] * ends
