"""Checkpoints in a bucket of S3, as moto serves it; see test_remote.py too."""

import re

import boto3
from jax import numpy as jnp
from moto import server
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from modelstock_jax import files

pytestmark = pytest.mark.oracle
BUCKET = 'checkpoints'


@pytest.fixture(scope='module')
def client():
  """A client of a server, whose address and keys are in the environment."""
  moto = server.ThreadedMotoServer('127.0.0.1', port=0, verbose=False)
  moto.start()
  with pytest.MonkeyPatch.context() as patch:
    host, port = moto.get_host_and_port()
    patch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
    patch.setenv('AWS_ACCESS_KEY_ID', 'key')
    patch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    client = boto3.client('s3', region_name='us-east-1')
    client.create_bucket(Bucket=BUCKET)
    yield client
  moto.stop()


@pytest.mark.parametrize('form', ['orbax', 'folder'])
def test_the_bytes_of_local_files(client, tmp_path, form):
  local = []
  for seed in range(3):
    # The kernel takes several windows.
    kernel = np.random.default_rng(seed).normal(size=(1200, 1000))
    arrays = {'kernel': np.float32(kernel), 'scale': np.ones(8, np.float32)}
    path = tmp_path / f'{form}_{seed}'
    if form == 'orbax':
      with ocp.StandardCheckpointer() as writer:
        tree = {name: jnp.asarray(array) for name, array in arrays.items()}
        writer.save(path, {'params': tree})
    else:
      path.mkdir()
      (path / 'config.json').write_text('{}')
      safetensors.numpy.save_file(arrays, path / 'model.safetensors')
    for file in path.rglob('*'):
      if file.is_file():
        key = str(file.relative_to(tmp_path))
        client.upload_file(str(file), BUCKET, key)
    local.append(str(path))
  remote = [f's3://{BUCKET}/{form}_{seed}' for seed in range(3)]
  outputs = []
  for anchor, *models in (local, remote):
    outputs.append(tmp_path / f'out_{len(outputs)}')
    files.merge(anchor, models, outputs[-1])
  left, right = (
    {
      str(path.relative_to(output)): path.read_bytes()
      for path in output.rglob('*')
      # Nor what names the inputs.
      if path.is_file() and not re.match('model_stock|README', path.name)
    }
    for output in outputs
  )
  assert left == right
