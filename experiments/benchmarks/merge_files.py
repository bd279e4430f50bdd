r"""`modelstock merge` against `mergekit-yaml`, on the same files.

    python experiments/benchmarks/merge_files.py --mergekit=mergekit-yaml
      [--repeats=3] [--dtype=float32]

Three checkpoints of a language model of 160 M parameters (mergekit 0.1.5 does
not take CLIP), 641 MB each in float32, random: an anchor and two models whose
displacements are near 0.01 in size, with cosines near 0.5. Both programs merge
them from the same recipe, as processes of their own that take turns; what they
read is in the page cache. The time is that of the process, imports and all; the
memory is the most it ever had resident, mapped pages of files included.

The limit is copying: one read of the three checkpoints, and one write of the
result, with a buffer of 8 MB.

tests/oracles/test_mergekit.py compares the results.

mergekit asks for forty packages. It may be installed anywhere:
`--mergekit=/path/to/its/bin/mergekit-yaml`.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import common

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
SHAPES = {
  'model.embed_tokens.weight': (TOKENS, WIDTH),
  'model.norm.weight': (WIDTH,),
  'lm_head.weight': (TOKENS, WIDTH),
  **{
    f'model.layers.{number}.{name}.weight': shape
    for number in range(BLOCKS)
    for name, shape in BLOCK.items()
  },
}


def write(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Write the checkpoints, each a folder of its own; return the setting."""
  np = importlib.import_module('numpy')
  safetensors = importlib.import_module('safetensors.numpy')
  importlib.import_module('ml_dtypes')  # numpy then knows bfloat16
  rng = np.random.default_rng(0)
  trees: list[dict[str, Any]] = [{}, {}, {}]
  for name, shape in SHAPES.items():
    anchor, shared, one, two = rng.standard_normal((4, *shape), np.float32)
    anchor *= np.float32(0.05)
    for tree, moved in zip(trees, (0, shared + one, shared + two), strict=True):
      tree[name] = (anchor + np.float32(0.01) * moved).astype(dtype)
  for name, tree in zip(NAMES, trees, strict=True):
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text(json.dumps(CONFIG))
    path = folder / name / 'model.safetensors'
    safetensors.save_file(tree, path, {'format': 'pt'})
  return common.setting(['numpy', 'ml_dtypes', 'safetensors'])


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
  modelstock = str(pathlib.Path(sys.executable).with_name('modelstock'))
  mergekit = [args.mergekit, str(path), str(theirs)]
  lazy = ['--lazy-unpickle', '--low-cpu-memory']
  # dd reads and writes; cp and cat may let the file system share blocks.
  copying = ' && '.join(
    f'dd bs=8M if={name}/model.safetensors of={target}'
    for name, target in zip(
      NAMES, ('copy conv=fsync', '/dev/null', '/dev/null'), strict=True
    )
  )
  return {
    'modelstock merge': [modelstock, 'merge', str(path), str(ours)],
    'mergekit-yaml': mergekit,
    f'mergekit-yaml {" ".join(lazy)}': [*mergekit, *lazy],
    'limit: copying': ['sh', '-c', f'cd {folder} && {copying}'],
  }


def main() -> None:
  """Measure, compare and print the table."""
  parser = common.parser(__doc__, repeats=3)
  parser.add_argument('--mergekit', default='mergekit-yaml')
  parser.add_argument(
    '--dtype', default='float32', choices=('float32', 'bfloat16')
  )
  args = parser.parse_args()
  runs: dict[str, list[tuple[float, int]]] = {}
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    setting = common.alone(write, folder, args.dtype)
    for _ in range(args.repeats):
      for name, command in commands(folder, args).items():
        cost = common.alone(common.run_command, command)
        runs.setdefault(name, []).append(cost)
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
