"""Angles between displacements, and how far to go from the anchor.

Every reduction is a multiplication and a sum. Matrix products would be
shorter, but they gather sharded weights, run float32 in bfloat16 on TPUs and
are an order of magnitude slower on CPUs.
"""

from collections.abc import Sequence
import functools
import itertools
import math
import operator
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.merging import formula
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import options as options_lib

# XLA's CPU backend turns several sums over the same inputs into one slow
# scalar loop. A reduction of several operands over a short axis, with another
# one inside, it unrolls and vectorises: up to 32 terms, of 8 neighbours. More
# of either takes up to twice the time.
TERMS, LANES = 32, 8
# Smaller leaves gain nothing.
LEAST = 2**16

# Pairs of up to so many models are written out one by one, which lets XLA take
# all sums in one pass. Beyond, programs would take minutes to compile.
FEW = 5

# Sums of squares within these lose nothing in float32, whatever the size of the
# leaf. Those outside are taken again, of displacements times or over SCALE.
LOW, HIGH, SCALE = 2.0**-71, 2.0**104, 2.0**80


def gram(
  anchor: jax.Array,
  models: Sequence[jax.Array] | jax.Array,
  *,
  num_models: int,
  keep: tuple[int, ...] = (),
  scales: jax.Array | None = None,
) -> jax.Array:
  """Compute inner products of the displacements d_i = w_i - w_0 of a leaf.

  Args:
    anchor: `[...]` w_0, any floating dtype.
    models: N arrays like the anchor, or one stacked `[N, ...]`.
    num_models: N.
    keep: axes of the anchor that are not summed over, in ascending order.
    scales: `[..., N]` factors of the displacements, led by the kept axes.

  Returns:
    `[..., N, N]` sums of d_i d_j, led by the kept axes, in float32 (float64 for
    float64 leaves).
  """
  dtype = leaves_lib.wide(anchor.dtype)
  reduced = tuple(a for a in range(anchor.ndim) if a not in keep)
  factors = None
  if scales is not None:
    factors = jnp.moveaxis(scales.astype(dtype), -1, 0)
    factors = jnp.expand_dims(factors, tuple(a + 1 for a in reduced))
  if num_models > FEW:
    return _gram_by_rows(anchor, models, reduced, factors)
  center = anchor.astype(dtype)
  steps = [
    leaves_lib.widened(models, i, dtype) - center for i in range(num_models)
  ]
  if factors is not None:
    steps = [step * factors[i] for i, step in enumerate(steps)]
  pairs = list(itertools.combinations_with_replacement(range(num_models), 2))
  products = [steps[i] * steps[j] for i, j in pairs]

  def plain(*products):
    return [jnp.sum(product, axis=reduced) for product in products]

  # Sums in blocks would gather what is cut over devices.
  one_device = jax.device_count() == 1
  blocks = _blocks(anchor.shape, reduced) if one_device else None
  if blocks is None:
    sums = plain(*products)
  else:
    # What is traced here may yet be compiled for other machines.
    sums = jax.lax.platform_dependent(
      *products,
      cpu=functools.partial(_sum_blocks, blocks, keep),
      default=plain,
    )
  by_pair = dict(zip(pairs, sums, strict=True))
  rows = [
    jnp.stack([by_pair[min(i, j), max(i, j)] for j in range(num_models)], -1)
    for i in range(num_models)
  ]
  return jnp.stack(rows, axis=-2)


def rescale(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Choose the `scales` with which no square of `gram` under- or overflows.

  Args:
    gram: `[..., N, N]` inner products without scales, of a layer.

  Returns:
    `[..., N]` powers of two, and bool[]: one of them is not 1, as it is also
    for a displacement of 0.
  """
  squares = jax.lax.stop_gradient(jnp.diagonal(gram, axis1=-2, axis2=-1))
  low, high = squares < LOW, squares > HIGH
  scales = jnp.where(low, SCALE, jnp.where(high, 1 / SCALE, 1.0))
  return scales.astype(gram.dtype), jnp.any(low | high)


def _gram_by_rows(
  anchor: jax.Array,
  models: Sequence[jax.Array] | jax.Array,
  reduced: tuple[int, ...],
  factors: jax.Array | None,
) -> jax.Array:
  """Compute `gram` of any number of models, one row after the other.

  The displacements are held in float32, and a stack that is cut over devices
  by its models is gathered.
  """
  dtype = leaves_lib.wide(anchor.dtype)
  stack = models if isinstance(models, jax.Array) else jnp.stack(models)
  steps = stack.astype(dtype) - anchor.astype(dtype)[None]
  steps = steps if factors is None else steps * factors
  axes = tuple(a + 1 for a in reduced)

  def row(step):
    return jnp.sum(steps * step[None], axis=axes)

  return jnp.moveaxis(jax.lax.map(row, steps), (0, 1), (-2, -1))


def _blocks(
  shape: tuple[int, ...], reduced: tuple[int, ...]
) -> tuple[int, ...] | None:
  """Return the shape with its last, summed axes as [..., TERMS, LANES].

  None: they cannot be cut so.
  """
  first = len(shape)
  while first - 1 in reduced:
    first -= 1
  rows, rest = divmod(math.prod(shape[first:]), LANES)
  terms = max(n for n in range(1, TERMS + 1) if rows % n == 0)
  if math.prod(shape) < LEAST or rest or 2 * terms < TERMS:
    return None
  return (*shape[:first], rows // terms, terms, LANES)


def _sum_blocks(
  blocks: tuple[int, ...], keep: tuple[int, ...], *products: jax.Array
) -> list[jax.Array]:
  """Sum arrays of one shape over all axes that are not kept."""
  sums = _sum_terms([product.reshape(blocks) for product in products])
  # LANES first: few terms in a row lose few digits.
  sums = [jnp.sum(x, axis=-1) for x in sums]
  others = tuple(a for a in range(len(blocks) - 2) if a not in keep)
  return [jnp.sum(x, axis=others) for x in sums]


@jax.custom_jvp
def _sum_terms(operands: list[jax.Array]) -> list[jax.Array]:
  """Sum several arrays along the axis before the last, in one pass."""
  zeros = [jnp.zeros((), x.dtype) for x in operands]

  def add(left, right):
    return [x + y for x, y in zip(left, right, strict=True)]

  return list(jax.lax.reduce(operands, zeros, add, (operands[0].ndim - 2,)))


@_sum_terms.defjvp
def _sum_terms_jvp(primals, tangents):
  """Apply the sums to tangents: JAX would take the reduction apart."""
  return _sum_terms(*primals), [jnp.sum(x, axis=-2) for x in tangents[0]]


def mean_cosine(
  gram: jax.Array, average: str, clip: options_lib.Clip = True
) -> jax.Array:
  """Compute the mean cosine over pairs of displacements.

  Args:
    gram: `[..., N, N]` their inner products.
    average: 'cosine' takes the mean of the pairwise cosines (the authors'
      choice for N > 2), 'angle' the cosine of the mean angle.
    clip: see `formula.cosine`.

  Returns:
    `[...]`. A pair of which at least one displacement is zero has no angle and
    counts as orthogonal (cosine 0).
  """
  # cos(mean(arccos c)) = sin(mean(arcsin c)), exact at 0 and at 1.
  value = _arcsin if average == 'angle' else lambda cosine: cosine
  pairs = list(itertools.combinations(range(gram.shape[-1]), 2))
  if gram.shape[-1] <= FEW:
    values = [
      value(
        formula.cosine(
          gram[..., i, j], gram[..., i, i], gram[..., j, j], jnp, clip
        )
      )
      for i, j in pairs
    ]
    total = functools.reduce(operator.add, values)
  else:
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    rows, columns = squares[..., :, None], squares[..., None, :]
    values = value(formula.cosine(gram, rows, columns, jnp, clip))
    # Leading axes as in `gram`: ranks are never promoted silently.
    above = jnp.triu(jnp.ones(gram.shape[-2:], bool), k=1)
    above = jnp.broadcast_to(above, gram.shape)
    total = jnp.sum(jnp.where(above, values, 0), axis=(-2, -1))
  mean = total / len(pairs)
  return jnp.sin(mean) if average == 'angle' else mean


def _arcsin(x: jax.Array) -> jax.Array:
  """Compute arcsin of x clipped to [-1, 1], the gradient 0 where clipped."""
  inside = jnp.abs(x) < 1
  angle = jnp.arcsin(jnp.where(inside, x, 0))
  clipped = jnp.where(jnp.isnan(x), x, jnp.sign(x) * (jnp.pi / 2))
  return jnp.where(inside, angle, clipped)


def interpolation_ratio(cosine: Any, num_models: int) -> jax.Array:
  r"""Compute the position of the merge between anchor (0) and mean (1).

  $$ t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta} $$

  With displacements of equal norm and pairwise angle $\theta$, the point
  $w_H = t \bar w + (1 - t) w_0$ is the closest one, in the plane through the
  anchor and the models, to the centre of all fine-tuned weights.

  Args:
    cosine: `[...]` mean pairwise cosine between displacements, dimensionless,
      in [-1/(N-1), 1] for vectors that exist.
    num_models: N >= 1; for N = 1 the ratio is the cosine itself.

  Returns:
    `[...]` t, not clipped: 0 is the anchor, 1 the mean; negative for negative
    cosines. Where 1 + (N-1) cos is 0, up to rounding, the displacements
    cancel, their mean is the anchor, and t is 0.

  Source: Jang et al., Model Stock, ECCV 2024, equation 3 (two models) and
  its appendix (N models).

  >>> round(float(interpolation_ratio(0.5, 2)), 4)
  0.6667
  """
  if num_models < 1:
    raise ValueError(f'num_models: must be at least 1, got {num_models}.')
  cosine = jnp.asarray(cosine)
  if not jnp.issubdtype(cosine.dtype, jnp.floating):
    cosine = cosine.astype(jnp.float32)
  eps = float(jnp.finfo(cosine.dtype).eps)
  return formula.ratio(cosine, num_models, eps, jnp)
