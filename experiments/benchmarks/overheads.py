r"""Costs of a run beside its steps: merges, checkpoints, compiling, starting.

    python experiments/benchmarks/overheads.py --size B/32 --batch 16

Two models with AdamW on one device, the programs of a run; images are noise. A
process is started cold, with an empty compilation cache and workdir, and once
more, to resume from the checkpoint, with the cache that the cold one has left
(what compiles in less than a second is not cached). Each measures, in seconds:

* from its first instant to the end of its first step: importing, loading the
  weights, creating or restoring the state, compiling the step, and taking it;
* the first merge, which compiles it;
* the least of `--repeats` steps and merges;
* the least of `--saves` saves of the real state (float32 weights and two
  moments of both models, and their merge): until `Checkpoints.save` returns,
  for which a run stands still, and until it is on disk.
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

from modelstock_jax import clip
from modelstock_jax.training import checkpoints
from modelstock_jax.training import state as state_lib

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')
START = ('import', 'load', 'create or restore', 'compile step', 'first step')


def write(size: str, folder: pathlib.Path) -> dict[str, Any]:
  """Write the weights that a run starts from; return the setting."""
  programs.save(programs.anchor(size), size, folder)
  return common.setting(PACKAGES)


def load(folder: pathlib.Path, run: programs.Run) -> Any:
  """Read the anchor, onto the device."""
  params = dict(clip.load_pretrained(folder).params)
  params['head'], _ = clip.load_head(folder)
  return jax.device_put(params, run.placement.params(params))


def like(run: programs.Run, anchor: Any) -> Any:
  """Return shapes and shardings of a checkpoint."""
  state = jax.eval_shape(run.create, anchor)
  merged = jax.eval_shape(run.programs.merge, anchor, state.params)
  placement = run.placement
  return state_lib.abstract(
    checkpoints.Checkpoint(state, merged, None),
    checkpoints.Checkpoint(
      placement.state(state), placement.merged(merged), None
    ),
  )


def start(
  args: argparse.Namespace, folder: pathlib.Path, began: float
) -> dict[str, float]:
  """Start a run or resume it, and measure its costs.

  Args:
    args: of the command line.
    folder: with `weights`, and the `run` to resume if there is one.
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
  anchor = load(folder / 'weights', run)
  stamp('load', anchor)
  with checkpoints.Checkpoints(folder / 'run') as saved:
    checkpoint = saved.restore(like(run, anchor))
    state = checkpoint.state if checkpoint else run.create(anchor)
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
  checkpoint = checkpoints.Checkpoint(state, merge(state), None)
  jax.block_until_ready((state.params, checkpoint.merged))
  held_up, on_disk = [], []
  for _ in range(args.saves):
    before = time.perf_counter()
    saved.save(max(saved.steps(), default=0) + 1, checkpoint)
    held_up.append(time.perf_counter() - before)
    saved.wait()
    on_disk.append(time.perf_counter() - before)
  times |= {'save, run held up': held_up, 'save, until on disk': on_disk}
  trees = state.params, state.opt_state, checkpoint.merged.params
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
  parser.add_argument(
    '--scratch', type=pathlib.Path, help='folder of the disk to save to'
  )
  args = parser.parse_args()
  # This process leaves the device to its children.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  with tempfile.TemporaryDirectory(dir=args.scratch) as name:
    folder = pathlib.Path(name)
    setting = common.alone(write, args.size, folder / 'weights')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
    cold, again = (
      common.alone(start, args, folder, time.time()) for _ in range(2)
    )
  rows = [
    {'seconds': part, 'cold': seconds, 'restart': again[part]}
    for part, seconds in cold.items()
  ]
  before = sum(cold[part] for part in ('import', 'load', 'compile step'))
  total = sum(again[part] for part in START)
  note = (
    f'restart to the end of the first step: {total:.2f} s, '
    f'{total / before:.2f} of import, load and compile of the cold start'
  )
  common.finish(args, setting, rows, [note])


if __name__ == '__main__':
  main()
