"""One of several processes that share checkpoints: FOLDER, which must be new.

Beside it lies `merged`, a merged checkpoint of Orbax. Prints what it has met as
JSON. The other processes are as `hosts.start` finds
them in the environment.
"""

import json
import logging
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from modelstock_jax import merging
from modelstock_jax.formats import hashes
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib


def make(placement, value):
  """A checkpoint, each model of which is with a process of its own."""
  stack = np.random.default_rng(value).normal(size=(2, 20, 50))
  put = jax.make_array_from_callback
  complete = np.full((20, 50), value, np.float32)
  one = np.float32(value)

  def replicated(x):
    return put(x.shape, placement.replicated, lambda index: x[index])

  stack = stack.astype(np.float32)
  keys = jax.jit(
    lambda: jax.random.split(jax.random.key(value), 2),
    out_shardings=placement.stack,
  )()
  state = state_lib.State(
    step=replicated(np.int32(value)),
    params={'w': put(stack.shape, placement.stack, lambda i: stack[i])},
    variables={},
    opt_state={},
    key=keys,
  )
  merged = merging.Merged(
    {'w': replicated(complete)}, {'w': replicated(one)}, {}
  )
  return checkpoints_lib.Checkpoint(state, merged, None)


def same(actual, saved):
  bits = [
    [
      np.asarray(shard.data).tobytes()
      for leaf in jax.tree.leaves(tree._replace(key=()))
      for shard in leaf.addressable_shards
    ]
    for tree in (actual.state, saved.state)
  ]
  return bits[0] == bits[1]


def main(folder):
  logging.basicConfig(level=logging.INFO)
  hosts.start()
  placement = sharding.place(stock=2, batch_size=2)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make(placement, 0),
  )
  with checkpoints_lib.Checkpoints(folder) as checkpoints:
    for step in (3, 7, 9):
      checkpoints.save(step, make(placement, step))
  met = []

  def restore():
    with checkpoints_lib.Checkpoints(folder) as checkpoints:
      try:
        actual = checkpoints.restore(like)
      except (OSError, ValueError) as error:
        met.append(f'{type(error).__name__}: {error}')
        return
    step = int(actual.state.step)
    met.append([step, same(actual, make(placement, step))])

  def break_one():
    """Damage what only process 1 reads: its part of model 1."""
    files = (folder / '9' / 'state' / 'ocdbt.process_1' / 'd').iterdir()
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

  def newer():
    path = folder / '7' / 'meta' / 'metadata'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'layout': 2}))
    hashes.write(folder / '7', 0)

  shape = jax.ShapeDtypeStruct((2, 6), np.float32, sharding=placement.stack)
  with ocp.StandardCheckpointer() as reader:
    merged = reader.restore(folder.with_name('merged'), {'w': shape})['w']
  [shard] = merged.addressable_shards
  met.append([shard.index[0].start, np.asarray(shard.data).tolist()])
  restore()
  hosts.run_on_process_0(break_one)
  restore()
  hosts.run_on_process_0(newer)
  restore()
  print(json.dumps(met), flush=True)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
