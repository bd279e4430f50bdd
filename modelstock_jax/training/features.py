"""Frozen image embeddings of all examples of a source."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from modelstock_jax import data
from modelstock_jax.clip import heads
from modelstock_jax.training import evaluation
from modelstock_jax.training import sharding

Params = Any


def image_features(
  encode: Callable[[Params, jax.Array], jax.Array],
  preprocess: Callable[[jax.Array], jax.Array],
  params: Params,
  placement: sharding.Placement,
  source: data.Source,
  read: data.EvalRead,
  *,
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Embed every example once, on all devices.

  Compiled once for the same `encode`, `preprocess` and shapes: pass the same
  functions again for the next source.

  Args:
    encode: params, images -> embeddings float[B, D], such as
      `clip.create(config).encode_image`.
    preprocess: uint8 images to what `encode` takes.
    params: of `encode`, replicated over the mesh.
    placement: batches are spread over all its devices.
    source: the examples.
    read: record, index -> example with 'image' and 'label'.
    batch_size: examples in a step; rounded up to a multiple of the devices.

  Returns:
    Features float32[n, D], of length 1, and labels int32[n], in the order of
    the source.

  Raises:
    ValueError: the batch size is not positive.
  """
  batch_size += -batch_size % placement.mesh.size
  features, labels = [], []
  for batch in evaluation.batches(source, read, placement, batch_size):
    outputs = _embed(encode, preprocess, placement.replicated, params, **batch)
    # On the host at once: all of ImageNet's may not fit on the devices.
    rows, label, mask = map(np.asarray, outputs)
    features.append(rows[mask])
    labels.append(label[mask])
  return np.concatenate(features), np.concatenate(labels)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(encode, preprocess, replicated, params, *, image, label, mask):
  rows = heads.normalize(encode(params, preprocess(image)))
  # Every process takes all of them home.
  return jax.lax.with_sharding_constraint((rows, label, mask), replicated)
