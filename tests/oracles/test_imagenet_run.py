"""A full ViT-B/32, of random weights, trained and evaluated on all there is."""

import dataclasses
import json

import jax
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import main
from modelstock_jax.report import results

NAMES = [
  name for name in data.BENCHMARKS if name not in ('digits', *data.SHIFTS)
]


@pytest.mark.oracle
def test_vit_b32(imagenet_run, imagenet, tmp_path, monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  # The text tower describes 1000 classes before the first step: one block of
  # it does, which has no part in what follows.
  full = clip.SIZES['ViT-B/32']
  sizes = dataclasses.replace(
    full, text=dataclasses.replace(full.text, depth=1)
  )
  config = imagenet_run(tmp_path, sizes)
  workdir = tmp_path / 'workdir'
  flags = [f'--config={config}', f'--workdir={workdir}']
  assert main.main(['train', *flags]) == 0
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  steps = [
    record for record in map(json.loads, lines) if record['kind'] == 'train'
  ]
  assert [record['step'] for record in steps] == [1, 2]

  flags = [
    f'--checkpoint={workdir}',
    f'--benchmarks={",".join(NAMES)}',
    '--batch_size=16',
  ]
  assert main.main(['evaluate', *flags]) == 0
  rows = results.load(workdir / 'results.json')
  assert [row.benchmark for row in rows] == NAMES
  assert {row.method for row in rows} == {'model_stock_epoch_reset'}
  assert sum(row.n for row in rows) == 807
