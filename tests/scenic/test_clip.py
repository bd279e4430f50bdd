"""CLIP ViT-B/32 through the trainer: trained, merged, evaluated by Scenic."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.oracle

# Apart: on the eight devices of the tests its weights would lie there 8 times.
PROCESS = pathlib.Path(__file__).with_name('clip_process.py')


@pytest.fixture(scope='module')
def actual(scenic):
  del scenic  # is there
  # Gone at once: it is 1.4 GB.
  with tempfile.TemporaryDirectory() as folder:
    return process(folder)


def process(folder):
  path = [os.environ.get('MODELSTOCK_SCENIC'), os.environ.get('PYTHONPATH')]
  done = subprocess.run(
    [sys.executable, str(PROCESS), folder],
    env={
      **os.environ,
      'JAX_NUM_CPU_DEVICES': '2',
      'PYTHONPATH': os.pathsep.join(filter(None, path)),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_stock_eval_step_gives_the_same_metrics(actual):
  print(f'peak memory {actual["peak_gb"]:.1f} GB; {actual["ours"]}')
  assert actual['devices'] == 2
  assert actual['visual'] == 87_849_216  # of the real size
  assert actual['step'] == 4
  assert actual['theirs'] == actual['ours']
  assert actual['ours']['loss'] > 0


def test_query_key_and_value_are_one_layer(actual):
  assert len(actual['merges']) == 2
  merge = actual['merges'][-1]
  start = 'cosine/visual/transformer/resblocks.0/attn/'
  cosines = [
    merge[f'{start}{part}/kernel'] for part in ('query', 'key', 'value')
  ]
  assert cosines[0] == cosines[1] == cosines[2]
  assert cosines[0] != merge[f'{start}out/kernel']
