"""Checkpoints in buckets, by servers that speak as S3 and as Google's do.

TensorStore is real, the buckets are folders. tests/oracles/test_moto.py reads
from moto's S3.
"""

import http.server
import json
import threading
import time
from urllib import parse

from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from modelstock_jax import files
from modelstock_jax.formats import detect
from modelstock_jax.formats import remote


class _Handler(http.server.BaseHTTPRequestHandler):
  """Lists and reads objects: files of a folder, in a bucket of any name."""

  def do_GET(self):
    url = parse.urlsplit(self.path)
    query = dict(parse.parse_qsl(url.query))
    time.sleep(self.server.delay)
    google = url.path.startswith('/storage/v1/b/')
    parts = url.path.removeprefix('/storage/v1/b/').strip('/').split('/', 1)
    if google and parts[1] == 'o':
      self._list_google(query['startOffset'], query['endOffset'])
    elif 'list-type' in query:
      self._list_amazon(query.get('prefix', ''))
    else:
      name = parts[1].removeprefix('o/') if google else parts[1]
      self._read(self.server.folder / parse.unquote(name))

  def _names(self):
    paths = (p for p in self.server.folder.rglob('*') if p.is_file())
    names = [str(path.relative_to(self.server.folder)) for path in paths]
    return sorted(names + self.server.more)

  def _list_google(self, start, end):
    items = [{'name': n} for n in self._names() if start <= n < end]
    self._answer(200, json.dumps({'items': items}).encode())

  def _list_amazon(self, prefix):
    keys = [name for name in self._names() if name.startswith(prefix)]
    contents = ''.join(f'<Contents><Key>{key}</Key></Contents>' for key in keys)
    self._answer(
      200,
      f'<ListBucketResult><KeyCount>{len(keys)}</KeyCount><IsTruncated>false'
      f'</IsTruncated>{contents}</ListBucketResult>'.encode(),
    )

  def _read(self, path):
    if not path.is_file():
      self._answer(404, b'')
      return
    data = path.read_bytes()
    ranges = self.headers.get('Range')
    if not ranges:
      self._answer(200, data)
      return
    first, last = ranges.removeprefix('bytes=').split('-')
    first, last = int(first), min(int(last or len(data)), len(data) - 1)
    if first >= len(data):
      self._answer(416, b'')
      return
    where = f'bytes {first}-{last}/{len(data)}'
    self._answer(206, data[first : last + 1], ('Content-Range', where))

  def _answer(self, status, data, *headers):
    self.send_response(status)
    for name, value in (
      *headers,
      *(('ETag', '"1"'), ('x-goog-generation', '1')),
      ('Content-Length', str(len(data))),
    ):
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture(scope='module')
def _server(tmp_path_factory):
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  server.folder = tmp_path_factory.mktemp('bucket')
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  with pytest.MonkeyPatch.context() as patch:
    address = f'http://127.0.0.1:{server.server_port}'
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    patch.setenv('AWS_ENDPOINT_URL', address)
    patch.setenv('AWS_ACCESS_KEY_ID', 'key')
    patch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    yield server
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture(scope='module')
def checkpoints(_server):
  """Three of each form in the bucket, by the form."""
  forms = {'orbax': [], 'steps': [], 'file': [], 'folder': []}
  for seed in range(3):
    rng = np.random.default_rng(seed)
    arrays = {
      'kernel': rng.normal(size=(40, 8)).astype(np.float32),
      'scale': rng.normal(size=8).astype(np.float32),
    }
    paths = {form: _server.folder / f'{form}_{seed}' for form in forms}
    paths['file'] = paths['file'].with_suffix('.safetensors')
    tree = {'params': {name: jnp.asarray(x) for name, x in arrays.items()}}
    with ocp.StandardCheckpointer() as writer:
      writer.save(paths['orbax'], tree)
    with ocp.CheckpointManager(paths['steps']) as manager:
      manager.save(7, args=ocp.args.StandardSave(tree))
    paths['folder'].mkdir()
    (paths['folder'] / 'config.json').write_text('{"layers": 1}')
    safetensors.numpy.save_file(arrays, paths['file'])
    path = paths['folder'] / 'model.safetensors'
    safetensors.numpy.save_file(arrays, path)
    for form, path in paths.items():
      forms[form].append(path)
  return forms


@pytest.fixture
def server(_server):
  _server.delay, _server.more = 0, []
  return _server


def _bytes(path):
  paths = [path] if path.is_file() else sorted(path.rglob('*'))
  return {
    file.name: file.read_bytes()
    for file in paths
    if file.is_file() and 'model_stock' not in file.name
  }


@pytest.mark.parametrize('scheme', ['s3', 'gs'])
@pytest.mark.parametrize('form', ['orbax', 'steps', 'file', 'folder'])
def test_the_bytes_of_local_files(server, checkpoints, tmp_path, form, scheme):
  server.more = [f'{form}_0/', 'other_0/x.json']  # as tools make folders
  suffix = '.safetensors' if form == 'file' else ''
  out = []
  for name in ('local', 'remote'):
    paths = list(map(str, checkpoints[form]))
    if name == 'remote':
      paths = [path.split('/')[-1] for path in paths]
      paths = [f'{scheme}://checkpoints/{path}' for path in paths]
    anchor, *models = paths
    (tmp_path / name).mkdir()
    out.append(tmp_path / name / f'out{suffix}')
    files.merge(anchor, models, out[-1])
  assert _bytes(out[0]) == _bytes(out[1])
  assert f'{scheme}://checkpoints/{form}_0' in next(
    path.read_text() for path in out[1].parent.rglob('*model_stock.json')
  )


def test_what_is_not_there(server, checkpoints, tmp_path):
  for name in ('nothing', 'model.pt'):
    with pytest.raises(
      FileNotFoundError, match='no such folder, nor a file of'
    ):
      detect.read(f's3://checkpoints/{name}')
  with pytest.raises(FileNotFoundError, match='there is no such file'):
    detect.read('s3://checkpoints/nothing.safetensors')
  (server.folder / 'torch').mkdir(exist_ok=True)
  (server.folder / 'torch' / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='only Orbax and safetensors are read'):
    detect.read('s3://checkpoints/torch')
  anchor, *models = checkpoints['file']
  with pytest.raises(
    ValueError, match='s3://checkpoints/out: name an output h'
  ):
    files.merge(anchor, models, 's3://checkpoints/out')


def test_a_name_that_leads_outside(server, checkpoints):
  server.more = ['orbax_0/../../x.json']
  with pytest.raises(ValueError, match=r"'/\.\./\.\./x\.json' leads outside"):
    detect.read('s3://checkpoints/orbax_0')


@pytest.mark.parametrize('size', [4, 50, -40])
def test_a_file_that_is_not_complete(server, checkpoints, tmp_path, size):
  path = server.folder / 'short.safetensors'
  path.write_bytes(checkpoints['file'][1].read_bytes()[:size])
  anchor, model = (path.name for path in checkpoints['file'][:2])
  models = [f's3://checkpoints/{name}' for name in (model, path.name)]
  with pytest.raises(ValueError, match='short'):
    files.merge(f's3://checkpoints/{anchor}', models, tmp_path / 'out')
  assert not list(tmp_path.glob('*out*'))


@pytest.mark.parametrize('form', ['orbax', 'file'])
def test_no_answer(server, checkpoints, monkeypatch, form):
  monkeypatch.setattr(remote, 'TIME_LIMIT', 0.2)
  server.delay = 1.0
  with pytest.raises(
    ValueError, match=r'cannot be read: no answer within 0\.2'
  ):
    detect.read(f's3://checkpoints/{checkpoints[form][0].name}')
