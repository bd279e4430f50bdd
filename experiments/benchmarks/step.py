r"""Time of a training step: two models in one, and torch for comparison.

    python experiments/benchmarks/step.py --size B/32 --batch 128

The programs are those of a run (`training.step.compile_programs` on a real
classifier, with AdamW), on one device; images are noise, there already. Rows:

* side_by_side, in_turn: two models in one step, under `vmap` or `lax.map`;
* block: side by side, with rematerialisation;
* two_singles: two models, each by a step for one model that knows nothing of
  stacks, one after the other: what side_by_side is to be compared with;
* one: one of these;
* torch, torch_compile: one model by `transformers` and torch, see
  torch_step.py.

All rows start from the same weights; the loss and the gradient norm of the
first step must agree, or their times mean nothing. A timing is of several
steps in a chain. Rows take turns within every repeat, in one process; memory
is the peak of a process for each row: on a GPU of its allocator, on a CPU of
the resident set, interpreter and compiler included.

MFU is analytic FLOPs of both passes (see `clip.flops`) over time, of the rate
of a product of two square matrices in the same run.
"""

import argparse
from collections.abc import Callable
import functools
import importlib
import os
import tempfile
from typing import Any
from typing import NamedTuple

import common
import jax
from jax import numpy as jnp
import numpy as np
import optax
import programs

from modelstock_jax import clip
from modelstock_jax.clip import flops

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'transformers')


class Case(NamedTuple):
  """A network, the dtype of its products, and the images of each model."""

  size: str
  dtype: str
  batch_size: int


# Starts a step; returns losses and gradient norms, by model, on their way.
Row = Callable[[], tuple[Any, Any]]


def stacked(case: Case, **changes: Any) -> Row:
  """Return the row of two models, by the programs of a run."""
  run = programs.prepare(*case, **changes)
  anchor = programs.anchor(case.size)
  state = run.programs.create(*run.start(anchor))

  def step():
    nonlocal state
    state, metrics = run.programs.train(state, run.batch, anchor, (), {})
    return metrics['loss'], metrics['grad_norm']

  return step


def train_single(
  model: clip.Model,
  step: jax.Array,
  params: Any,
  opt_state: Any,
  batch: dict[str, jax.Array],
) -> tuple[tuple[Any, ...], tuple[jax.Array, jax.Array]]:
  """Advance one model, as one would write it without a stack.

  Returns:
    The step, params and state after it; the loss and the gradient norm.
  """
  loss = functools.partial(programs.loss, model)
  value, grads = jax.value_and_grad(loss)(params, batch)
  rate = jnp.asarray(programs.SCHEDULE(step))
  params, opt_state = programs.ADAMW.step(
    params, grads, opt_state, rate, None, {}
  )
  return (step + 1, params, opt_state), (value, optax.tree.norm(grads))


def singles(case: Case, models: int) -> Row:
  """Return the row of models that `train_single` trains one after another."""
  model = clip.classifier(
    programs.SIZES[case.size], programs.CLASSES, case.dtype
  )
  train = jax.jit(
    functools.partial(train_single, model), donate_argnums=(0, 1, 2)
  )
  both = jax.device_put(programs.batch(case.size, case.batch_size))
  batches = [{k: v[i] for k, v in both.items()} for i in range(models)]
  anchors = [programs.anchor(case.size) for _ in range(models)]
  states = [(jnp.int32(0), w, programs.ADAMW.init(w)) for w in anchors]

  def step():
    results = []
    for i, batch in enumerate(batches):
      states[i], values = train(*states[i], batch)
      results.append(values)
    losses, norms = zip(*results, strict=True)
    return losses, norms

  return step


def torch_row(case: Case, compiled: bool) -> Row:
  """Return the row of torch, on the same weights."""
  module = importlib.import_module('torch_step')
  both = programs.batch(case.size, case.batch_size)
  one = {k: v[0] for k, v in both.items()}
  with tempfile.TemporaryDirectory() as folder:
    clip.save_pretrained(
      programs.anchor(case.size),
      folder,
      config=programs.SIZES[case.size],
      labels=[str(label) for label in range(programs.CLASSES)],
    )
    return module.row(folder, one, case.dtype, compiled)


ROWS: dict[str, Callable[[Case], Row]] = {
  'side_by_side': stacked,
  'in_turn': functools.partial(stacked, models='map'),
  'block': functools.partial(stacked, remat='block'),
  'two_singles': functools.partial(singles, models=2),
  'one': functools.partial(singles, models=1),
  'torch': functools.partial(torch_row, compiled=False),
  'torch_compile': functools.partial(torch_row, compiled=True),
}


def wait(step: tuple[Any, Any]) -> np.ndarray:
  """Wait for a step; return loss and gradient norm of the first model."""
  jax.block_until_ready(step)
  return np.array([float(values[0]) for values in step])


def check(first: dict[str, np.ndarray], dtype: str) -> None:
  """Check that losses and gradient norms are those of the first row."""
  # A GPU's float32 is TF32, with as many digits as float16.
  rough = dtype == 'bfloat16' or jax.default_backend() == 'gpu'
  base, *_ = first
  for name, values in first.items():
    if not np.allclose(values, first[base], rtol=3e-2 if rough else 1e-3):
      raise ValueError(
        f'{name}: loss and norm of the gradient are {values}, those of {base} '
        f'are {first[base]}.'
      )


def speed(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
  """Time all rows of a case beside a product of matrices."""
  rows, models, first = {}, {}, {}
  for name in args.rows:
    rows[name] = ROWS[name](case)
    step = rows[name]()
    models[name], first[name] = len(step[0]), wait(step)
  check(first, case.dtype)

  def chain(row):
    for _ in range(args.steps - 1):
      row()
    return wait(row())

  side = 8192 if jax.default_backend() == 'gpu' else 2048
  square = jnp.ones((side, side), case.dtype)
  matmul = jax.jit(jnp.matmul)
  calls: dict[str, Callable[[], Any]] = {
    name: functools.partial(chain, row) for name, row in rows.items()
  }
  calls['matmul'] = lambda: [matmul(square, square) for _ in range(args.steps)]
  times = {
    name: [t / args.steps for t in seconds]
    for name, seconds in common.measure(calls, args.repeats, warmup=1).items()
  }
  peak = 2 * side**3 / min(times['matmul'])
  work = flops.train(programs.SIZES[case.size], programs.CLASSES)
  base = times.get('two_singles')
  lines = []
  for name in rows:
    each = min(times[name]) / models[name]
    lines.append(
      {
        **case._asdict(),
        'row': name,
        **common.milliseconds(times[name]),
        'images/s': case.batch_size / each,
        'MFU': case.batch_size / each * work / peak,
        'each model / two_singles': base and 2 * each / min(base),
      }
    )
  lines.append({'row': 'matmul', **common.milliseconds(times['matmul'])})
  return lines


def memory(case: Case, name: str) -> float:
  """Return the peak of a row in GB; this process does nothing else."""
  row = ROWS[name](case)
  for _ in range(2):
    wait(row())
  if name.startswith('torch'):
    peak = importlib.import_module('torch_step').peak_bytes()
  else:
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get('peak_bytes_in_use', 0)
  return (peak or common.peak_bytes()) / 1e9


def main() -> None:
  """Run the benchmark and print its table."""
  parser = common.parser(__doc__, repeats=5)
  sizes, dtypes = programs.SIZES, programs.DTYPES
  parser.add_argument('--size', nargs='+', choices=sizes, default=['B/32'])
  parser.add_argument('--dtype', nargs='+', choices=dtypes, default=dtypes)
  parser.add_argument('--batch', type=int, default=8, help='of each model')
  parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS)[:5])
  parser.add_argument('--steps', type=int, default=1, help='in a timing')
  args = parser.parse_args()
  # This process leaves the device to its children.
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  setting = common.alone(common.setting, PACKAGES)
  rows = []
  for size in args.size:
    for dtype in args.dtype:
      case = Case(size, dtype, args.batch)
      for row in common.alone(speed, case, args):
        if row['row'] in ROWS:
          row['peak GB'] = common.alone(memory, case, row['row'])
        rows.append(row)
  common.finish(args, setting, rows)


if __name__ == '__main__':
  main()
