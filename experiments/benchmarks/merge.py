r"""How long a merge of 88 million parameters takes, and how short it could.

    python experiments/benchmarks/merge.py [--json FILE] [--repeats 15]

Two models and their anchor with the leaves of CLIP ViT-B/32 (image tower and
a head of 1000 classes), float32, all in memory:

* ours, list form: `ms.model_stock(anchor, [w1, w2])`;
* ours, stacked: `ms.model_stock(anchor, stack, stacked=True)`;
* ours in the caller's `jit`, list and stacked form;
* mergekit's `model_stock` on each tensor, sharing the same memory;
* the formula in five lines of jax.numpy, leaf by leaf, eager and jitted.

The limit is the traffic of a merge in two passes: three arrays are read for
the inner products, three for the combination, and one is written: seven
arrays over the bandwidth of this machine. Bandwidth is the best of two
measurements over the same leaves: a jitted a + b + c -> d (four arrays), whose
threads and allocations are those of the merge, and on a CPU `numpy.copyto`
into a warm buffer, one thread for each core (two arrays). Both count what a
program asks for, so a cache line fetched only to be overwritten counts once
in the limit as well.

The rows take turns within every repeat, so that a busy machine is busy for
all of them; compare ratios of one run, and runs by their minima.
"""

import argparse
from collections.abc import Callable
from concurrent import futures
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

import modelstock_jax as ms

WIDTH, DEPTH, PATCH, TOKENS = 768, 12, 32, 7 * 7 + 1
EMBED_DIM, CLASSES = 512, 1000
PASSES = 7

Tree = dict[str, Any]


def leaf_shapes() -> dict[str, tuple[int, ...]]:
  """The leaves of CLIP ViT-B/32's image tower, q, k and v apart, and head."""
  shapes: dict[str, tuple[int, ...]] = {
    'patch/kernel': (3 * PATCH * PATCH, WIDTH),
    'class': (WIDTH,),
    'positions': (TOKENS, WIDTH),
    'projection': (WIDTH, EMBED_DIM),
    'head/kernel': (EMBED_DIM, CLASSES),
    'head/bias': (CLASSES,),
  }
  norms = ['norm_pre', 'norm_post']
  for block in range(DEPTH):
    name = f'block_{block}'
    norms += [f'{name}/norm_1', f'{name}/norm_2']
    for dense in ('query', 'key', 'value', 'out'):
      shapes[f'{name}/{dense}/kernel'] = (WIDTH, WIDTH)
      shapes[f'{name}/{dense}/bias'] = (WIDTH,)
    shapes[f'{name}/fc/kernel'] = (WIDTH, 4 * WIDTH)
    shapes[f'{name}/fc/bias'] = (4 * WIDTH,)
    shapes[f'{name}/proj/kernel'] = (4 * WIDTH, WIDTH)
    shapes[f'{name}/proj/bias'] = (WIDTH,)
  for norm in norms:
    shapes[f'{norm}/scale'] = shapes[f'{norm}/bias'] = (WIDTH,)
  return shapes


def family(shapes: dict[str, tuple[int, ...]]) -> tuple[Tree, list[Tree]]:
  """An anchor and two models some 60 degrees apart, on the device."""

  @jax.jit
  def draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
      name: 0.02 * jax.random.normal(key, shape)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  @jax.jit
  def move(anchor, shared, own):
    return jax.tree.map(lambda a, b, c: a + 0.1 * (b + c), anchor, shared, own)

  anchor, shared = draw(0), draw(1)
  return anchor, [move(anchor, shared, draw(seed)) for seed in (2, 3)]


def naive(anchor: Tree, models: list[Tree]) -> Tree:
  """The formula for two models, as one would write it on a blackboard."""

  def leaf(w0, w1, w2):
    d1, d2 = w1 - w0, w2 - w0
    cosine = jnp.sum(d1 * d2) / jnp.linalg.norm(d1) / jnp.linalg.norm(d2)
    t = 2 * cosine / (1 + cosine)
    return t * (w1 + w2) / 2 + (1 - t) * w0

  return jax.tree.map(leaf, anchor, *models)


def mergekit_merge(anchor: Tree, models: list[Tree]) -> Callable | None:
  """The merge of mergekit on the same numbers; None if not installed."""
  try:
    torch = importlib.import_module('torch')
    methods = importlib.import_module('mergekit.merge_methods')
  except ImportError:
    return None
  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  if device == 'cuda' and not torch.cuda.is_available():
    return None
  columns = [
    [torch.from_numpy(np.array(tree[name])).to(device) for name in anchor]
    for tree in (anchor, *models)
  ]

  def merge():
    merged = [
      methods.merge_tensors(tensors, 'model_stock', base_index=0)
      for tensors in zip(*columns, strict=True)
    ]
    if device == 'cuda':
      torch.cuda.synchronize()
    return [leaf.numpy() for leaf in merged] if device == 'cpu' else merged

  return merge


def copy(tree: Tree) -> Callable:
  """A numpy copy of a tree into warm memory, one thread for each core."""
  source = [np.asarray(leaf).ravel() for leaf in tree.values()]
  target = [np.zeros_like(leaf) for leaf in source]
  threads = os.cpu_count() or 1
  jobs = [
    (t, s)
    for into, of in zip(target, source, strict=True)
    for t, s in zip(
      np.array_split(into, threads), np.array_split(of, threads), strict=True
    )
  ]
  pool = futures.ThreadPoolExecutor(threads)
  work = [jobs[i::threads] for i in range(threads)]

  def run(part):
    for into, of in part:
      np.copyto(into, of)

  return lambda: list(pool.map(run, work))


def measure(rows: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
  """Milliseconds of each row, the rows taking turns; two rounds of warm-up."""
  times: dict[str, list[float]] = {name: [] for name in rows}
  for repeat in range(repeats + 2):
    for name, run in rows.items():
      start = time.perf_counter()
      result = run()
      jax.block_until_ready(result)
      elapsed = 1e3 * (time.perf_counter() - start)
      del result  # or its memory would be in the way of the next row
      if repeat >= 2:
        times[name].append(elapsed)
  return times


def versions() -> dict[str, str]:
  """Versions of what is measured, of what is installed."""
  found = {}
  for name in ('jax', 'jaxlib', 'torch', 'mergekit', 'numpy'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return {'python': platform.python_version(), **found}


def device_name() -> str:
  """The accelerator, or the processor and its cores."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  model = names[0] if names else platform.processor()
  return f'{model}, {os.cpu_count()} cores'


def run(repeats: int) -> dict[str, Any]:
  """Measures everything, and checks that all compute the same."""
  shapes = leaf_shapes()
  anchor, models = family(shapes)
  stack = ms.stack(models)
  parameters = sum(leaf.size for leaf in anchor.values())

  def merge_stacked(anchor, stack):
    return ms.model_stock(anchor, stack, stacked=True).params

  jitted = jax.jit(lambda anchor, models: ms.model_stock(anchor, models).params)
  jitted_stacked = jax.jit(merge_stacked)
  jitted_naive = jax.jit(naive)
  add = jax.jit(
    lambda a, b, c: jax.tree.map(lambda x, y, z: x + y + z, a, b, c)
  )
  merges: dict[str, Callable] = {
    'ours, list': lambda: ms.model_stock(anchor, models).params,
    'ours, stacked': lambda: merge_stacked(anchor, stack),
    "ours, list, user's jit": lambda: jitted(anchor, models),
    "ours, stacked, user's jit": lambda: jitted_stacked(anchor, stack),
    'naive jnp': lambda: naive(anchor, models),
    'naive jnp, jit': lambda: jitted_naive(anchor, models),
  }
  theirs = mergekit_merge(anchor, models)
  if theirs is not None:
    merges['mergekit'] = theirs
  _check(anchor, merges)

  rows = {**merges, 'a + b + c -> d': lambda: add(anchor, *models)}
  if jax.default_backend() == 'cpu':
    rows['numpy copy'] = copy(anchor)
  load = os.getloadavg()[0]
  times = measure(rows, repeats)

  array_bytes = 4 * parameters
  traffic = {'a + b + c -> d': 4 * array_bytes, 'numpy copy': 2 * array_bytes}
  # bytes a millisecond are kilobytes a second: GB/s = 1e-6 of it
  bandwidth = {
    name: {
      'median': size / statistics.median(times[name]) * 1e-6,
      'best': size / min(times[name]) * 1e-6,
    }
    for name, size in traffic.items()
    if name in times
  }
  limit = {
    'median_ms': PASSES
    * array_bytes
    / max(b['median'] for b in bandwidth.values())
    * 1e-6,
    'min_ms': PASSES
    * array_bytes
    / max(b['best'] for b in bandwidth.values())
    * 1e-6,
  }
  return {
    'date': datetime.date.today().isoformat(),
    'device': device_name(),
    'load_average': load,
    'versions': versions(),
    'parameters': parameters,
    'leaves': len(shapes),
    'num_models': len(models),
    'repeats': repeats,
    'bandwidth_gb_s': bandwidth,
    'limit': limit,
    'merges': {
      name: {
        'median_ms': statistics.median(times[name]),
        'min_ms': min(times[name]),
      }
      if name in times
      else None
      for name in (*merges, *(() if theirs else ('mergekit',)))
    },
  }


def _check(anchor: Tree, merges: dict[str, Callable]) -> None:
  """Every row computes the same merge, or its time means nothing."""
  name = 'block_5/fc/kernel'
  index = list(anchor).index(name)
  leaves = {}
  for row, merge in merges.items():
    merged = merge()
    leaf = merged[name] if isinstance(merged, dict) else merged[index]
    leaves[row] = np.asarray(leaf.cpu() if hasattr(leaf, 'cpu') else leaf)
  expected = leaves['naive jnp']
  for row, leaf in leaves.items():
    error = float(np.max(np.abs(leaf - expected)))
    if error > 1e-6:
      raise ValueError(f'{row}: {name} is off by {error}.')


def table(result: dict[str, Any]) -> str:
  """The result as a Markdown table, times in milliseconds."""
  limit, merges = result['limit'], result['merges']
  theirs = merges['mergekit']
  lines = [
    '| merge | median ms | min ms | x limit (min) | mergekit / it (min) |',
    '|---|---|---|---|---|',
  ]
  for name, row in merges.items():
    if row is None:
      lines.append(f'| {name} | not installed | | | |')
      continue
    ratio = f'{theirs["min_ms"] / row["min_ms"]:.2f}' if theirs else ''
    lines.append(
      f'| {name} | {row["median_ms"]:.1f} | {row["min_ms"]:.1f} '
      f'| {row["min_ms"] / limit["min_ms"]:.2f} | {ratio} |'
    )
  lines.append(
    f'| limit: {PASSES} arrays | {limit["median_ms"]:.1f} '
    f'| {limit["min_ms"]:.1f} | 1.00 | |'
  )
  lines.append('')
  lines += [
    f'{name}: median {rate["median"]:.1f} GB/s, best {rate["best"]:.1f} GB/s'
    for name, rate in result['bandwidth_gb_s'].items()
  ]
  shown = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  lines += [
    f'{result["parameters"] / 1e6:.1f} M parameters in {result["leaves"]} '
    f'leaves, N = {result["num_models"]}, float32, {result["repeats"]} repeats',
    f'{result["date"]}, {result["device"]}, load '
    f'{result["load_average"]:.1f} at the start',
    shown,
  ]
  return '\n'.join(lines)


def main() -> None:
  """Runs the benchmark and prints its table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', type=pathlib.Path, help='write the result here')
  parser.add_argument('--repeats', type=int, default=15)
  args = parser.parse_args()
  result = run(args.repeats)
  print(table(result))
  if args.json:
    args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
