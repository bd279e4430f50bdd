"""The metrics of a run: JSON lines, TensorBoard events, a progress line."""

from collections.abc import Callable
import contextlib
import json
import logging
import os
import pathlib
import sys
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax
import tensorboardX
import tqdm

from modelstock_jax import merging
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import clock as clock_lib

FILE = 'metrics.jsonl'

# Above this mean ratio the merge is almost a plain average.
PLAIN_AVERAGE = 0.99

COMPILING = 'compiling (about 20 s)'

# Called with a step, its numbers by their tags, and arrays of layers likewise.
Mirror = Callable[[int, dict[str, float], dict[str, np.ndarray]], None]

_log = logging.getLogger(__name__)


class Writer(contextlib.ExitStack):
  """A writer of metrics.jsonl and TensorBoard events; on process 0 only.

  A line is {'step': optimizer steps taken, 'kind': ..., and values}, so that
  a run that resumes from step k can drop the lines that it writes again.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    start: int,
    mirror: Mirror | None = None,
  ):
    """Open the files of a run.

    Args:
      workdir: of the run.
      start: the step that the run resumes from; lines of later steps are
        dropped.
      mirror: is given what TensorBoard is.
    """
    super().__init__()
    self._mirror = mirror
    writes = jax.process_index() == 0
    path = pathlib.Path(workdir) / FILE if writes else pathlib.Path(os.devnull)
    if writes:
      lines = [line for line in read(workdir) if line['step'] <= start]
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      write_lib.write_text(path, text)
    self._file = self.enter_context(path.open('a', encoding='utf-8'))
    self._events = self.enter_context(
      tensorboardX.SummaryWriter(
        str(workdir), purge_step=start + 1, write_to_disk=writes
      )
    )

  def write(self, step: int, kind: str, **values: Any) -> None:
    """Append one line, and its numbers as TensorBoard scalars.

    TensorBoard has of the layers their histogram, mean, least and greatest.

    Args:
      step: optimizer steps taken.
      kind: 'train', 'merge' or 'validation'.
      **values: numbers, lists of them (one for each model), dicts of them (one
        for each layer) or texts.
    """
    line = {'step': step, 'kind': kind, **values}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()  # to be read while the run continues
    scalars, layers = {}, {}
    for name, value in values.items():
      tag = f'{kind}/{name}'
      if isinstance(value, list):
        models = {f'{tag}/model_{i}': x for i, x in enumerate(value)}
        scalars |= {k: x for k, x in models.items() if x is not None}
      elif isinstance(value, dict) and value:
        layers[tag] = array = np.array(list(value.values()), np.float64)
        for summary in (np.mean, np.min, np.max):
          scalars[f'{tag}/{summary.__name__}'] = float(summary(array))
      elif isinstance(value, (int, float)):
        scalars[tag] = float(value)
    for tag, value in scalars.items():
      self._events.add_scalar(tag, value, step)
    for tag, array in layers.items():
      finite = array[np.isfinite(array)]
      if finite.size:
        # By default there are 1,500 bins, which would take most of the log.
        self._events.add_histogram(tag, finite, step, bins='sturges')
    if self._mirror and jax.process_index() == 0:
      self._mirror(step, scalars, layers)

  def flush(self) -> None:
    """Write everything to disk; before a checkpoint of the same step."""
    self._file.flush()
    self._events.flush()


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """Read a run's metrics.jsonl, without an incomplete last line.

  Raises:
    ValueError: another line is none of a `Writer`.
  """
  path = pathlib.Path(workdir) / FILE
  lines = []
  if path.exists():
    rows = path.read_bytes().split(b'\n')
    for number, row in enumerate(rows, 1):
      try:
        line = text_lib.parse_json(row)
        if type(line['step']) is not int or type(line['kind']) is not str:
          raise TypeError('step or kind')
      except (ValueError, LookupError, TypeError) as error:
        if number == len(rows):
          break
        raise ValueError(
          f'{path}: line {number} is not of a run ({text_lib.shown(error)}). '
          'Remove the line, or move the file away.'
        ) from error
      lines.append(line)
  return lines


def progress(total: int, *, start: int, title: str) -> tqdm.tqdm:
  """Make a line with step, speed, loss and time to go; on process 0 only."""
  return tqdm.tqdm(
    total=total,
    initial=start,
    desc=title,
    unit='step',
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
    # Seconds between updates: few lines in a log file, many on a terminal.
    mininterval=0.1 if sys.stderr.isatty() else 10.0,
    smoothing=0,  # a merge takes longer than a step: the mean foretells best
  )


class StepLog(Writer):
  """Writer of a run, and a progress line.

  Metrics stay on the devices until they are due, and are then checked.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    start: int,
    total: int,
    title: str,
    every: int,
    num_models: int,
    batch_size: int,
    stop: bool,
    mirror: Mirror | None = None,
  ):
    """Begin a log.

    Args:
      workdir: of the run.
      start: the step that the run resumes from.
      total: steps of the run.
      title: of the progress line.
      every: steps from a line to the next.
      num_models: N.
      batch_size: examples of each model in a step.
      stop: True if a number that is not finite ends the run, as it does where
        models are to be merged.
      mirror: see `Writer`.
    """
    super().__init__(workdir, start=start, mirror=mirror)
    self._bar = self.enter_context(progress(total, start=start, title=title))
    self.callback(self._end_compiling)  # the last line is of the run
    self._every = every
    self._num_models = num_models
    self._examples = num_models * batch_size
    self._stop = stop
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    self._last = (start, time.perf_counter())
    self._kinds: set[tuple[bool, ...]] = set()
    self._start_compiling()
    self._warned = jax.process_index() > 0  # process 0 warns for all

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keep the metrics of a step, which may not be computed yet."""
    self._end_compiling()
    self._pending.append((step, metrics))
    if step % self._every == 0:
      self.check()

  def check(self, due: clock_lib.Due | None = None) -> None:
    """Fetch what is pending; stop the run at the first bad number.

    Args:
      due: what follows this check, before the next step, if anything.

    Raises:
      FloatingPointError: a loss or gradient is not finite; names the step and
        the model.
    """
    pending, self._pending = self._pending, []
    for step, metrics in jax.device_get(pending):
      loss, norm = metrics['loss'], metrics['grad_norm']
      bad = ~(np.isfinite(loss) & np.isfinite(norm))
      if self._stop and bad.any():
        model = int(np.argmax(bad))
        raise FloatingPointError(
          f'Step {step}, model {model}: the loss is {loss[model]}, the norm of '
          f'its gradient {norm[model]}. This step is in no checkpoint; lower '
          'train.learning_rate (now at '
          f'{metrics["learning_rate"]:.2e}).'
        )
      self._bar.update(step - self._bar.n)
      if step % self._every == 0:
        self._write(step, metrics)
    if due and (due.merge, due.evaluate) not in self._kinds:
      self._kinds.add((due.merge, due.evaluate))
      self._start_compiling()

  def merge(
    self, step: int, merged: merging.Merged, norms: Any, due: clock_lib.Due
  ) -> None:
    """Write what a merge measured; warn of a plain average.

    Args:
      step: optimizer steps taken.
      merged: the merge of these models.
      norms: of the displacements, a mean over models: float32[] by leaf.
      due: at this step. The merge is only measured unless one is due, and
        has no values of layers unless they are.
    """
    ratio = merging.by_path(merged.ratio)
    mean = float(np.mean(list(ratio.values())))
    several = self._num_models > 1
    if several and due.merge and mean > PLAIN_AVERAGE and not self._warned:
      self._warned = True  # those that follow are in metrics.jsonl
      _log.warning(
        'Step %d: the mean ratio is %.3f: this merge is almost a plain '
        'average, as all models moved in the same direction from the anchor.',
        *(step, mean),
      )
    self.write(
      step,
      'merge',
      epoch=due.epoch,
      restarts=due.merge and not due.last,
      mean_ratio=mean,
      # One model has no angle.
      cosine=merging.by_path(merged.cosine if several and due.by_layer else {}),
      ratio=ratio if due.by_layer else {},
      norm=merging.by_path(norms),
    )

  def validation(self, step: int, scores: dict[str, float], epoch: int) -> None:
    """Write the scores of a merge, and log them."""
    self.write(step, 'validation', **scores, epoch=epoch)
    texts = [f'{name} {x:.4g}' for name, x in scores.items() if name != 'n']
    _log.info('Epoch %d: validation %s.', epoch, ', '.join(texts))

  def _start_compiling(self) -> None:
    self._compiling: float | None = time.perf_counter()
    self._bar.set_postfix_str(COMPILING)

  def _end_compiling(self) -> None:
    """Leave what was compiled out of the speed and of the time to go."""
    if self._compiling is None:
      return
    seconds = time.perf_counter() - self._compiling
    self._compiling = None
    if not self._bar.disable:
      self._bar.start_t += seconds
      self._bar.last_print_t += seconds  # or it closes as if never shown
    self._last = (self._last[0], self._last[1] + seconds)
    self._bar.set_postfix_str('')

  def _write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
    since, then = self._last
    now = time.perf_counter()
    speed = self._examples * (step - since) / (now - then)
    self._last = (step, now)
    values = {name: _in_json(value) for name, value in metrics.items()}
    self.write(step, 'train', **values, images_per_second=speed)
    self._bar.set_postfix_str(
      f'loss {np.mean(metrics["loss"]):.3f}, {speed:.0f} images/s'
    )


def _in_json(values: Any) -> Any:
  """Return numbers for JSON: null for those that are not finite."""
  if np.ndim(values):
    return [_in_json(value) for value in values]
  return float(values) if np.isfinite(values) else None


def check_finite(
  step: int, anchor: Any, params: Any, merged: merging.Merged
) -> None:
  """Stop the run if a step with a finite loss gave weights that are not finite.

  Their cosine is not finite either, so the weights are not read again.

  Args:
    step: optimizer steps taken.
    anchor: what the models were merged relative to.
    params: of the models; leaves [N, ...].
    merged: their merge.

  Raises:
    FloatingPointError: names the step, the model and the layers.
  """
  cosine = merging.by_path(merged.cosine)
  lost = [path for path, value in cosine.items() if not np.isfinite(value)]
  if not lost:
    return

  def is_finite(model: Any) -> jax.Array:
    displacement = jax.tree.map(jnp.subtract, model, anchor)
    return jnp.isfinite(optax.tree.norm(displacement))

  finite = jax.device_get(jax.vmap(is_finite)(params))
  raise FloatingPointError(
    f'Step {step}, model {int(np.argmin(finite))}: its weights after the step '
    f'are not finite, or not near the anchor, in {lost}. This step is '
    'in no checkpoint; lower train.learning_rate.'
  )
