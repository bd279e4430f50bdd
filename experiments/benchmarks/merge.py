r"""Time of a merge beside its limit, for CLIP's image towers.

    python experiments/benchmarks/merge.py --size B/32 --dtype float32

Two models and their anchor with the leaves of an image tower and a head of 1000
classes, all in memory:

* list: `ms.model_stock(anchor, [w1, w2])`;
* stacked: `ms.model_stock(anchor, stack, stacked=True)`;
* both in the caller's `jit`;
* naive: the formula in a few lines of jax.numpy, jitted;
* mergekit: its `model_stock` on each tensor, in the very same memory.

The limit is the traffic of a merge in two passes: three arrays are read for
the inner products, three for the combination, and one is written: seven arrays
over the bandwidth of this machine. That is the better of two measurements over
the same leaves: a jitted a + b + c -> d (four arrays), and a jitted copy (two).
GB/s are the arrays over the time of a row.

The rows take turns within every repeat; compare ratios of one run, and runs by
their minima.
"""

from collections.abc import Callable
import functools
import importlib
import importlib.util
from typing import Any

import common
import jax
from jax import numpy as jnp
import numpy as np
import optax
import programs

import modelstock_jax as ms
from modelstock_jax import clip

ROWS = ('list', 'stacked', 'naive', 'mergekit')
# Arrays that are read and written: by a merge, and by what its limit is of.
MERGE = 7
LIMITS = {'a + b + c -> d': 4, 'copy': 2}
# Between merges, of weights up to 0.5: a few roundings, and the error of the
# long sums of mergekit.
TOLERANCE = {'float32': 5e-6, 'bfloat16': 4e-3}

Tree = dict[str, Any]


def family(size: str, dtype: str) -> tuple[Tree, list[Tree]]:
  """Return an anchor and two models some 60 degrees apart, on the device."""
  init = clip.classifier(programs.SIZES[size], programs.CLASSES).init
  shapes = jax.eval_shape(init, jax.random.key(0))

  @jax.jit
  def draw(seed):
    values = optax.tree.random_like(jax.random.key(seed), shapes)
    return jax.tree.map(lambda x: (0.02 * x).astype(dtype), values)

  @jax.jit
  def move(anchor, shared, other):
    return jax.tree.map(
      lambda a, b, c: (a + 0.1 * (b + c)).astype(dtype), anchor, shared, other
    )

  anchor, shared = draw(0), draw(1)
  return anchor, [move(anchor, shared, draw(seed)) for seed in (2, 3)]


def naive(anchor: Tree, models: list[Tree]) -> Tree:
  """Merge two models by the formula, as one would write it on a blackboard."""

  def leaf(w0, w1, w2):
    dtype = w0.dtype
    w0, w1, w2 = (w.astype(jnp.float32) for w in (w0, w1, w2))
    d1, d2 = w1 - w0, w2 - w0
    cosine = jnp.sum(d1 * d2) / jnp.linalg.norm(d1) / jnp.linalg.norm(d2)
    t = 2 * cosine / (1 + cosine)
    return (t * (w1 + w2) / 2 + (1 - t) * w0).astype(dtype)

  return jax.tree.map(leaf, anchor, *models)


def mergekit(anchor: Tree, models: list[Tree]) -> Callable[[], Any]:
  """Return the merge of mergekit on the same arrays."""
  torch: Any = importlib.import_module('torch')
  methods = importlib.import_module('mergekit.merge_methods')
  trees = [jax.tree.leaves(tree) for tree in (anchor, *models)]
  leaves = [
    [torch.from_dlpack(leaf) for leaf in column]
    for column in zip(*trees, strict=True)
  ]

  def merge():
    merged = [
      methods.merge_tensors(tensors, 'model_stock', base_index=0)
      for tensors in leaves
    ]
    if merged[0].is_cuda:
      torch.cuda.synchronize()
    return merged

  return merge


def merges(
  anchor: Tree, models: list[Tree], wanted: list[str]
) -> dict[str, Callable[[], Any]]:
  """Return the merges that are timed; the anchor's leaves or tensors."""

  def listed(anchor, models):
    return ms.model_stock(anchor, models).params

  def stacked(anchor, stack):
    return ms.model_stock(anchor, stack, stacked=True).params

  stack = ms.stack(models) if 'stacked' in wanted else None
  rows = {
    'list': functools.partial(listed, anchor, models),
    "list, user's jit": functools.partial(jax.jit(listed), anchor, models),
    'stacked': functools.partial(stacked, anchor, stack),
    "stacked, user's jit": functools.partial(jax.jit(stacked), anchor, stack),
    'naive': functools.partial(jax.jit(naive), anchor, models),
  }
  if importlib.util.find_spec('mergekit'):
    rows['mergekit'] = mergekit(anchor, models)
  return {k: v for k, v in rows.items() if k.partition(',')[0] in wanted}


def check(rows: dict[str, Callable[[], Any]], anchor: Tree, dtype: str) -> None:
  """Check that all rows merge to the same, or their times mean nothing."""
  largest = np.argmax([leaf.size for leaf in jax.tree.leaves(anchor)])
  merged = {n: jax.tree.leaves(merge())[largest] for n, merge in rows.items()}
  if 'mergekit' in merged:
    merged['mergekit'] = merged['mergekit'].float().cpu()
  leaves = [np.asarray(leaf, np.float32) for leaf in merged.values()]
  for name, leaf in zip(merged, leaves, strict=True):
    error = np.max(np.abs(leaf - leaves[0]))
    if not error <= TOLERANCE[dtype]:
      raise ValueError(f'{name}: {error} from {next(iter(merged))}.')


def run(
  size: str, dtype: str, repeats: int, wanted: list[str]
) -> list[dict[str, Any]]:
  """Measure one size; return its rows, the limits last."""
  anchor, models = family(size, dtype)
  rows = merges(anchor, models, wanted)
  check(rows, anchor, dtype)
  add = jax.jit(lambda *trees: jax.tree.map(lambda a, b, c: a + b + c, *trees))
  copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
  limits = zip(
    LIMITS,
    (functools.partial(add, anchor, *models), functools.partial(copy, anchor)),
    strict=True,
  )
  times = common.measure({**rows, **dict(limits)}, repeats)
  gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(anchor)) / 1e9
  rates = {
    name: LIMITS.get(name, MERGE) * gigabytes / min(seconds)
    for name, seconds in times.items()
  }
  best = max(rates[name] for name in LIMITS)
  theirs = times.get('mergekit')
  return [
    {
      'model': f'{size}, {dtype}',
      'merge': name,
      **common.milliseconds(seconds),
      'GB/s': rates[name],
      'x limit (min)': best / rates[name],
      'mergekit / it (min)': theirs and min(theirs) / min(seconds),
    }
    for name, seconds in times.items()
  ]


def main() -> None:
  """Run the benchmark and print its table."""
  parser = common.parser(__doc__, repeats=15)
  sizes, dtypes = programs.SIZES, programs.DTYPES
  parser.add_argument('--size', nargs='+', choices=sizes, default=['B/32'])
  parser.add_argument('--dtype', nargs='+', choices=dtypes, default=dtypes)
  parser.add_argument('--rows', nargs='+', choices=ROWS, default=ROWS)
  args = parser.parse_args()
  setting = common.setting(('jax', 'jaxlib', 'torch', 'mergekit', 'numpy'))
  rows = []
  for size in args.size:
    for dtype in args.dtype:
      rows += run(size, dtype, args.repeats, args.rows)
      jax.clear_caches()
  common.finish(args, setting, rows)


if __name__ == '__main__':
  main()
