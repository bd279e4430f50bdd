"""Flags of the XLA compiler, set before JAX starts."""

import argparse
from collections.abc import MutableMapping
import os

# By the variable that is read by libtpu (TPUs), and by jaxlib (GPUs). Where
# they are from, and what they change: docs/hosts.md.
RECOMMENDED = {
  'LIBTPU_INIT_ARGS': {
    '--xla_tpu_enable_latency_hiding_scheduler': 'true',
    '--xla_enable_async_all_reduce': 'true',
    '--xla_tpu_enable_async_collective_fusion_fuse_all_reduce': 'true',
    '--xla_jf_crs_combiner_threshold_in_bytes': str(2**20),
  },
  'XLA_FLAGS': {'--xla_gpu_enable_latency_hiding_scheduler': 'true'},
}


def add_argument(parser: argparse.ArgumentParser) -> None:
  """Add --xla."""
  parser.add_argument(
    '--xla',
    choices=['recommended'],
    help='set flags of the compiler by which devices compute while data move '
    'between them, except those that LIBTPU_INIT_ARGS or XLA_FLAGS have',
  )


def set_flags(
  choice: str | None, environ: MutableMapping[str, str] = os.environ
) -> None:
  """Set the flags of --xla; JAX must not have started its devices.

  Args:
    choice: 'recommended', or None, which sets nothing.
    environ: whose values win.

  >>> environ = {'XLA_FLAGS': '--xla_gpu_enable_latency_hiding_scheduler=false'}
  >>> set_flags('recommended', environ)
  >>> environ['XLA_FLAGS']
  '--xla_gpu_enable_latency_hiding_scheduler=false'
  >>> '--xla_enable_async_all_reduce=true' in environ['LIBTPU_INIT_ARGS']
  True
  """
  if choice is None:
    return
  for variable, flags in RECOMMENDED.items():
    words = environ.get(variable, '').split()
    names = {word.partition('=')[0] for word in words}
    missing = [f'{k}={v}' for k, v in flags.items() if k not in names]
    environ[variable] = ' '.join([*words, *missing])
