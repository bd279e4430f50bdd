r"""`modelstock merge` against `mergekit-yaml`, on the same files.

    python experiments/benchmarks/merge_files.py --mergekit=mergekit-yaml
      [--folder=DIR] [--repeats=3] [--dtype=float32]

Three checkpoints of a language model of 160 M parameters (mergekit 0.1.5 does
not take CLIP), 641 MB each in float32, random: an anchor and two models whose
displacements are near 0.01 in size, with cosines near 0.5. Both programs merge
them from the same recipe, as processes of their own that take turns; what they
read is in the page cache. The time is that of the process, imports and all; the
memory is the most it ever had resident, mapped pages of files included.

The limit is copying: one read of the three checkpoints, and one write of the
result, with a buffer of 8 MB.

Differences are measured in units in the last place of the output's dtype: of
each element, and of the largest element of each tensor; from mergekit computing
in float32 and in float64, since its sums over large tensors in float32 are off.

mergekit asks for forty packages. It may be installed anywhere:
`--mergekit=/path/to/its/bin/mergekit-yaml`.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
import ml_dtypes
import numpy as np
import safetensors.numpy

NAMES = ('anchor', 'one', 'two')
# Where mergekit leaves the formula: `torch.norm(a) * torch.norm(b)` below this
# is taken for this.
FLOOR = 1e-6
CONFIG: dict[str, Any] = dict(
  architectures=['LlamaForCausalLM'],
  model_type='llama',
  hidden_size=768,
  intermediate_size=2048,
  num_attention_heads=12,
  num_hidden_layers=12,
  num_key_value_heads=12,
  vocab_size=49152,
  tie_word_embeddings=False,
)


def shapes() -> dict[str, tuple[int, ...]]:
  """Return the shapes of the tensors of a Llama."""
  width, inner = CONFIG['hidden_size'], CONFIG['intermediate_size']
  embeddings = (CONFIG['vocab_size'], width)
  found: dict[str, tuple[int, ...]] = {
    'model.embed_tokens.weight': embeddings,
    'model.norm.weight': (width,),
    'lm_head.weight': embeddings,
  }
  for block in range(CONFIG['num_hidden_layers']):
    at = f'model.layers.{block}'
    for name in 'qkvo':
      found[f'{at}.self_attn.{name}_proj.weight'] = (width, width)
    for name in ('gate', 'up'):
      found[f'{at}.mlp.{name}_proj.weight'] = (inner, width)
    found[f'{at}.mlp.down_proj.weight'] = (width, inner)
    for name in ('input', 'post_attention'):
      found[f'{at}.{name}_layernorm.weight'] = (width,)
  return found


def write(folder: pathlib.Path, dtype: str) -> None:
  """The three checkpoints, each a folder of its own."""
  rng = np.random.default_rng(0)
  trees: list[dict[str, np.ndarray]] = [{}, {}, {}]
  for name, shape in shapes().items():
    anchor = np.float32(0.05) * rng.standard_normal(shape, np.float32)
    shared = rng.standard_normal(shape, np.float32)
    trees[0][name] = anchor
    for tree in trees[1:]:
      own = rng.standard_normal(shape, np.float32)
      tree[name] = anchor + np.float32(0.01) * (shared + own)
  for name, tree in zip(NAMES, trees, strict=True):
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text(json.dumps(CONFIG))
    cast = {
      k: np.ascontiguousarray(v.astype(ml_dtypes.bfloat16))
      if dtype == 'bfloat16'
      else v
      for k, v in tree.items()
    }
    path = folder / name / 'model.safetensors'
    safetensors.numpy.save_file(cast, path, {'format': 'pt'})


def recipe(folder: pathlib.Path, dtype: str, compute: str) -> pathlib.Path:
  """Return the recipe that both programs are given."""
  path = folder / f'recipe_{compute}.yaml'
  path.write_text(
    'merge_method: model_stock\n'
    f'base_model: {folder / NAMES[0]}\n'
    'models:\n'
    + ''.join(f'  - model: {folder / name}\n' for name in NAMES[1:])
    + f'dtype: {compute}\nout_dtype: {dtype}\n'
  )
  return path


# A process begins with the resident memory of the one that starts it: let that
# be a small one.
_LAUNCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
ran = subprocess.run(sys.argv[1:], stdout=2)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([ran.returncode, seconds, 1024 * peak]))
"""


def measure(command: list[str]) -> dict[str, float]:
  """Seconds, and the most memory in bytes, of a process."""
  ran = subprocess.run(
    [sys.executable, '-I', '-S', '-c', _LAUNCH, *command],
    capture_output=True,
    check=True,
  )
  status, seconds, peak = json.loads(ran.stdout)
  if status:
    sys.exit(f'{command} failed:\n{ran.stderr.decode()}')
  return {'seconds': seconds, 'bytes': peak}


def copying(folder: pathlib.Path) -> float:
  """Seconds to read the three once, and to write one."""
  buffer = bytearray(2**23)
  start = time.perf_counter()
  for name in NAMES:
    with (folder / name / 'model.safetensors').open('rb', 0) as file:
      while file.readinto(buffer):
        pass
  size = (folder / NAMES[0] / 'model.safetensors').stat().st_size
  with (folder / 'copy').open('wb', 0) as file:
    for _ in range(0, size, len(buffer)):
      file.write(buffer)
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  (folder / 'copy').unlink()
  return seconds


def differences(
  ours: pathlib.Path, theirs: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
  """In units in the last place, over all tensors."""
  a, b, anchor = (
    {
      name: array
      for file in sorted(path.glob('*.safetensors'))
      for name, array in safetensors.numpy.load_file(file).items()
    }
    for path in (ours, theirs, folder / NAMES[0])
  )
  assert a.keys() == b.keys() == anchor.keys()
  elements, tensors, counts = 0.0, 0.0, np.zeros(4, np.int64)
  floored = []
  for name, left in a.items():
    right = b[name]
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    x, y = left.astype(np.float64), right.astype(np.float64)
    bits = ml_dtypes.finfo(left.dtype).nmant
    apart = np.abs(x - y)
    size = np.maximum(np.abs(x), np.abs(y))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(size, 1e-30))) - bits)
    found = np.max(apart / ulp, initial=0.0)
    elements = max(elements, found)
    tensors = max(tensors, np.max(apart) / np.max(ulp))
    rounded = np.minimum(np.round(apart / ulp), 3).astype(int)
    counts += np.bincount(rounded.ravel(), minlength=4)
    moved = np.linalg.norm(x - anchor[name].astype(np.float64))
    if moved**2 < FLOOR:
      floored.append(name)
  return {
    'ulp of an element': elements,
    "ulp of a tensor's largest": tensors,
    'elements 0, 1, 2, 3+ ulp apart': counts.tolist(),
    'tensors under the floor': floored,
  }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
  """Return a Markdown table of time and memory; the first row is ours."""
  lines = [
    '| | s, median (min) | against ours | peak MB | against ours |',
    '|:--|--:|--:|--:|--:|',
  ]
  first = None
  for name, runs in rows.items():
    seconds = [run['seconds'] for run in runs]
    memory = max(run['bytes'] for run in runs) / 1e6
    first = first or (min(seconds), memory)
    lines.append(
      f'| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}) '
      f'| {min(seconds) / first[0]:.2f} | {memory:.0f} '
      f'| {memory / first[1]:.2f} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Measures, compares and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--mergekit', default='mergekit-yaml')
  parser.add_argument('--folder', help='kept and used again; else temporary')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--dtype', default='float32', choices=('float32', 'bfloat16')
  )
  args = parser.parse_args()
  setting = common.setting(['numpy', 'ml_dtypes', 'safetensors'])
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary)
    if not (folder / NAMES[-1]).exists():
      folder.mkdir(parents=True, exist_ok=True)
      write(folder, args.dtype)
    yaml = recipe(folder, args.dtype, 'float32')
    ours, theirs = folder / 'ours', folder / 'theirs'
    modelstock = str(pathlib.Path(sys.executable).with_name('modelstock'))
    commands = {
      'modelstock merge': [modelstock, 'merge', str(yaml), str(ours)],
      'mergekit-yaml': [args.mergekit, str(yaml), str(theirs)],
      'mergekit-yaml --lazy-unpickle --low-cpu-memory': [
        args.mergekit,
        str(yaml),
        str(theirs),
        '--lazy-unpickle',
        '--low-cpu-memory',
      ],
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    limits = []

    def clear() -> None:
      for path in (ours, theirs):
        shutil.rmtree(path, ignore_errors=True)

    for _ in range(args.repeats):
      for name, command in commands.items():
        clear()
        rows[name].append(measure(command))
      limits.append(copying(folder))
    apart = {}
    for compute in ('float32', 'float64'):
      clear()
      yaml = recipe(folder, args.dtype, compute)
      measure([modelstock, 'merge', str(yaml), str(ours)])
      measure([args.mergekit, str(yaml), str(theirs)])
      apart[f'mergekit in {compute}'] = differences(ours, theirs, folder)
    clear()
  print(f'{args.dtype}; limit (copying): {min(limits):.2f} s')
  print(table(rows))
  print(json.dumps(apart, indent=1))
  print(common.describe(setting))


if __name__ == '__main__':
  main()
