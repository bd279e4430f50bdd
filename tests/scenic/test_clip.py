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
def found(scenic):
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


def test_stock_eval_step_gives_the_same_metrics(found):
  print(f'peak memory {found["peak_gb"]:.1f} GB; {found["ours"]}')
  assert found['devices'] == 2
  assert found['visual'] == 87_849_216  # of the real size
  assert found['step'] == 4
  assert found['theirs'] == found['ours']
  assert found['ours']['loss'] > 0


def test_query_key_and_value_are_one_layer(found):
  assert len(found['merges']) == 2
  merge = found['merges'][-1]
  start = 'cosine/visual/transformer/resblocks.0/attn/'
  cosines = [
    merge[f'{start}{part}/kernel'] for part in ('query', 'key', 'value')
  ]
  assert cosines[0] == cosines[1] == cosines[2]
  assert cosines[0] != merge[f'{start}out/kernel']
