"""The greedy soup: the average of those models that do not harm it."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
import reprlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree


class Greedy(NamedTuple):
  """A greedy soup, and how it came about.

  Attributes:
    params: the average of its members, in the models' dtypes.
    members: indices of the models in it, in the order they were added.
    scores: score of each model alone, in the order of the models.
    score: score of the soup.
  """

  params: PyTree
  members: tuple[int, ...]
  scores: tuple[float, ...]
  score: float


def greedy_soup(
  models: Sequence[PyTree] | PyTree,
  score: Callable[[PyTree], Any],
  *,
  stacked: bool = False,
) -> Greedy:
  """Average those models that do not harm the average.

  Models are taken in the order of their own scores, best first (of equal ones
  the earlier first). Each joins if the average with it scores no less than
  the average without it.

  Models are read one at a time, so that a sequence may load each from its file
  when indexed (three times in all); a sum of the members in float32 and one
  candidate are held besides. Not for `jit`: what is done depends on scores.

  Args:
    models: a sequence of N >= 1 trees, or with `stacked` one tree of leaves
      `[N, ...]`.
    score: maps params to a number on a held-out split, neither trained nor
      tested on; the higher, the better. Called 2N - 1 times.
    stacked: True if `models` is one tree.

  Returns:
    A `Greedy`. Leaves that are not floating point must agree.

  Raises:
    ValueError: if trees differ (all differing leaves are named), or if a score
      is not finite.

  Source: Wortsman et al. Model soups. ICML 2022, arXiv:2203.05482, recipe 1.
  Their program differs from the recipe where scores are equal: there it leaves
  the model out.

  >>> import jax.numpy as jnp
  >>> models = [{'w': jnp.array([x])} for x in (1.0, 9.0, 2.0)]
  >>> soup = greedy_soup(models, lambda params: -abs(params['w'][0] - 1.6))
  >>> soup.members, soup.params['w'].tolist()
  ((2, 0), [1.5])
  """
  if stacked:
    size, read = trees.stack_size(models), functools.partial(trees.row, models)
  else:
    trees.check_sequence(models, least=1)
    size, read = len(models), models.__getitem__
  shapes = [jax.tree.map(_without_values, read(i)) for i in range(size)]
  family = trees.align(shapes[0], shapes, least=1, anchor_name='model 0')
  dtypes = tuple(str(leaf.dtype) for leaf in family.floats(family.anchor))

  def leaves(i):
    aligned = trees.align(shapes[0], [read(i)], least=1)
    return aligned.floats(aligned.models[0])

  def average(total, count):
    count = leaves_lib.as_jax(count)
    return family.tree(_divide(total, count, dtypes=dtypes), family.agreed)

  scores = [_finite(score(read(i)), f'model {i}') for i in range(size)]
  best, *others = sorted(range(size), key=lambda i: -scores[i])
  members, current = [best], scores[best]
  total = _wide(leaves(best))
  for i in others:
    together = _sum(total, leaves(i))
    params = average(together, len(members) + 1)
    with_it = _finite(score(params), f'the average of models {[*members, i]}')
    if with_it >= current:
      members.append(i)
      total, current = together, with_it
  params = average(total, len(members))
  return Greedy(params, tuple(members), tuple(scores), current)


def _without_values(leaf: Any) -> Any:
  """Return a floating leaf's shape, dtype and place; other leaves as is."""
  if not leaves_lib.is_floating(leaf):
    return leaf
  placed = leaves_lib.devices(leaf) is not None
  sharding = leaf.sharding if placed else None
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _finite(score: Any, scored: str) -> float:
  """Return a score as a number, checked to be finite."""
  number = jax.device_get(score)
  if np.ndim(number) or not math.isfinite(number):
    raise ValueError(
      f'score: {reprlib.repr(number)} for {scored}, must be one finite '
      'number. Is the held-out split empty, or did a model diverge? Leave such '
      'models out.'
    )
  return float(number)


@jax.jit
def _wide(leaves: list[Any]) -> list[jax.Array]:
  return [jnp.asarray(x, leaves_lib.wide(x.dtype)) for x in leaves]


@jax.jit
def _sum(total: list[jax.Array], leaves: list[Any]) -> list[jax.Array]:
  return [t + x.astype(t.dtype) for t, x in zip(total, leaves, strict=True)]


@functools.partial(jax.jit, static_argnames='dtypes')
def _divide(
  total: list[jax.Array], count: Any, *, dtypes: tuple[str, ...]
) -> list[jax.Array]:
  return [
    (t / jnp.asarray(count, t.dtype)).astype(dtype)
    for t, dtype in zip(total, dtypes, strict=True)
  ]
