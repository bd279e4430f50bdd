r"""Time of a training step: two models in one, and torch for comparison.

    python experiments/benchmarks/step.py --size B/32 --batch 128

The programs are those of a run (`training.step.compile_programs` on a real
classifier, with AdamW), on one device; images are noise, there already. Rows:

* side_by_side, in_turn: two models in one step, under `vmap` or `lax.map`;
* dots, block: side by side, with rematerialisation;
* two_singles: two models, each by a step for one model that knows nothing of
  stacks, one after the other: what side_by_side is to be compared with;
* one: one of these;
* torch, torch_compile: one model by `transformers` and torch, see
  torch_step.py;
* matmul: a product of two square matrices, the limit.

Before any timing, logits of ours and torch's from the same weights must agree
in float32, as must the loss and the gradient norm of all rows.

A timing is of several steps in a chain. Rows take turns within every repeat, in
one process; memory is the peak of a process for each row: on a GPU of its
allocator, on a CPU of the resident set, interpreter and compiler included.

MFU is analytic FLOPs of both passes (see `clip.flops`) over time and peak: of
the data sheet for a known device in bfloat16, else of `matmul` in the same run.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import importlib
import importlib.util
import os
import pathlib
import tempfile
from typing import Any
from typing import NamedTuple

import common
import jax
from jax import numpy as jnp
import numpy as np
import optax
import programs
import step_table

from modelstock_jax import clip
from modelstock_jax.clip import flops

# Of recipes of two models.
TWO: dict[str, dict[str, Any]] = {
  'side_by_side': dict(),
  'in_turn': dict(models='map'),
  'dots': dict(remat='dots'),
  'block': dict(remat='block'),
}
ONE = ('two_singles', 'one')
TORCH = ('torch', 'torch_compile')
ROWS = (*TWO, *ONE, *TORCH)
# How many models a row advances.
MODELS = {row: 2 if row in TWO or row == 'two_singles' else 1 for row in ROWS}
DTYPES = ('bfloat16', 'float32')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'transformers')


class Case(NamedTuple):
  """A model, batch and rows to measure in one process.

  Attributes:
    size: of `programs.SIZES`.
    dtype: of the products, 'bfloat16' or 'float32'.
    batch_size: images of each model.
    rows: of `ROWS`.
    folder: where weights are left for torch.
  """

  size: str
  dtype: str
  batch_size: int
  rows: Sequence[str]
  folder: pathlib.Path


class One(NamedTuple):
  """One model in training, without a stack."""

  step: jax.Array
  params: Any
  opt_state: Any


def train_one(
  one: programs.Classifier, state: One, batch: dict[str, jax.Array]
) -> tuple[One, tuple[jax.Array, ...]]:
  """The step as one would write it for a single model."""

  def loss(params):
    logits = one.model.apply(params, programs.normalize(batch['image']))
    target = jax.nn.one_hot(batch['label'], logits.shape[-1])
    value = jnp.mean(optax.softmax_cross_entropy(logits, target))
    correct = jnp.argmax(logits, -1) == batch['label']
    return value, jnp.mean(correct, dtype=jnp.float32)

  gradient = jax.value_and_grad(loss, has_aux=True)
  (value, accuracy), grads = gradient(state.params)
  rate = jnp.asarray(one.schedule(state.step))
  params, opt_state = one.optimizer.step(
    state.params, grads, state.opt_state, rate, None, {}
  )
  metrics = value, accuracy, optax.tree.norm(grads)
  return One(state.step + 1, params, opt_state), metrics


class Ours:
  """The rows in JAX. Rows of a kind share a state, for want of memory."""

  def __init__(self, case: Case):
    self._case = case
    self.anchor: Any = jax.jit(
      programs.classifier(case.size, case.dtype).model.init
    )(jax.random.key(0))
    placement = programs.place(case.batch_size)
    both = programs.batch(case.size, case.batch_size)
    self._both = jax.device_put(both, placement.batch)
    device = jax.devices()[0]
    self._each = [
      jax.device_put({k: v[i] for k, v in both.items()}, device)
      for i in range(programs.MODELS)
    ]
    # Each is compiled once, when it is first called.
    self._two = {
      row: programs.build(
        programs.classifier(case.size, case.dtype, **TWO[row]).recipe,
        placement,
      )
      for row in TWO
    }
    self._one = jax.jit(self._single, donate_argnums=0)
    self._stack: Any = None
    self._singles: list[Any] = [None] * programs.MODELS

  def _single(self, state, batch):
    one = programs.classifier(self._case.size, self._case.dtype)
    return train_one(one, state, batch)

  def start(self, row: str) -> None:
    """Puts the models of a row back on the weights they start from."""
    if row in TWO:
      self._stack = None  # room for the new one
      self._stack = programs.create(self._two[row], self.anchor)
      return
    one = programs.classifier(self._case.size, self._case.dtype)
    for i in range(MODELS[row]):
      self._singles[i] = None
      params = jax.tree.map(jnp.copy, self.anchor)
      self._singles[i] = One(
        jnp.zeros((), jnp.int32), params, one.optimizer.init(params)
      )

  def step(self, row: str) -> tuple[Any, Any]:
    """Takes a step; losses and norms of gradients, which are under way."""
    if row in TWO:
      self._stack, found = self._two[row].train(
        self._stack, self._both, self.anchor, (), {}
      )
      return found['loss'], found['grad_norm']
    losses, norms = [], []
    for i in range(MODELS[row]):
      self._singles[i], found = self._one(self._singles[i], self._each[i])
      losses.append(found[0])
      norms.append(found[2])
    return losses, norms

  def save(self) -> None:
    """Leaves the weights where torch finds them."""
    clip.save_pretrained(
      self.anchor,
      self._case.folder,
      config=programs.SIZES[self._case.size],
      labels=[str(i) for i in range(programs.CLASSES)],
    )

  def logits(self) -> np.ndarray:
    """Return logits of the first model's batch, computed in full float32."""
    model = programs.classifier(self._case.size, 'float32').model
    with jax.default_matmul_precision('highest'):
      images = programs.normalize(self._each[0]['image'])
      return np.asarray(jax.jit(model.apply)(self.anchor, images))


def theirs(case: Case) -> Any:
  """A step of torch on the weights in the case's folder."""
  batch = programs.batch(case.size, case.batch_size)
  one = {k: v[0] for k, v in batch.items()}
  module = importlib.import_module('torch_step')
  return module.Step(case.folder, one, case.dtype)


class Ready(NamedTuple):
  """The rows of a case, which have compiled and taken a step each."""

  steps: dict[str, Callable[[], Any]]  # what they return may be under way
  waits: dict[str, Callable[[], None]]  # for what is not of jax
  first: dict[str, np.ndarray]  # loss, and norm of the gradient, of model 0
  failed: dict[str, str]  # why
  logits_error: float | None  # of ours against torch's, float32


def prepare(case: Case, ours: Ours) -> Ready:
  """Takes the first step of every row."""
  ready = Ready({}, {}, {}, {}, None)
  for row in case.rows:
    if row in TORCH:
      continue
    try:
      ours.start(row)
      loss, norm = jax.device_get(ours.step(row))
    except RuntimeError as caught:  # too little memory, mostly
      ready.failed[row] = common.one_line(caught)
      continue
    ready.first[row] = np.array([loss[0], norm[0]])
    ready.steps[row] = functools.partial(ours.step, row)
  wanted = [row for row in case.rows if row in TORCH]
  missing = [
    m for m in ('torch', 'transformers') if not importlib.util.find_spec(m)
  ]
  if wanted and missing:
    why = f'{" and ".join(missing)}: not installed'
    ready.failed.update(dict.fromkeys(wanted, why))
  if not wanted or missing:
    return ready
  ours.save()
  expected = theirs(case).logits()
  error = np.linalg.norm(ours.logits() - expected) / np.linalg.norm(expected)
  ready = ready._replace(logits_error=float(error))
  for row in wanted:
    try:
      step = theirs(case)
      if row == 'torch_compile':
        step.compile()
      first = np.array([float(value) for value in step()])
    except Exception as caught:  # no compiler, which has many ways to say so
      ready.failed[row] = common.one_line(caught)
      continue
    ready.first[row] = first
    ready.steps[row], ready.waits[row] = step, step.wait
  return ready


def speed(case: Case, repeats: int, steps: int) -> dict[str, Any]:
  """Checks that all rows do the same, and times them."""
  setting = common.setting(PACKAGES)
  ours = Ours(case)
  ready = prepare(case, ours)
  _check(case, ready)

  def chain(row):
    for _ in range(steps - 1):
      ready.steps[row]()
    last = ready.steps[row]()
    ready.waits.get(row, lambda: None)()
    return last

  side = 8192 if jax.default_backend() == 'gpu' else 2048
  square = jnp.ones((side, side), case.dtype)
  matmul = jax.jit(jnp.matmul)
  rows: dict[str, Callable[[], Any]] = {
    row: functools.partial(chain, row) for row in ready.steps
  }
  rows['matmul'] = lambda: [matmul(square, square) for _ in range(steps)]
  times = {
    row: [t / steps for t in found]
    for row, found in common.measure(rows, repeats, warmup=1).items()
  }
  limit = 2e3 * side**3 / min(times.pop('matmul'))
  sheet = step_table.peak(jax.devices()[0].device_kind, case.dtype)
  work = flops.train(programs.SIZES[case.size], programs.CLASSES)
  result = {}
  for row, found in times.items():
    rate = 1e3 * MODELS[row] * case.batch_size / min(found)
    result[row] = programs.milliseconds(found) | {
      'images_per_s': rate,
      'mfu': rate * work / (sheet or limit),
      'of_matmul': rate * work / limit,
    }
  return {
    'setting': setting,
    'parameters': sum(x.size for x in jax.tree.leaves(ours.anchor)),
    'flops_per_image': work,
    'peak_flops': sheet or limit,
    'peak_of': 'data sheet' if sheet else f'matmul of {side} x {side}',
    'matmul_flops': limit,
    'logits_error': ready.logits_error,
    'rows': result,
    'failed': ready.failed,
  }


def memory(case: Case) -> int | None:
  """Peak bytes of the one row of a case; this process does nothing else."""
  [row] = case.rows
  if row in TORCH:
    step = theirs(case)
    if row == 'torch_compile':
      step.compile()
    for _ in range(2):
      step()
    step.wait()
    found = step.peak_bytes()
  else:
    ours = Ours(case)
    ours.start(row)
    ours.anchor = jax.tree.map(  # not read by a step: it takes no memory
      lambda x: np.broadcast_to(np.float32(0), x.shape), ours.anchor
    )
    for _ in range(2):
      jax.block_until_ready(ours.step(row))
    stats = jax.devices()[0].memory_stats() or {}
    found = stats.get('peak_bytes_in_use')
  if found is None:
    found = common.peak_bytes()
  return found


def _check(case: Case, ready: Ready) -> None:
  """Every row computes the same, or its time means nothing."""
  problems = []
  error, first = ready.logits_error, ready.first
  if error is not None and not error < 1e-4:
    problems.append(f'logits in float32 are off by {error:.1e} from torch')
  # A GPU's float32 is TF32, with as many digits as float16.
  rough = case.dtype == 'bfloat16' or jax.default_backend() == 'gpu'
  bound = 3e-2 if rough else 1e-3
  base = next(iter(first), '')
  for row, values in first.items():
    if not np.allclose(values, first[base], rtol=bound, atol=0):
      problems.append(
        f'{row}: loss and norm of the gradient are {values}, those of {base} '
        f'are {first[base]}'
      )
  if problems:
    raise ValueError(f'{case.size}, {case.dtype}: ' + '; '.join(problems))


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Measures all cases. This process leaves the device to its children."""
  cases = []
  with tempfile.TemporaryDirectory() as folder:
    # What the first process compiles, those that measure memory only load.
    os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{folder}/compiled'
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    for size in args.size:
      for dtype in args.dtype:
        weights = pathlib.Path(folder, f'{size}-{dtype}'.replace('/', '-'))
        case = Case(size, dtype, args.batch, args.rows, weights)
        found = common.alone(speed, case, args.repeats, args.steps)
        if not args.no_memory:
          for row, values in found['rows'].items():
            try:
              peak = common.alone(memory, case._replace(rows=[row]))
            except RuntimeError as error:  # for one row no other is lost
              found['failed'][f'{row}, memory'] = common.one_line(error)
              continue
            values['peak_bytes'] = peak
        cases.append({'size': size, 'dtype': dtype, **found})
        print(step_table.table_of(cases[-1]), flush=True)
  setting, *_ = [case.pop('setting') for case in cases]
  sizes = dict(batch_size=args.batch, repeats=args.repeats, steps=args.steps)
  return {'setting': setting, **sizes, 'cases': cases}


def main() -> None:
  """Runs the benchmark and prints its tables."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument(
    '--size', nargs='+', choices=programs.SIZES, default=['B/32']
  )
  parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=DTYPES)
  parser.add_argument('--batch', type=int, default=8, help='of each model')
  parser.add_argument('--rows', nargs='+', choices=ROWS, default=ROWS)
  parser.add_argument('--steps', type=int, default=1, help='in a timing')
  parser.add_argument('--no-memory', action='store_true')
  args = parser.parse_args()
  result = run(args)
  print(step_table.footer(result))
  common.write(result, args.json)


if __name__ == '__main__':
  main()
