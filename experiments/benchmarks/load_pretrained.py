r"""Time and peak memory of loading a CLIP ViT-L/14.

    python experiments/benchmarks/load_pretrained.py [--json FILE] [--repeats 5]

One float32 `model.safetensors` with a `config.json` and random weights is
loaded by

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
buffer. What is loaded needs memory: 'new memory' fills arrays of as many bytes,
in a process of its own as well. A virtual machine may have to be given each new
page by its host, which then takes most of the time.
"""

import importlib
import pathlib
import tempfile
import time
from typing import Any

import common

PACKAGES = ('jax', 'safetensors', 'torch', 'transformers', 'numpy')


def write(directory: str) -> dict[str, Any]:
  """Write the checkpoint of `clip.SIZES['ViT-L/14']`; return the setting."""
  jax = importlib.import_module('jax')
  clip = importlib.import_module('modelstock_jax.clip')
  model = clip.create(clip.SIZES['ViT-L/14'])
  params = jax.jit(model.init)(jax.random.key(0))
  clip.save_pretrained(params, directory, config=model.config)
  return common.setting(PACKAGES)


def ours(directory: str) -> dict[str, float]:
  """Measure our loader, in this process."""
  jax = importlib.import_module('jax')
  clip = importlib.import_module('modelstock_jax.clip')
  jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
  return measure(
    lambda: jax.block_until_ready(clip.load_pretrained(directory).params),
    lambda params: [jax.device_get(x).sum() for x in jax.tree.leaves(params)],
  )


def theirs(directory: str) -> dict[str, float]:
  """Measure the loader of transformers, in this process."""
  model = importlib.import_module('transformers').CLIPModel
  return measure(
    lambda: model.from_pretrained(directory),
    lambda loaded: [x.detach().numpy().sum() for x in loaded.parameters()],
  )


def new_memory(directory: str) -> dict[str, float]:
  """Measure arrays of the size of the checkpoint that are filled once."""
  np = importlib.import_module('numpy')
  piece = 2**22  # elements
  size = pathlib.Path(directory, 'model.safetensors').stat().st_size
  return measure(
    lambda: [np.ones(piece, np.float32) for _ in range(size // piece // 4)],
    lambda arrays: [array.sum() for array in arrays],
  )


def measure(load: Any, read: Any) -> dict[str, float]:
  """Return seconds and bytes of loading, and of then reading all."""
  start_bytes = common.peak_bytes()
  start = time.perf_counter()
  loaded = load()
  load_s = time.perf_counter() - start
  read(loaded)
  peak = common.peak_bytes()
  return {
    'load s': load_s,
    'load and read s': time.perf_counter() - start,
    'peak': peak,
    'above start': peak - start_bytes,
  }


def sequential_read(path: pathlib.Path) -> float:
  """Return the seconds to read a file from the page cache."""
  buffer = bytearray(1 << 22)
  start = time.perf_counter()
  with path.open('rb', buffering=0) as file:
    while file.readinto(buffer):
      pass
  return time.perf_counter() - start


def main() -> None:
  """Run the benchmark and print its table."""
  args = common.parser(__doc__, repeats=5).parse_args()
  loaders = {
    'ours': ours,
    'transformers': theirs,
    'new memory': new_memory,
  }
  runs: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
  with tempfile.TemporaryDirectory() as directory:
    # In a process of its own: children start with the memory of this one.
    setting = common.alone(write, directory)
    path = pathlib.Path(directory, 'model.safetensors')
    size = path.stat().st_size
    sequential_read(path)
    limit = min(sequential_read(path) for _ in range(args.repeats))
    for _ in range(args.repeats):
      for name, loader in loaders.items():
        runs[name].append(common.alone(loader, directory))
  rows = []
  for name, measured in runs.items():
    columns = {key: [run[key] for run in measured] for key in measured[0]}
    load, read = columns['load s'], columns['load and read s']
    peak = max(columns['peak'])
    rows.append(
      {
        'loader': name,
        'load s, min': min(load),
        'load and read s, min': min(read),
        'x limit (min)': min(read) / limit,
        'peak MB': peak / 1e6,
        'peak / file': peak / size,
        'above start / file': max(columns['above start']) / size,
      }
    )
  note = f'limit: {size / 1e6:.0f} MB, read once in {limit:.3f} s'
  common.finish(args, setting, rows, [note])


if __name__ == '__main__':
  main()
