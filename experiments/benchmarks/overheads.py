r"""Costs of a run beside its steps: merges, checkpoints, compiling, starting.

    python experiments/benchmarks/overheads.py --size B/32 --batch 16

Two models with AdamW on one device, the programs of a run; images are noise. A
process is started cold, with an empty compilation cache and workdir, and once
more, to resume from the checkpoint, with the cache that the cold one has left
(what compiles in less than a second is not cached). Each measures, in seconds:

* from its first instant to the end of its first step: importing, drawing the
  anchor, creating or restoring the state, compiling the step, and taking it;
* the first merge, which compiles it;
* the least of `--repeats` steps and merges;
* the least of `--saves` saves of the real state (float32 weights and two
  moments of both models, and their merge): until `Checkpoints.save` returns,
  for which a run stands still, and until it is on disk. $TMPDIR names the disk.
"""

import argparse
from collections.abc import Callable
import os
import pathlib
import tempfile
import time
from typing import Any

import common
import jax
import programs

from modelstock_jax.training import checkpoints
from modelstock_jax.training import state as state_lib

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')
START = ('import', 'anchor', 'create or restore', 'compile step', 'first step')


def start(
  args: argparse.Namespace, folder: pathlib.Path, began: float
) -> dict[str, float]:
  """Start a run or resume it, and measure its costs.

  Args:
    args: of the command line.
    folder: of checkpoints; one there is resumed from.
    began: when this process was started, `time.time()`.

  Returns:
    Seconds by part.
  """
  parts: dict[str, float] = {}

  def stamp(part, *results):
    jax.block_until_ready(results)
    parts[part] = time.time() - began - sum(parts.values())

  stamp('import')
  run: Any = programs.prepare(args.size, args.dtype, args.batch)
  anchor = programs.anchor(args.size)
  stamp('anchor', anchor)
  with checkpoints.Checkpoints(folder) as saved:
    shapes = jax.eval_shape(run.programs.create, *run.start(anchor))
    merged = jax.eval_shape(run.programs.merge, anchor, shapes.params)
    checkpoint = saved.restore(checkpoints.Checkpoint(shapes, merged, None))
    if checkpoint:
      state = checkpoint.state
    else:
      state = run.programs.create(*run.start(anchor))
    stamp('create or restore', state.params)
    lowered = run.programs.train.lower(state, run.batch, anchor, (), {})
    compiled = lowered.compile()
    stamp('compile step')

    def train(state):
      return compiled(state, run.batch, anchor, (), {})

    def merge(state):
      return run.programs.merge(anchor, state.params)

    state, metrics = train(state)
    stamp('first step', metrics)
    stamp('first merge', merge(state))
    return parts | costs(args, saved, train, merge, state)


def costs(
  args: argparse.Namespace,
  saved: checkpoints.Checkpoints,
  train: Callable[[Any], tuple[Any, Any]],
  merge: Callable[[Any], Any],
  state: state_lib.State,
) -> dict[str, float]:
  """Return the least seconds of a step, a merge and a save.

  Args:
    args: of the command line.
    saved: where to save.
    train: state -> state, metrics.
    merge: state -> the merge.
    state: of both models.
  """

  def step():
    nonlocal state
    state, metrics = train(state)
    return metrics

  rows = {'step': step, 'merge': lambda: merge(state)}
  times = common.measure(rows, args.repeats)
  merged = jax.block_until_ready(merge(state))
  checkpoint = checkpoints.Checkpoint(state, merged, None)
  held_up, on_disk = [], []
  for _ in range(args.saves):
    before = time.perf_counter()
    saved.save(max(saved.steps(), default=0) + 1, checkpoint)
    held_up.append(time.perf_counter() - before)
    saved.wait()
    on_disk.append(time.perf_counter() - before)
  times |= {'save, run held up': held_up, 'save, until on disk': on_disk}
  trees = state.params, state.opt_state, merged.params
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 1e9
  return {name: min(seconds) for name, seconds in times.items()} | {
    'checkpoint, GB': size
  }


def main() -> None:
  """Run the benchmark and print its table."""
  parser = common.parser(__doc__, repeats=5)
  sizes, dtypes = programs.SIZES, programs.DTYPES
  parser.add_argument('--size', choices=sizes, default='B/32')
  parser.add_argument('--dtype', choices=dtypes, default='bfloat16')
  parser.add_argument('--batch', type=int, default=8, help='of each model')
  parser.add_argument('--saves', type=int, default=3)
  args = parser.parse_args()
  # This process leaves the device to its children.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  with tempfile.TemporaryDirectory() as name:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{name}/compiled'
    folder = pathlib.Path(name, 'run')
    setting = common.alone(common.setting, PACKAGES)
    cold, again = (
      common.alone(start, args, folder, time.time()) for _ in range(2)
    )
  rows = [
    {'seconds': part, 'cold': seconds, 'restart': again[part]}
    for part, seconds in cold.items()
  ]
  first, resumed = (sum(x[part] for part in START) for x in (cold, again))
  note = (
    f'to the end of the first step: {first:.2f} s; restart: {resumed:.2f} s'
  )
  common.finish(args, setting, rows, [note])


if __name__ == '__main__':
  main()
