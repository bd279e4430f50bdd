r"""Time and peak memory of loading a CLIP ViT-L/14.

    python experiments/benchmarks/load_pretrained.py [--json FILE] [--repeats 5]

One float32 `model.safetensors` with a `config.json`, random weights, written
by `transformers`, is loaded by

* ours: `clip.load_pretrained(directory)`;
* transformers: `CLIPModel.from_pretrained(directory)`.

Each measurement is a process of its own, whose imports are not in the time;
the two take turns, so that a busy machine is busy for both. 'load' is the call
alone. transformers' parameters are the pages of the mapped file, read when
they are used; ours are copies, kernels turned to [in, out] and checked to be
finite. So 'load and read' adds the sum over every parameter, and the peak is
that after the sum.

Peak memory is `ru_maxrss`: all that the process holds, mapped pages of the
file too. 'above start' is what came on top of the interpreter and its imports.

The limit is reading the file once, in order, from the page cache into a warm
buffer. It is the best of as many repeats.
"""

import argparse
from collections.abc import Callable
import importlib
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

LOADERS = ('ours', 'transformers')
PACKAGES = ('jax', 'safetensors', 'torch', 'transformers', 'numpy')


def write(directory: str) -> None:
  """Writes the checkpoint: the sizes of openai/clip-vit-large-patch14."""
  transformers = importlib.import_module('transformers')
  config = transformers.CLIPConfig(
    projection_dim=768,
    vision_config=dict(
      hidden_size=1024,
      intermediate_size=4096,
      num_attention_heads=16,
      num_hidden_layers=24,
      patch_size=14,
      projection_dim=768,
    ),
    text_config=dict(
      hidden_size=768,
      intermediate_size=3072,
      num_attention_heads=12,
      projection_dim=768,
    ),
  )
  transformers.CLIPModel(config).save_pretrained(directory)


def ours(directory: str) -> tuple[Callable, Callable]:
  """Our loader, and a function that reads all it gave."""
  jax = importlib.import_module('jax')
  np = importlib.import_module('numpy')
  clip = importlib.import_module('modelstock_jax.clip')
  jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend

  def load():
    return jax.block_until_ready(clip.load_pretrained(directory).params)

  def read(params):
    return [np.asarray(leaf).sum() for leaf in jax.tree.leaves(params)]

  return load, read


def theirs(directory: str) -> tuple[Callable, Callable]:
  """The loader of transformers, and a function that reads all it gave."""
  transformers = importlib.import_module('transformers')
  kind = transformers.CLIPModel  # imported here: the name is lazy

  def read(model):
    return [leaf.detach().numpy().sum() for leaf in model.parameters()]

  return lambda: kind.from_pretrained(directory), read


def child(loader: str, directory: str) -> dict[str, float]:
  """One measurement, in this process: seconds and bytes."""
  load, read = {'ours': ours, 'transformers': theirs}[loader](directory)
  start_bytes = common.peak_bytes()
  start = time.perf_counter()
  loaded = load()
  load_s = time.perf_counter() - start
  sums = read(loaded)
  read_s = time.perf_counter() - start
  return {
    'load_s': load_s,
    'read_s': read_s,
    'peak': common.peak_bytes(),
    'above_start': common.peak_bytes() - start_bytes,
    'tensors': len(sums),
  }


def spawn(*arguments: str) -> str:
  """Runs this file in a process of its own; what it printed last."""
  command = [sys.executable, __file__, *arguments]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return done.stdout.strip().rpartition('\n')[2]


def sequential_read(path: pathlib.Path, repeats: int) -> list[float]:
  """Seconds to read a file from the page cache, after a round to fill it."""
  buffer = bytearray(1 << 22)
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    with path.open('rb', buffering=0) as file:
      while file.readinto(buffer):
        pass
    times.append(time.perf_counter() - start)
  return times[1:]


def run(repeats: int) -> dict[str, Any]:
  """Measures everything. This process stays small: children start as it is."""
  # In a process of its own, as it imports jax.
  setting = common.alone(common.setting, PACKAGES)
  with tempfile.TemporaryDirectory() as directory:
    spawn('--child', 'write', directory)
    path = pathlib.Path(directory) / 'model.safetensors'
    size = path.stat().st_size
    limits = sequential_read(path, repeats)
    rows: dict[str, list] = {name: [] for name in LOADERS}
    for _ in range(repeats):
      for name in LOADERS:
        rows[name].append(json.loads(spawn('--child', name, directory)))
  return {
    'setting': setting,
    'repeats': repeats,
    'file_bytes': size,
    'limit_s': min(limits),
    'loaders': {
      name: {
        'load_median_s': statistics.median(row['load_s'] for row in found),
        'load_min_s': min(row['load_s'] for row in found),
        'read_median_s': statistics.median(row['read_s'] for row in found),
        'read_min_s': min(row['read_s'] for row in found),
        'peak_bytes': max(row['peak'] for row in found),
        'above_start_bytes': max(row['above_start'] for row in found),
        'tensors': found[0]['tensors'],
      }
      for name, found in rows.items()
    },
  }


def table(result: dict[str, Any]) -> str:
  """The result as a Markdown table."""
  size, limit = result['file_bytes'], result['limit_s']
  lines = [
    '| loader | load s: median, min | load and read s: median, min '
    '| x limit (min) | peak MB | peak / file | above start / file |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, row in result['loaders'].items():
    lines.append(
      f'| {name} | {row["load_median_s"]:.2f}, {row["load_min_s"]:.2f} '
      f'| {row["read_median_s"]:.2f}, {row["read_min_s"]:.2f} '
      f'| {row["read_min_s"] / limit:.1f} | {row["peak_bytes"] / 1e6:.0f} '
      f'| {row["peak_bytes"] / size:.2f} '
      f'| {row["above_start_bytes"] / size:.2f} |'
    )
  our, their = (result['loaders'][name] for name in LOADERS)
  ratios = {
    'load': our['load_min_s'] / their['load_min_s'],
    'load and read': our['read_min_s'] / their['read_min_s'],
    'peak': our['peak_bytes'] / their['peak_bytes'],
  }
  shown = ', '.join(f'{k} {v:.2f}' for k, v in ratios.items())
  lines += [
    f'| limit: one sequential read | | {limit:.2f} | 1.0 | | | |',
    '',
    f'ours / transformers (min): {shown}',
    f'file: {size / 1e6:.0f} MB, {our["tensors"]} tensors, read at '
    f'{size / limit * 1e-9:.1f} GB/s; {result["repeats"]} repeats',
    common.describe(result['setting']),
  ]
  return '\n'.join(lines)


def main() -> None:
  """Runs the benchmark and prints its table."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    what, directory = args.child
    if what == 'write':
      write(directory)
    else:
      print(json.dumps(child(what, directory)))
    return
  result = run(args.repeats)
  print(table(result))
  common.write(result, args.json)


if __name__ == '__main__':
  main()
