r"""Costs of a run beside its steps: merges, checkpoints, compiling, starting.

    python experiments/benchmarks/overheads.py --size B/32 --batch 16

Two models with AdamW on one device, the programs of a run; images are noise.

* A step, a merge, and a save of the real state (float32 weights and two
  moments of both models, and their merge): the time until `Checkpoints.save`
  returns, for which a run stands still, and until it is on disk. As shares of
  an epoch of ImageNet, which is steps of this batch at the time measured here:
  extrapolated, and without the reading of images, so the shares are rather
  too large.
* Tracing and compiling each program, and the same from the persistent cache,
  which keeps what took a second or more.
* A start, from the first instant of a process to the end of its first step:
  cold, with an empty cache and workdir; and again, from the checkpoint, with
  the cache that the cold one has left.
* `import jax`, `import modelstock_jax` and the import of its merge, in
  processes of their own.

Each row is repeated, and those of the same kind take turns.
"""

import argparse
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
from typing import NamedTuple

import common
import jax
import numpy as np
import programs

from modelstock_jax import clip
from modelstock_jax.training import state as state_lib

IMAGES = 1_281_167  # of ImageNet's training set
IMPORTS = (
  'import jax',
  'import modelstock_jax',
  'from modelstock_jax import model_stock',
)
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
CACHE = 'JAX_COMPILATION_CACHE_DIR'


class Case(NamedTuple):
  """A model and batch to measure.

  Attributes:
    size: of `programs.SIZES`.
    dtype: of the products.
    batch_size: images of each model.
    weights: a folder that `clip.save_pretrained` writes.
  """

  size: str
  dtype: str
  batch_size: int
  weights: pathlib.Path


def write(case: Case) -> dict[str, Any]:
  """Makes the weights that a run starts from; says where this is."""
  setting = common.setting(PACKAGES)
  model = programs.classifier(case.size, case.dtype).model
  clip.save_pretrained(
    jax.jit(model.init)(jax.random.key(0)),
    case.weights,
    config=programs.SIZES[case.size],
    labels=[str(i) for i in range(programs.CLASSES)],
  )
  return setting


def load(case: Case, placement: Any) -> Any:
  """The anchor, on the device."""
  params = dict(clip.load_pretrained(case.weights).params)
  params['head'], _ = clip.load_head(case.weights)
  return jax.block_until_ready(jax.device_put(params, placement.params(params)))


def checkpoints() -> Any:
  """The module; not imported above, as it may need what is not installed."""
  return importlib.import_module('modelstock_jax.training.checkpoints')


def like(built: Any, placement: Any, anchor: Any) -> Any:
  """Shapes and shardings of a checkpoint."""
  module = checkpoints()
  state = jax.eval_shape(functools.partial(programs.create, built), anchor)
  merged = jax.eval_shape(built.merge, anchor, state.params)
  state = state_lib.abstract(state, placement.state(state))
  return module.Checkpoint(state, merged, None)


def start(case: Case, workdir: pathlib.Path, began: float) -> dict[str, float]:
  """A run up to its first step, saved if it is a new one.

  Args:
    case: what to run.
    workdir: of checkpoints; one there is gone on from.
    began: when this process was started, `time.time()`.

  Returns:
    Seconds of each part and of all, without those of saving.
  """
  stamps = {'began': began, 'import': time.time()}
  placement = programs.place(case.batch_size)
  built = programs.build(
    programs.classifier(case.size, case.dtype).recipe, placement
  )
  anchor = load(case, placement)
  batch = jax.device_put(
    programs.batch(case.size, case.batch_size), placement.batch
  )
  stamps['load'] = time.time()
  module = checkpoints()
  with module.Checkpoints(workdir) as saved:
    found = saved.restore(like(built, placement, anchor))
    if found is None:
      state = programs.create(built, anchor)
    else:
      state = found.state
    jax.block_until_ready(state.params)
    stamps['restore' if found else 'create'] = time.time()
    train: Any = built.train
    compiled = train.lower(state, batch, anchor, (), {}).compile()
    stamps['compile'] = time.time()
    state, metrics = jax.block_until_ready(
      compiled(state, batch, anchor, (), {})
    )
    del metrics
    stamps['first step'] = time.time()
    if found is None:
      merged = built.merge(anchor, state.params)
      saved.save(1, module.Checkpoint(state, merged, None))
  seconds = list(stamps.values())
  parts = {
    name: now - before
    for name, before, now in zip(
      list(stamps)[1:], seconds, seconds[1:], strict=False
    )
  }
  return parts | {'total': seconds[-1] - began}


def compiling(case: Case) -> dict[str, dict[str, float]]:
  """Seconds to trace and to compile each program of a run."""
  placement = programs.place(case.batch_size)
  built: Any = programs.build(
    programs.classifier(case.size, case.dtype).recipe, placement
  )
  anchor = jax.eval_shape(
    programs.classifier(case.size, case.dtype).model.init, jax.random.key(0)
  )
  seed = jax.ShapeDtypeStruct((), np.uint32)
  models = jax.ShapeDtypeStruct((programs.MODELS,), np.int32)
  state = jax.eval_shape(built.create, anchor, {}, seed, models)
  batch = programs.batch(case.size, case.batch_size)
  jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
  found = {}
  for name, trace in {
    'create': lambda: built.create.lower(anchor, {}, seed, models),
    'train': lambda: built.train.lower(state, batch, anchor, (), {}),
    'merge': lambda: built.merge.lower(anchor, state.params),
    'restart': lambda: built.restart.lower(state, anchor),
  }.items():
    before = time.perf_counter()
    lowered = trace()
    traced = time.perf_counter()
    lowered.compile()
    found[name] = {
      'trace_s': traced - before,
      'compile_s': time.perf_counter() - traced,
    }
  return found


def costs(
  case: Case, workdir: pathlib.Path, repeats: int, saves: int
) -> dict[str, Any]:
  """Milliseconds of a step and a merge, and of saves of the real state."""
  placement = programs.place(case.batch_size)
  built = programs.build(
    programs.classifier(case.size, case.dtype).recipe, placement
  )
  anchor = load(case, placement)
  batch = jax.device_put(
    programs.batch(case.size, case.batch_size), placement.batch
  )
  state = programs.create(built, anchor)

  def advance():
    nonlocal state
    state, metrics = built.train(state, batch, anchor, (), {})
    return metrics

  times = common.measure(
    {
      'step': advance,
      'merge': lambda: built.merge(anchor, state.params),
    },
    repeats,
  )
  result: dict[str, Any] = {
    name: programs.milliseconds(found) for name, found in times.items()
  }
  if not saves:
    return result
  module = checkpoints()
  blocked, done = [], []
  with module.Checkpoints(workdir) as saved:
    for number in range(1, saves + 2):  # the first makes what all need
      advance()
      merged = built.merge(anchor, state.params)
      jax.block_until_ready((state.params, merged.params))
      before = time.perf_counter()
      saved.save(number, module.Checkpoint(state, merged, None))
      blocked.append(1e3 * (time.perf_counter() - before))
      saved.wait()
      done.append(1e3 * (time.perf_counter() - before))
  size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
  size += sum(x.nbytes for x in jax.tree.leaves(merged.params))
  return result | {
    'save_blocks': programs.milliseconds(blocked[1:]),
    'save': programs.milliseconds(done[1:]),
    'checkpoint_bytes': size,
  }


def imports(repeats: int) -> dict[str, float]:
  """Least seconds of each import, in processes of their own."""
  seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
  for _ in range(repeats):
    for name in IMPORTS:
      code = (
        'import time; t = time.perf_counter(); '
        f'{name}; print(time.perf_counter() - t)'
      )
      done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
      )
      seconds[name].append(float(done.stdout))
  return {name: min(found) for name, found in seconds.items()}


def starts(case: Case, folder: pathlib.Path, repeats: int) -> dict[str, Any]:
  """Cold starts and restarts by turns; the fastest of each."""
  found: dict[str, list[dict[str, float]]] = {'cold': [], 'restart': []}
  for i in range(repeats):
    os.environ[CACHE] = str(folder / f'compiled-{i}')
    for name in found:
      found[name].append(
        common.alone(start, case, folder / f'run-{i}', time.time())
      )
  return {k: min(v, key=lambda x: x['total']) for k, v in found.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Measures everything. This process leaves the device to its children."""
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  missing = None
  try:
    checkpoints()
  except ImportError as error:
    missing = str(error)
  with tempfile.TemporaryDirectory(dir=args.scratch) as name:
    folder = pathlib.Path(name)
    case = Case(args.size, args.dtype, args.batch, folder / 'weights')
    setting = common.alone(write, case)
    imported = imports(args.repeats)
    os.environ[CACHE] = str(folder / 'compiled')
    compiled = {
      name: common.alone(compiling, case) for name in ('cold', 'cached')
    }
    saves = 0 if missing else args.saves
    found = common.alone(costs, case, folder / 'saved', args.repeats, saves)
    started = None if missing else starts(case, folder, args.starts)
  return {
    'setting': setting,
    'size': args.size,
    'dtype': args.dtype,
    'batch_size': args.batch,
    'repeats': args.repeats,
    **found,
    'epoch_s': IMAGES // args.batch * found['step']['min_ms'] / 1e3,
    'compile_s': compiled,
    'starts_s': started,
    'imports_s': imported,
    'missing': missing,
  }


def table(result: dict[str, Any]) -> str:
  """The result as Markdown."""
  epoch = result['epoch_s']
  lines = [
    '| of an epoch | min ms | median | % of the epoch |',
    '|---|--:|--:|--:|',
  ]
  for name in ('step', 'merge', 'save_blocks', 'save'):
    if name in result:
      least = result[name]['min_ms']
      lines.append(
        f'| {name} | {least:.1f} | {result[name]["median_ms"]:.1f} '
        f'| {least / epoch / 10:.4f} |'
      )
  steps = IMAGES // result['batch_size']
  lines += [
    '',
    f'epoch: {steps} steps of {result["batch_size"]} images of each model at '
    f'the time of {result["repeats"]} of them: {epoch / 3600:.2f} h',
  ]
  if 'checkpoint_bytes' in result:
    rate = result['checkpoint_bytes'] / result['save']['min_ms'] / 1e6
    lines.append(
      f'checkpoint: {result["checkpoint_bytes"] / 1e9:.2f} GB, '
      f'{rate:.2f} GB/s to the disk'
    )
  lines += [
    '',
    '| program | trace s | compile s | trace s, cached | from the cache s |',
    '|---|--:|--:|--:|--:|',
  ]
  cached = result['compile_s']['cached']
  for name, cold in result['compile_s']['cold'].items():
    lines.append(
      f'| {name} | {cold["trace_s"]:.2f} | {cold["compile_s"]:.2f} '
      f'| {cached[name]["trace_s"]:.2f} | {cached[name]["compile_s"]:.2f} |'
    )
  lines += ['', *_starts(result['starts_s'])] if result['starts_s'] else []
  imported = result['imports_s']
  lines += ['', '| import | min s |', '|---|--:|']
  lines += [f'| `{name}` | {least:.3f} |' for name, least in imported.items()]
  if result['missing']:
    lines.append(f'saves and starts: not measured: {result["missing"]}')
  return '\n'.join(lines)


def _starts(found: dict[str, dict[str, float]]) -> list[str]:
  """Both ways to start, part by part, and what they come to."""
  cold, again = found['cold'], found['restart']
  parts = {'create': 'restore'}  # what takes the place of what
  lines = ['| start | cold s | restart s |', '|---|--:|--:|']
  for name, seconds in cold.items():
    other = parts.get(name, name)
    title = name if other == name else f'{name}, or {other}'
    lines.append(f'| {title} | {seconds:.2f} | {again[other]:.2f} |')
  least = cold['import'] + cold['load'] + cold['compile']
  lines += [
    '',
    f'restart / cold start: {again["total"] / cold["total"]:.2f}',
    f'restart / (import + load + compile of the cold start, {least:.2f} s): '
    f'{again["total"] / least:.2f}',
  ]
  return lines


def main() -> None:
  """Runs the benchmark and prints its tables."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument('--size', choices=programs.SIZES, default='B/32')
  parser.add_argument(
    '--dtype', choices=('bfloat16', 'float32'), default='bfloat16'
  )
  parser.add_argument('--batch', type=int, default=8, help='of each model')
  parser.add_argument('--saves', type=int, default=3)
  parser.add_argument('--starts', type=int, default=2, help='of each kind')
  parser.add_argument(
    '--scratch', type=pathlib.Path, help='the disk that is saved to'
  )
  args = parser.parse_args()
  result = run(args)
  print(f'{args.size}, {args.dtype}\n\n{table(result)}\n')
  print(common.describe(result['setting']))
  common.write(result, args.json)


if __name__ == '__main__':
  main()
