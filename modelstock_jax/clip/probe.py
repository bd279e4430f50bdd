"""The linear probe: logistic regression on frozen image embeddings.

minimise over W, b   mean_i CE(softmax(f_i / |f_i| @ W + b), y_i)
                     + l2 / 2 * |W|^2

The bias is not regularised. The logits are those of `clip.classifier`, so the
result is a 'head' of its params: where linear probing, then fine-tuning
(arXiv:2202.10054) starts from.

Source: appendix A.3 of arXiv:2103.00020: L-BFGS with at most 1000 iterations,
the strength of the regularisation chosen on validation data.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import logging
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array | np.ndarray
Examples = tuple[Array, Array]  # features float[n, D], labels int[n]
Head = dict[str, Array]

STRENGTHS = tuple(np.logspace(-1, -8, 15).tolist())

_log = logging.getLogger(__name__)


class Probe(NamedTuple):
  """The head of the strength that does best on validation data."""

  head: Head  # {'kernel': float32[D, K], 'bias': float32[K]}
  l2: float
  accuracy: float  # on validation data, 0..1
  tried: dict[float, float]  # validation accuracy by l2, the strongest first


def linear_probe(
  train: Examples,
  validation: Examples,
  *,
  num_classes: int,
  strengths: Sequence[float] = STRENGTHS,
  sharding: jax.sharding.Sharding | None = None,
  tol: float = 1e-5,
) -> Probe:
  """Fit a head with every strength and keep the best on validation data.

  From the strongest to the weakest, each fit starts where the one before
  ended. Of strengths that do equally well, the strongest is kept.

  Args:
    train: features float[n, D], image embeddings of any length, and labels
      int[n] in 0..K-1.
    validation: likewise, of examples that are not in `train`; no head is
      fitted to them.
    num_classes: K, at least 2.
    strengths: values of l2, in any order.
    sharding: how to spread the features, cut along the examples; n need not
      divide over the devices. None leaves them where they are.
    tol: as in `fit`.

  Returns:
    A `Probe`.

  Raises:
    ValueError: features are not finite or all zero, labels are out of range,
      shapes do not belong together, or a strength is not above 0.

  >>> labels = np.array([0, 0, 1])
  >>> train = np.float32([[3, 1], [2, 0], [0, 1]]), labels
  >>> validation = np.float32([[3, 2], [1, 2]]), labels[1:]
  >>> probe = linear_probe(train, validation, num_classes=2, strengths=[0.1, 1])
  >>> probe.l2, probe.accuracy, probe.tried
  (0.1, 1.0, {1.0: 0.5, 0.1: 1.0})
  """
  _check({'train': train, 'validation': validation}, num_classes, strengths)
  n = len(validation[1])
  train, validation = _place(*train, sharding), _place(*validation, sharding)
  tried: dict[float, float] = {}
  best = Probe({}, 0.0, -1.0, tried)
  head: Head = {
    'kernel': np.zeros((train[0].shape[1], num_classes), np.float32),
    'bias': np.zeros(num_classes, np.float32),
  }
  for l2 in sorted(map(float, strengths), reverse=True):
    head = fit(*train, head, l2=l2, tol=tol)
    tried[l2] = int(_count_correct(jax.device_get(head), *validation)) / n
    if tried[l2] > best.accuracy:
      best = Probe(head, l2, tried[l2], tried)
  return best


def fit(
  features: jax.Array,
  labels: Array,
  start: Head,
  *,
  l2: float,
  max_steps: int = 1000,
  tol: float = 1e-5,
) -> Head:
  """Fit a head to all examples at once, with one strength.

  A fit that reaches `max_steps` before `tol` is reported by a warning in the
  log. In addition to the features, a fit takes about three arrays of
  float32[n, K], split over the devices as the features are: 15 GB for the 1.28
  million examples and 1000 classes of ImageNet.

  Args:
    features: float32[n, D], image embeddings of any length.
    labels: int32[n], in 0..K-1; -1 does not count. A class without an example
      is allowed: its bias falls until the gradient is below `tol`.
    start: the head to start from.
    l2: the strength, greater than 0. scikit-learn's is 1 / (C n).
    max_steps: of L-BFGS.
    tol: the norm of the gradient at which a fit ends.

  Returns:
    {'kernel': float32[D, K], 'bias': float32[K]}.

  >>> features, labels = jnp.float32([[3, 1], [0, 1]]), np.int32([0, 1])
  >>> start = {'kernel': jnp.zeros((2, 2)), 'bias': jnp.zeros(2)}
  >>> fit(features, labels, start, l2=0.1)['kernel'].shape
  (2, 2)
  """
  start = jax.tree.map(lambda x: np.asarray(x, np.float32), start)
  head, _, norm, steps = jax.device_get(
    _minimize(features, labels, start, l2, tol, max_steps)
  )
  if not norm <= tol:  # also when it is not a number
    _log.warning(
      'The fit with l2=%.3g has not converged: after %d steps the norm of the '
      'gradient is %.2g, not tol=%.2g. Raise max_steps, tol or l2.',
      *(l2, steps, norm, tol),
    )
  return jax.tree.map(jnp.asarray, head)


@jax.jit
def _minimize(features, labels, start, l2, tol, max_steps):
  """Run L-BFGS from `start`; examples with label -1 do not count."""
  lengths = _lengths(features)
  counted = labels >= 0
  n = jnp.sum(counted).astype(jnp.float32)
  classes = jnp.arange(start['bias'].shape[0], dtype=labels.dtype)
  is_label = labels[:, None] == classes[None]

  def loss(head):
    logits = _logits(head, features, lengths)
    # log(1 + sum_{k != y} exp(z_k - z_y)): with the y-th term left in the sum
    # it rounds to 1e-7 of the logits, which hides the descent from the line
    # search once examples are fitted well. A comparison, not an index, so
    # that each device needs nothing but its rows.
    label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=1, keepdims=True)
    margins = jnp.where(is_label, -jnp.inf, logits - label_logit)
    losses = jax.nn.softplus(jax.nn.logsumexp(margins, axis=1))
    penalty = l2 / 2 * jnp.sum(jnp.square(head['kernel']))
    return jnp.sum(jnp.where(counted, losses, 0)) / n + penalty

  tx: Any = optax.lbfgs()  # its state is a tuple, which no type says
  value_and_grad = optax.value_and_grad_from_state(loss)

  def unfinished(carry):
    _, _, norm, steps = carry
    return (norm > tol) & (steps < max_steps)

  def step(carry):
    head, state, _, steps = carry
    value, grad = value_and_grad(head, state=state)
    updates, state = tx.update(
      grad, state, head, value=value, grad=grad, value_fn=loss
    )
    head = optax.apply_updates(head, updates)
    # The line search, last in the chain, knows the gradient at the new head.
    squares = jax.tree.map(lambda g: jnp.sum(g * g), state[-1].grad)
    return head, state, jnp.sqrt(sum(jax.tree.leaves(squares))), steps + 1

  head, state, norm, steps = jax.lax.while_loop(
    unfinished,
    step,
    (start, tx.init(start), jnp.float32(jnp.inf), jnp.int32(0)),
  )
  return head, state[-1].value, norm, steps


@jax.jit
def _count_correct(head, features, labels):
  logits = _logits(head, features, _lengths(features))
  return jnp.sum(jnp.argmax(logits, axis=1) == labels, dtype=jnp.int32)


def _logits(head, features, lengths):
  """Return the logits of `heads.classify`, without normalised features."""
  products = jnp.matmul(
    features, head['kernel'], precision=jax.lax.Precision.HIGHEST
  )
  return products / lengths[:, None] + head['bias'][None]


@jax.jit
def _lengths(features):
  return jnp.linalg.norm(features, axis=1)


def _place(
  features: Array, labels: Array, sharding: jax.sharding.Sharding | None
) -> tuple[jax.Array, np.ndarray]:
  """Place examples on the devices, padded with label -1 to divide evenly."""
  labels, number = np.asarray(labels, np.int32), len(labels)
  features = np.asarray(features, np.float32)
  missing = 0 if sharding is None else -number % sharding.num_devices
  if missing:
    # With the last row: a blank one would have no direction.
    features = np.pad(features, [(0, missing), (0, 0)], mode='edge')
    labels = np.pad(labels, (0, missing), constant_values=-1)
  features = jax.device_put(features, sharding)
  lengths = jax.device_get(_lengths(features))[:number]
  wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
  if wrong.size:
    raise ValueError(
      f'features of {wrong.size} of {number} examples are not finite or '
      f'all zero, first of example {wrong[0]}, whose length is '
      f'{lengths[wrong[0]]}: leave them out, or look at their images.'
    )
  return features, labels


def _check(
  sets: Mapping[str, Examples], num_classes: int, strengths: Sequence[float]
) -> None:
  """Raise one error over all shapes, labels and strengths."""
  problems = []
  for name, (features, labels) in sets.items():
    shape = features.shape
    if len(shape) != 2 or not features.size or labels.shape != shape[:1]:
      problems.append(
        f'{name}: features have shape {shape}, labels {labels.shape}; they '
        'must have shapes (n, D) and (n,), none of them zero.'
      )
    labels = np.asarray(labels)
    wrong = labels[~np.isin(labels, np.arange(num_classes))]
    if wrong.size:
      problems.append(
        f'{name}: labels {np.unique(wrong)[:5].tolist()} of {wrong.size} '
        f'examples are not integers in 0..{num_classes - 1}: correct them, or '
        'num_classes.'
      )
  # Without a penalty, classes that can be told apart have no minimum.
  weak = [l2 for l2 in strengths if not 0 < l2 < np.inf]
  if weak or not len(strengths):
    problems.append(f'strengths={weak}: must be greater than 0, and finite.')
  if problems:
    raise ValueError('\n'.join(problems))
