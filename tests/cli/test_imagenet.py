"""From CLIP's weights to the table of results, on a tiny ImageNet."""

import json

import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import main
from modelstock_jax.report import results

pytestmark = pytest.mark.usefixtures('two_devices')

# ViT-B/32 made narrow and flat: the same images, patches and tokens.
THIN = clip.CLIPConfig(
  embed_dim=16,
  vision=clip.VisionConfig(
    image_size=224, patch_size=32, width=64, depth=2, heads=1
  ),
  text=clip.TextConfig(
    context_length=77, vocab_size=49408, width=16, depth=1, heads=1
  ),
)
# Images that count, by what make_imagenet.py puts into each data set.
EXAMPLES = {
  'imagenet': 11,
  'imagenet_v2': 3,
  'imagenet_r': 200,
  'imagenet_sketch': 3,
  'objectnet_uncropped': 114,
  'imagenet_a': 200,
  'objectnet': 114,
  'imagenet_v2_threshold': 2,
  'imagenet_v2_top': 1,
  'imagenet_real': 9,
  'imagenet_c': 150,
}


@pytest.fixture(scope='module')
def workdir(imagenet_run, tmp_path_factory, two_devices):
  """A run of `modelstock train`: one epoch of two steps."""
  folder = tmp_path_factory.mktemp('run')
  config = imagenet_run(folder, THIN)
  flags = [f'--config={config}', f'--workdir={folder}/workdir']
  assert main.main(['train', *flags]) == 0
  return folder / 'workdir'


def _lines(workdir, kind):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [record for record in records if record['kind'] == kind]


def test_training_runs_to_its_end(workdir):
  steps = _lines(workdir, 'train')
  assert [line['step'] for line in steps] == [1, 2]
  # Zero-shot logits of random weights: at first, nothing is known.
  assert all(len(line['loss']) == 2 for line in steps)
  assert steps[0]['loss'][0] != steps[0]['loss'][1]
  (merge,) = _lines(workdir, 'merge')
  assert 0 < merge['mean_ratio'] < 1
  (validation,) = _lines(workdir, 'validation')
  assert validation['n'] == 11


def test_all_benchmarks_are_evaluated(workdir, imagenet, tmp_path, capsys):
  benchmarks = f'--benchmarks={",".join(EXAMPLES)}'
  assert main.main(['evaluate', f'--workdir={workdir}', benchmarks]) == 0
  head, *_ = capsys.readouterr().out.splitlines()
  names = ['imagenet', 'mean', 'shift', *data.IMAGENET_SHIFTS]
  assert head.split()[1:9] == names
  rows = results.load(workdir / 'results.json')
  assert results.methods(rows) == [
    'zero_shot',
    'fine_tuned',
    'fine_tuned_2',
    'uniform_soup',
    'wise_ft_0.5',
    'model_stock_epoch_reset',
  ]
  for method in results.methods(rows):
    mine = {row.benchmark: row for row in rows if row.method == method}
    assert {name: row.n for name, row in mine.items()} == EXAMPLES
  assert results.benchmarks(rows) == (['imagenet'], list(data.IMAGENET_SHIFTS))

  # The same from the checkpoint alone.
  output = tmp_path / 'again.json'
  flags = [f'--data_dir={imagenet}', benchmarks, '--batch_size=30']
  checkpoint = f'--checkpoint={workdir}'
  assert main.main(['evaluate', checkpoint, f'--output={output}', *flags]) == 0
  again = results.load(output)
  assert again == [
    row for row in rows if row.method == 'model_stock_epoch_reset'
  ]
