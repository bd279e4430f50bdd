"""The program, as a process of its own, on one device and on several."""

import functools
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def run(workdir, devices, *flags):
  path = [os.environ.get('MODELSTOCK_SCENIC'), os.environ.get('PYTHONPATH')]
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'modelstock_jax.scenic.main',
      f'--config={CONFIGS / "scenic_tiny_vit_digits.py"}',
      f'--workdir={workdir}',
      *flags,
    ],
    env={
      **os.environ,
      'JAX_NUM_CPU_DEVICES': str(devices),
      'PYTHONPATH': os.pathsep.join(filter(None, path)),
    },
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize('devices', [1, 2])
def test_the_tiny_config(scenic, stock_evaluation, tmp_path, devices):
  workdir = tmp_path / 'run'
  done = run(workdir, devices)
  assert done.returncode == 0, done.stderr[-3000:]
  config = _config()
  dataset = scenic.datasets.get_dataset(
    batch_size=64,
    eval_batch_size=64,
    num_shards=8,
    shuffle_seed=0,
    dataset_configs=config.dataset_configs,
  )
  model = scenic.models.ViTClassificationModel(config, dataset.meta_data)
  batches = -(-dataset.meta_data['num_eval_examples'] // 64)
  summary, step = stock_evaluation(workdir, model, config, dataset, batches)
  assert step == 4 * (dataset.meta_data['num_train_examples'] // 64)
  assert summary['accuracy'] > 0.15  # of ten classes


def test_what_is_wrong_is_said(scenic, tmp_path):
  done = run(tmp_path, 1, '--config.model_stock.merge_every=never')
  assert done.returncode != 0
  assert "merge_every: must be 'epoch', 'end' or a number" in done.stderr


def test_configs_are_complete(scenic):
  """They hold nothing that the trainer or the dataset does not know."""
  for path in CONFIGS.glob('scenic_*.py'):
    config = _config(path.stem)
    if config.model_stock.anchor.head == 'zero_shot':  # what its text asks for
      config.model_stock.anchor.path = 'clip'
      config.model_stock.anchor.prompts = 'prompts.json'
    scenic.options.read(config)
    known = scenic.datasets.DatasetConfigs.model_fields
    assert set(config.dataset_configs) <= set(known), path


def test_models_by_name(scenic):
  importlib.import_module('modelstock_jax.scenic.main')  # which registers ours
  models = importlib.import_module('scenic.model_lib.models')
  for name in ('CLIP', 'ViT'):
    ours = getattr(scenic.models, f'{name}ClassificationModel')
    assert models.get_model_cls(f'{name.lower()}_classification') is ours


@functools.cache
def _config(name='scenic_tiny_vit_digits'):
  module = importlib.import_module(f'modelstock_jax.configs.{name}')
  return module.get_config()
