r"""Time of a merge beside its limit, for models of four sizes.

    python experiments/benchmarks/merge.py [--sizes vit_b32] [--json FILE]

Two models and their anchor with the leaves of a CLIP image tower and a head of
1000 classes, all in memory:

* ours, list: `ms.model_stock(anchor, [w1, w2])`;
* ours, stacked: `ms.model_stock(anchor, stack, stacked=True)`;
* both in the caller's `jit`;
* ours, sharded: the stacked form on leaves cut over all devices of the
  process, where there are several (`--devices 8` splits a CPU in eight);
* mergekit's `model_stock` on each tensor, in the very same memory;
* the formula in five lines of jax.numpy, jitted.

The limit is the traffic of a merge in two passes: three arrays are read for
the inner products, three for the combination, and one is written: seven
arrays over the bandwidth of this machine. GB/s are these seven arrays over a
row's time. Bandwidth is the best of two measurements over the same leaves: a
jitted a + b + c -> d (four arrays), whose threads and allocations are those of
the merge, and a copy (two arrays), on a CPU `numpy.copyto` into a warm buffer
with one thread for each core. All count what a program asks for, so a cache
line fetched only to be overwritten counts once in the limit as well. Sharded
rows have a limit of their own, a + b + c -> d on the sharded leaves.

The rows take turns within every repeat, so that a busy machine is busy for
all of them; compare ratios of one run, and runs by their minima.
"""

from collections.abc import Callable
from concurrent import futures
import importlib
import os
import pathlib
import statistics
from typing import Any
from typing import NamedTuple

import common
import jax
from jax import numpy as jnp
from jax import sharding as js
import merge_table
import numpy as np

import modelstock_jax as ms


class Tower(NamedTuple):
  """The sizes of a CLIP image tower, MLP widths and tokens as they follow."""

  width: int
  mlp: int
  depth: int
  patch: int
  embed_dim: int
  image_size: int = 224


TOWERS = {
  'tiny': Tower(64, 256, 1, 32, 32),
  'vit_b32': Tower(768, 3072, 12, 32, 512),
  'vit_b16': Tower(768, 3072, 12, 16, 512),
  'vit_l14': Tower(1024, 4096, 24, 14, 768),
  '1b': Tower(1408, 6144, 40, 14, 1024),  # open_clip's ViT-g/14
}
CLASSES = 1000
PASSES = 7
# Arrays of the models' size in memory at once: the anchor, two models, a result
# and the copy's target; the stack of two; and what a row's program keeps on
# the way (its `memory_analysis`; of bfloat16 it keeps float32).
HELD = 5
STACK = 2
ON_THE_WAY = {
  'list': {'float32': 0, 'bfloat16': 0},
  'stacked': {'float32': 0, 'bfloat16': 2},
  'naive': {'float32': 1, 'bfloat16': 4},
  'mergekit': {'float32': 0, 'bfloat16': 0},
}
CHECKED = 'block_0/fc/kernel'
# Of weights up to 0.1, from the merge in float64: a few roundings of ours. The
# cosines of mergekit carry the error of its own long sums.
TOLERANCE = {'float32': 1e-7, 'bfloat16': 1e-3}
TOLERANCE_MERGEKIT = {'float32': 5e-6, 'bfloat16': 2e-3}

Tree = dict[str, Any]
Rows = dict[str, Callable[[], Any]]


def leaf_shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
  """The leaves of an image tower, q, k and v apart, and of a head."""
  width = tower.width
  shapes: dict[str, tuple[int, ...]] = {
    'patch/kernel': (3 * tower.patch**2, width),
    'class': (width,),
    'positions': ((tower.image_size // tower.patch) ** 2 + 1, width),
    'projection': (width, tower.embed_dim),
    'head/kernel': (tower.embed_dim, CLASSES),
    'head/bias': (CLASSES,),
  }
  norms = ['norm_pre', 'norm_post']
  for block in range(tower.depth):
    name = f'block_{block}'
    norms += [f'{name}/norm_1', f'{name}/norm_2']
    for dense in ('query', 'key', 'value', 'out'):
      shapes[f'{name}/{dense}/kernel'] = (width, width)
      shapes[f'{name}/{dense}/bias'] = (width,)
    shapes[f'{name}/fc/kernel'] = (width, tower.mlp)
    shapes[f'{name}/fc/bias'] = (tower.mlp,)
    shapes[f'{name}/proj/kernel'] = (tower.mlp, width)
    shapes[f'{name}/proj/bias'] = (width,)
  for norm in norms:
    shapes[f'{norm}/scale'] = shapes[f'{norm}/bias'] = (width,)
  return shapes


def family(tower: Tower, dtype: str) -> tuple[Tree, list[Tree]]:
  """An anchor and two models some 60 degrees apart, on the device."""
  shapes = leaf_shapes(tower)

  @jax.jit
  def draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
      name: (0.02 * jax.random.normal(key, shape)).astype(dtype)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  @jax.jit
  def move(anchor, shared, own):
    return jax.tree.map(
      lambda a, b, c: (a + 0.1 * (b + c)).astype(dtype), anchor, shared, own
    )

  anchor, shared = draw(0), draw(1)
  return anchor, [move(anchor, shared, draw(seed)) for seed in (2, 3)]


def naive(anchor: Tree, models: list[Tree]) -> Tree:
  """The formula for two models, as one would write it on a blackboard."""

  def leaf(w0, w1, w2):
    dtype = w0.dtype
    w0, w1, w2 = (w.astype(jnp.float32) for w in (w0, w1, w2))
    d1, d2 = w1 - w0, w2 - w0
    cosine = jnp.sum(d1 * d2) / jnp.linalg.norm(d1) / jnp.linalg.norm(d2)
    t = 2 * cosine / (1 + cosine)
    return (t * (w1 + w2) / 2 + (1 - t) * w0).astype(dtype)

  return jax.tree.map(leaf, anchor, *models)


def mergekit_merge(anchor: Tree, models: list[Tree]) -> Callable | None:
  """The merge of mergekit on the same arrays; None if it cannot run here."""
  try:
    torch = importlib.import_module('torch')
    methods = importlib.import_module('mergekit.merge_methods')
  except ImportError:
    return None
  on_gpu = jax.default_backend() == 'gpu'
  if on_gpu and not torch.cuda.is_available():
    return None
  columns = [
    [torch.from_dlpack(tree[name]) for tree in (anchor, *models)]
    for name in anchor
  ]

  def merge():
    merged = [
      methods.merge_tensors(tensors, 'model_stock', base_index=0)
      for tensors in columns
    ]
    if on_gpu:
      torch.cuda.synchronize()
    return dict(zip(anchor, merged, strict=True))

  return merge


def copy(tree: Tree) -> Callable[[], Any]:
  """A copy of a tree; on CPUs into warm memory, one thread for each core."""
  if jax.default_backend() != 'cpu':
    program = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return lambda: program(tree)
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


def cut(tree: Tree, lead: tuple[None, ...] = ()) -> Tree:
  """The tree with every leaf cut over all devices, along its longest axis."""
  mesh = js.Mesh(
    np.array(jax.devices()), ('data',), axis_types=(js.AxisType.Auto,)
  )

  def put(leaf):
    shape = leaf.shape[len(lead) :]
    axis = max(range(len(shape)), key=lambda a: shape[a])
    spec: list[str | None] = [None] * len(shape)
    if shape[axis] % mesh.size == 0:
      spec[axis] = 'data'
    return jax.device_put(
      leaf, js.NamedSharding(mesh, js.PartitionSpec(*lead, *spec))
    )

  return jax.tree.map(put, tree)


def programs(
  anchor: Tree, models: list[Tree], wanted: list[str]
) -> tuple[Rows, Rows, Rows]:
  """Merges, measures of bandwidth, and the same of sharded leaves."""

  def listed(anchor, models):
    return ms.model_stock(anchor, models).params

  def stacked(anchor, stack):
    return ms.model_stock(anchor, stack, stacked=True).params

  jit_listed, jit_stacked = jax.jit(listed), jax.jit(stacked)
  jit_naive = jax.jit(naive)
  add = jax.jit(
    lambda a, b, c: jax.tree.map(lambda x, y, z: x + y + z, a, b, c)
  )
  merges: Rows = {}
  if 'list' in wanted:
    merges['ours, list'] = lambda: listed(anchor, models)
    merges["ours, list, user's jit"] = lambda: jit_listed(anchor, models)
  stack = ms.stack(models) if 'stacked' in wanted else None
  if stack is not None:
    merges['ours, stacked'] = lambda: stacked(anchor, stack)
    merges["ours, stacked, user's jit"] = lambda: jit_stacked(anchor, stack)
  if 'naive' in wanted:
    merges['naive jnp, jit'] = lambda: jit_naive(anchor, models)
  theirs = mergekit_merge(anchor, models) if 'mergekit' in wanted else None
  if theirs is not None:
    merges['mergekit'] = theirs
  limits = {'a + b + c -> d': lambda: add(anchor, *models)}
  limits['copy'] = copy(anchor)
  sharded: Rows = {}
  if stack is not None and jax.device_count() > 1:
    cut_anchor, cut_stack = cut(anchor), cut(stack, (None,))
    first, second = map(cut, models)
    merges['ours, sharded'] = lambda: stacked(cut_anchor, cut_stack)
    merges["ours, sharded, user's jit"] = lambda: jit_stacked(
      cut_anchor, cut_stack
    )
    sharded['a + b + c -> d, sharded'] = lambda: add(cut_anchor, first, second)
  return merges, limits, sharded


def run(
  size: str, dtype: str, repeats: int, wanted: list[str]
) -> dict[str, Any]:
  """Measures one size, and checks that all rows compute the same."""
  held = HELD + max(ON_THE_WAY[row][dtype] for row in wanted)
  if 'stacked' in wanted:
    held += STACK
  needed = held * parameters(size) * jnp.dtype(dtype).itemsize
  if 'stacked' in wanted and jax.device_count() > 1:
    needed += needed // 2  # the sharded copies
  result = {'size': size, 'dtype': dtype, 'parameters': parameters(size)}
  if needed > (free := free_bytes()):
    why = f'needs {needed * 1e-9:.0f} GB, {free * 1e-9:.0f} GB are free'
    return {**result, 'left_out': why}
  anchor, models = family(TOWERS[size], dtype)
  merges, limits, sharded = programs(anchor, models, wanted)
  _check(merges, anchor, models, dtype)
  load = os.getloadavg()[0]
  times = common.measure({**merges, **limits, **sharded}, repeats)

  array = sum(leaf.nbytes for leaf in anchor.values())
  arrays = {name: 2 if name == 'copy' else 4 for name in (*limits, *sharded)}
  # bytes a millisecond are kilobytes a second: GB/s = 1e-6 of it
  bandwidth = {
    name: number * array / min(times[name]) * 1e-6
    for name, number in arrays.items()
  }
  best = max(bandwidth[name] for name in limits)
  rows = {}
  for name in merges:
    top = max(bandwidth[n] for n in sharded) if 'sharded' in name else best
    rate = PASSES * array / min(times[name]) * 1e-6
    rows[name] = {
      'median_ms': statistics.median(times[name]),
      'min_ms': min(times[name]),
      'gb_s': rate,
      'x_limit': top / rate,
    }
    if 'mergekit' in times:
      rows[name]['mergekit_x'] = min(times['mergekit']) / min(times[name])
  absent = {'mergekit'} & set(wanted) - set(rows)
  return {
    **result,
    'leaves': len(anchor),
    'load': load,
    'array_bytes': array,
    'bytes_moved': PASSES * array,
    'bandwidth_gb_s': bandwidth,
    'limit_ms': PASSES * array / best * 1e-6,
    'merges': {**rows, **dict.fromkeys(absent)},
  }


def parameters(size: str) -> int:
  """The number of weights of a model."""
  return sum(int(np.prod(s)) for s in leaf_shapes(TOWERS[size]).values())


def free_bytes() -> float:
  """Memory that may be used: the accelerators', or the machine's."""
  if jax.default_backend() != 'cpu':
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get('bytes_limit', np.inf) - stats.get('bytes_in_use', 0)
  info = pathlib.Path('/proc/meminfo')
  for line in info.read_text().splitlines() if info.exists() else []:
    if line.startswith('MemAvailable'):
      return 1024 * int(line.split()[1])
  return np.inf


def _check(merges: Rows, anchor: Tree, models: list[Tree], dtype: str) -> None:
  """Every row computes the same merge, or its time means nothing."""
  w0, *weights = (np.asarray(x[CHECKED], np.float64) for x in (anchor, *models))
  d1, d2 = (w - w0 for w in weights)
  cosine = np.sum(d1 * d2) / np.linalg.norm(d1) / np.linalg.norm(d2)
  expected = w0 + 2 * cosine / (1 + cosine) * (d1 + d2) / 2
  for row, merge in merges.items():
    leaf = merge()[CHECKED]
    theirs = row == 'mergekit'
    leaf = np.asarray(leaf.float().cpu() if theirs else leaf, np.float64)
    tolerance = (TOLERANCE_MERGEKIT if theirs else TOLERANCE)[dtype]
    error = float(np.max(np.abs(leaf - expected)))
    if not error <= tolerance:
      raise ValueError(f'{row}: {CHECKED} is off by {error}.')


def main() -> None:
  """Runs the benchmark and prints its table."""
  parser = common.parser(__doc__, repeats=15)
  parser.add_argument(
    '--sizes', nargs='+', choices=TOWERS, default=list(TOWERS)[1:]
  )
  parser.add_argument(
    '--dtypes', nargs='+', choices=TOLERANCE, default=list(TOLERANCE)
  )
  parser.add_argument(
    '--rows', nargs='+', choices=ON_THE_WAY, default=list(ON_THE_WAY)
  )
  parser.add_argument('--devices', type=int, help='splits a CPU in so many')
  args = parser.parse_args()
  if args.devices:
    jax.config.update('jax_num_cpu_devices', args.devices)
  setting = common.setting(('jax', 'jaxlib', 'torch', 'mergekit', 'numpy'))
  results = []
  for size in args.sizes:
    for dtype in args.dtypes:
      results.append(run(size, dtype, args.repeats, args.rows))
      jax.clear_caches()
  print(merge_table.table(results))
  print(f'N = 2, {args.repeats} repeats')
  print(common.describe(setting))
  common.write({'setting': setting, 'results': results}, args.json)


if __name__ == '__main__':
  main()
