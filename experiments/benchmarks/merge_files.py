r"""`modelstock merge` against `mergekit-yaml`, on the same files.

    python experiments/benchmarks/merge_files.py --mergekit=mergekit-yaml
      [--repeats=3] [--dtype=float32] [--blocks=12] [--cold]

Three checkpoints of a language model of 160 M parameters (mergekit 0.1.5 does
not take CLIP), 641 MB each in float32, random: an anchor and two models whose
displacements are near 0.01 in size, with cosines near 0.5. Both programs merge
them from the same recipe, as processes of their own that take turns; what they
read is in the page cache, or with `--cold` on the disk alone. The time is that
of the process, imports and all; the memory is the most it ever had resident,
mapped pages of files included.

The limit is copying: one read of the three checkpoints, and one write of the
result, with a buffer of 8 MB. Another row is `cp` of the three, which
writes all of it, but does not wait for the disk.

tests/oracles/test_mergekit.py compares the results.

More `--blocks` make larger models, of which every twelfth block has the same
values: 460 in bfloat16 make 20 GB in all.

mergekit asks for forty packages. It may be installed anywhere:
`--mergekit=/path/to/its/bin/mergekit-yaml`. Without the flag it is left out.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import common

from modelstock_jax.formats import safetensors

NAMES = ('anchor', 'one', 'two')
WIDTH, INNER, BLOCKS, TOKENS = 768, 2048, 12, 49152
CONFIG: dict[str, Any] = dict(
  architectures=['LlamaForCausalLM'],
  model_type='llama',
  hidden_size=WIDTH,
  intermediate_size=INNER,
  num_attention_heads=12,
  num_hidden_layers=BLOCKS,
  num_key_value_heads=12,
  vocab_size=TOKENS,
  tie_word_embeddings=False,
)
BLOCK = {
  **{f'self_attn.{name}_proj': (WIDTH, WIDTH) for name in 'qkvo'},
  'mlp.gate_proj': (INNER, WIDTH),
  'mlp.up_proj': (INNER, WIDTH),
  'mlp.down_proj': (WIDTH, INNER),
  'input_layernorm': (WIDTH,),
  'post_attention_layernorm': (WIDTH,),
}
ENDS = {
  'model.embed_tokens.weight': (TOKENS, WIDTH),
  'model.norm.weight': (WIDTH,),
  'lm_head.weight': (TOKENS, WIDTH),
}


def write(folder: pathlib.Path, dtype: str, blocks: int) -> dict[str, Any]:
  """Write the checkpoints, each a folder of its own; return the setting."""
  np = importlib.import_module('numpy')
  importlib.import_module('ml_dtypes')  # numpy then knows bfloat16
  rng = np.random.default_rng(0)
  trees: list[dict[str, Any]] = [{}, {}, {}]

  def draw(name: str, shape: tuple[int, ...]) -> None:
    anchor, shared, one, two = rng.standard_normal((4, *shape), np.float32)
    anchor *= np.float32(0.05)
    for tree, moved in zip(trees, (0, shared + one, shared + two), strict=True):
      tree[name] = (anchor + np.float32(0.01) * moved).astype(dtype)

  for name, shape in ENDS.items():
    draw(name, shape)
  for number in range(blocks):
    for part, shape in BLOCK.items():
      name = f'model.layers.{number}.{part}.weight'
      if number < BLOCKS:
        draw(name, shape)
        continue
      for tree in trees:
        tree[name] = tree[f'model.layers.{number % BLOCKS}.{part}.weight']
  for name, tree in zip(NAMES, trees, strict=True):
    (folder / name).mkdir()
    config = {**CONFIG, 'num_hidden_layers': blocks}
    (folder / name / 'config.json').write_text(json.dumps(config))
    path = folder / name / 'model.safetensors'
    safetensors.write(path, tree, {'format': 'pt'})
  return common.setting(['numpy', 'ml_dtypes', 'safetensors'])


def forget(folder: pathlib.Path) -> None:
  """Take the checkpoints out of the page cache."""
  for name in NAMES:
    with (folder / name / 'model.safetensors').open('rb') as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def commands(
  folder: pathlib.Path, args: argparse.Namespace
) -> dict[str, list[str]]:
  """Write the recipe that both programs are given; return what is run."""
  anchor, *models = (str(folder / name) for name in NAMES)
  recipe = {
    'merge_method': 'model_stock',
    'base_model': anchor,
    'models': [{'model': model} for model in models],
    'dtype': 'float32',
    'out_dtype': args.dtype,
  }
  path = folder / 'recipe.yaml'
  path.write_text(json.dumps(recipe))  # which is YAML
  ours, theirs = folder / 'ours', folder / 'theirs'
  for output in (ours, theirs):
    shutil.rmtree(output, ignore_errors=True)
  (folder / 'copy').unlink(missing_ok=True)
  shutil.rmtree(folder / 'all', ignore_errors=True)
  modelstock = str(pathlib.Path(sys.executable).with_name('modelstock'))
  mergekit = [args.mergekit or '', str(path), str(theirs)]
  lazy = ['--lazy-unpickle', '--low-cpu-memory']
  # dd reads and writes; cp and cat may let the file system share blocks.
  copying = ' && '.join(
    f'dd bs=8M if={name}/model.safetensors of={target}'
    for name, target in zip(
      NAMES, ('copy conv=fsync', '/dev/null', '/dev/null'), strict=True
    )
  )
  cp = f'mkdir all && cp -r --reflink=never {" ".join(NAMES)} all'
  programs = {'modelstock merge': [modelstock, 'merge', str(path), str(ours)]}
  if args.mergekit:
    programs['mergekit-yaml'] = mergekit
    programs[f'mergekit-yaml {" ".join(lazy)}'] = [*mergekit, *lazy]
  return {
    **programs,
    'limit: copying': ['sh', '-c', f'cd {folder} && {copying}'],
    'cp of all that is read': ['sh', '-c', f'cd {folder} && {cp}'],
  }


def main() -> None:
  """Measure, compare and print the table."""
  parser = common.parser(__doc__, repeats=3)
  parser.add_argument('--mergekit', help='program; left out if not given')
  parser.add_argument('--blocks', type=int, default=BLOCKS)
  parser.add_argument(
    '--cold', action='store_true', help='read from the disk, not its cache'
  )
  parser.add_argument(
    '--dtype', default='float32', choices=('float32', 'bfloat16')
  )
  args = parser.parse_args()
  runs: dict[str, list[tuple[float, int]]] = {}
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    setting = common.alone(write, folder, args.dtype, args.blocks)
    for _ in range(args.repeats):
      for name, command in commands(folder, args).items():
        if args.cold:
          forget(folder)
        cost = common.alone(common.run_command, command)
        runs.setdefault(name, []).append(cost)
        print(f'{name}: {cost[0]:.1f} s', file=sys.stderr)
  limit = min(seconds for seconds, _ in runs['limit: copying'])
  rows = []
  for name, measured in runs.items():
    seconds, peaks = zip(*measured, strict=True)
    rows.append(
      {
        'program': name,
        's, min': min(seconds),
        'x limit': min(seconds) / limit,
        'peak MB': max(peaks) / 1e6,
      }
    )
  common.finish(args, setting, rows)


if __name__ == '__main__':
  main()
