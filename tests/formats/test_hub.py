"""Uploads to a small hub of our own, through the real huggingface_hub."""

import base64
import http.server
import json
import re
import threading

import pytest

from modelstock_jax.formats import hub


class _Hub(http.server.BaseHTTPRequestHandler):
  """Answers what an upload asks; all files go with the commit."""

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    server = self.server
    server.seen.append((self.path, self.headers.get('authorization')))
    name = 'api/models/me/stock'
    address = f'http://localhost:{server.server_port}/me/stock'
    if server.refuses:
      answer, status = {'error': 'Not allowed'}, 403
    elif self.path == '/api/repos/create':
      server.created.append(json.loads(body))
      answer, status = {'url': address}, 200
    elif self.path == f'/{name}/preupload/main':
      files = json.loads(body)['files']
      modes = [
        {'path': x['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
        for x in files
      ]
      answer, status = {'files': modes}, 200
    elif self.path == '/api/validate-yaml':
      answer, status = {'errors': [], 'warnings': []}, 200
    elif self.path == f'/{name}/commit/main':
      server.commits.append([json.loads(x) for x in body.splitlines()])
      answer = {'commitUrl': f'{address}/commit/1', 'commitOid': '1'}
      status = 200
    else:
      answer, status = {'error': 'Not found'}, 404
    self._send(answer, status)

  def do_GET(self):
    self._send({'error': 'Not found'}, 404)

  def _send(self, answer, status):
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  with http.server.ThreadingHTTPServer(('localhost', 0), _Hub) as server:
    server.seen, server.created, server.commits = [], [], []
    server.refuses = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f'http://localhost:{server.server_port}'
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', address)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setenv('NO_PROXY', 'localhost')
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'README.md').write_text('---\nlicense: mit\n---\n')
  (folder / 'model.safetensors').write_bytes(bytes(range(9)))
  return folder


def test_a_folder_is_uploaded_with_all_its_files(server, folder):
  url = hub.push(folder, 'me/stock')
  assert url == f'http://localhost:{server.server_port}/me/stock'
  [created] = server.created
  assert (created['name'], created['organization']) == ('stock', 'me')
  [[header, *files]] = server.commits
  assert header['value']['summary'] == 'Upload with modelstock_jax'
  contents = {
    x['value']['path']: base64.b64decode(x['value']['content']) for x in files
  }
  assert contents == {x.name: x.read_bytes() for x in folder.iterdir()}
  assert all(token == 'Bearer hf_secret' for _, token in server.seen)


def test_a_refusal_is_one_line(server, folder):
  server.refuses = True
  with pytest.raises(OSError, match=r'^--push=me/stock: ') as error:
    hub.push(folder, 'me/stock')
  assert re.search(r'403.* Log in with `hf auth login`', str(error.value))
  assert '\n' not in str(error.value)
  assert 'hf_secret' not in str(error.value)
  assert not server.commits


def test_ids_are_told_from_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs' / 'mine').mkdir(parents=True)
  assert hub.model_id('openai/clip-vit-base-patch32') is not None
  for path in ('runs/mine', 'runs/clip.pt', 'mini_clip', '/a/b', 'a/b/c'):
    assert hub.model_id(path) is None, path
