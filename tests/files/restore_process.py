"""Merges of Orbax, restored by one of several: INDEX COUNT PORT FOLDER.

FOLDER has a merge in FORM/out, and its arrays in FORM.npz.
"""

import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1


def _standard(folder, like):
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(folder, like)


def _manager(folder, like):
  with ocp.CheckpointManager(folder) as manager:
    args = ocp.args.StandardRestore(like)
    return manager.restore(manager.latest_step(), args=args)


RESTORE = {'standard': _standard, 'manager': _manager, 'v1': v1.load}


def main(index, count, port, folder):
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
  mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
  for form, restore in RESTORE.items():
    expected = dict(np.load(pathlib.Path(folder, f'{form}.npz')))
    like = {
      name: jax.ShapeDtypeStruct(
        array.shape,
        np.float32,
        sharding=jax.NamedSharding(
          mesh, jax.P(*[None] * (array.ndim - 1), 'data')
        ),
      )
      for name, array in expected.items()
    }
    tree = restore(
      pathlib.Path(folder, form, 'out'), {'params': {'dense': like}}
    )
    for name, leaf in tree['params']['dense'].items():
      assert leaf.sharding == like[name].sharding
      assert len(leaf.addressable_shards) == 2
      atol = 1e-6 * np.abs(expected[name]).max()
      for shard in leaf.addressable_shards:
        part = expected[name][shard.index]
        np.testing.assert_allclose(shard.data, part, rtol=0, atol=atol)
    print('restored', form)


if __name__ == '__main__':
  main(*sys.argv[1:])
