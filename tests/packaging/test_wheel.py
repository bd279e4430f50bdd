"""Check what `make test-wheel` has built: its files, and runs where installed.

The wheel with nothing but its own requirements, the sdist with [train]; both
in new environments, away from the checkout.
"""

import email
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import time
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DIST = ROOT / 'dist'
MB = 10**6
# What the sdist holds beside the package; MANIFEST.in says why no tests.
ABOUT = {
  'CHANGELOG.md',
  'CITATION.cff',
  'LICENSE',
  'MANIFEST.in',
  'PKG-INFO',
  'README.md',
  'pyproject.toml',
  'setup.cfg',
  'setup.py',
}
# jax, numpy, and what jax asks for.
CORE = {'jax', 'jaxlib', 'ml-dtypes', 'numpy', 'opt-einsum', 'scipy'}


def _only(pattern):
  (path,) = DIST.glob(pattern)
  return path


def _package():
  """The files of the package as git has them, under the names installed."""
  listed = subprocess.run(
    # Not yet added ones, too, but none that are ignored.
    [
      'git',
      'ls-files',
      '-co',
      '--exclude-standard',
      'modelstock_jax',
      'configs',
    ],
    capture_output=True,
    check=True,
    cwd=ROOT,
    text=True,
  ).stdout.splitlines()
  return {name for name in listed if (ROOT / name).exists()}


def _run(command, folder, **options):
  """Runs a command in a folder, with no path that leads to the checkout.

  Programs are compiled as in all tests: see tests/conftest.py.
  """
  env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
  return subprocess.run(
    list(map(str, command)),
    cwd=folder,
    env={
      **env,
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      **options,
    },
    capture_output=True,
    check=False,
    text=True,
  )


def _install(folder, *requirements):
  """A new environment with the requirements: its folder of programs."""
  venv.create(folder, symlinks=True)
  programs = folder / 'bin'
  pip = [sys.executable, '-m', 'pip', '--python', programs / 'python']
  known = ROOT / 'constraints.txt'
  done = _run(
    [*pip, 'install', '--no-compile', *requirements, '-c', known], folder
  )
  assert done.returncode == 0, done.stderr
  done = _run([*pip, 'check'], folder)
  assert done.returncode == 0, done.stdout
  return programs


@pytest.fixture(scope='module')
def core(tmp_path_factory):
  """An environment with the wheel, without any extra."""
  return _install(tmp_path_factory.mktemp('core'), _only('*.whl'))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """An environment with the wheel and what merging of files needs."""
  wheel = _only('*.whl')
  return _install(tmp_path_factory.mktemp('files'), f'{wheel}[files]')


@pytest.fixture(scope='module')
def train(tmp_path_factory):
  """An environment with the sdist and what training needs."""
  sdist = _only('*.tar.gz')
  return _install(tmp_path_factory.mktemp('train'), f'{sdist}[train]')


def test_the_wheel_holds_the_package_and_nothing_else():
  with zipfile.ZipFile(_only('*.whl')) as wheel:
    names = set(wheel.namelist())
  notes = {name for name in names if '.dist-info/' in name}
  expected = {
    name if name.startswith('modelstock_jax') else f'modelstock_jax/{name}'
    for name in _package()
  }
  assert names - notes == expected
  assert 'modelstock_jax/py.typed' in names
  assert 'modelstock_jax/configs/digits.py' in names
  assert {name.partition('.dist-info/')[2] for name in notes} == {
    'METADATA',
    'RECORD',
    'WHEEL',
    'entry_points.txt',
    'licenses/LICENSE',
    'top_level.txt',
  }
  assert _only('*.whl').stat().st_size < 3 * MB


def test_the_sdist_holds_what_the_wheel_is_built_from():
  with tarfile.open(_only('*.tar.gz')) as sdist:
    files = [m.name.partition('/')[2] for m in sdist if m.isfile()]
  files = {name for name in files if '.egg-info/' not in name}
  assert files == _package() | ABOUT
  assert _only('*.tar.gz').stat().st_size < 3 * MB


def test_metadata():
  with zipfile.ZipFile(_only('*.whl')) as wheel:
    (name,) = [n for n in wheel.namelist() if n.endswith('/METADATA')]
    data = email.message_from_bytes(wheel.read(name))
    licence = wheel.read(name.replace('METADATA', 'licenses/LICENSE'))
  source = (ROOT / 'modelstock_jax' / '__init__.py').read_text('utf-8')
  assert f"__version__ = '{data['Version']}'\n" in source
  assert data['Name'] == 'modelstock_jax'
  assert data['License-Expression'] == 'Apache-2.0'
  assert licence == (ROOT / 'LICENSE').read_bytes()
  assert data['Requires-Python'] == '>=3.11'
  assert data['Description-Content-Type'] == 'text/markdown'
  text = data.get_payload(decode=True).decode('utf-8')
  files = f'{os.environ.get("PROJECT_URL")}/blob/v{data["Version"]}/'
  text = text.replace(files, '')  # of a release, see setup.py
  assert text.strip() == (ROOT / 'README.md').read_text('utf-8').strip()
  needed = [r for r in data.get_all('Requires-Dist') if 'extra ==' not in r]
  assert {re.split('[<>=]', r)[0] for r in needed} == {'jax', 'numpy'}


def test_the_merge_needs_nothing_but_jax(core, tmp_path):
  program = (
    'from importlib import metadata\n'
    "print(*(d.name.replace('_', '-') for d in metadata.distributions()))"
  )
  done = _run([core / 'python', '-c', program], tmp_path)
  assert set(done.stdout.split()) == CORE | {'modelstock-jax'}


def test_the_example_of_the_readme(core, tmp_path):
  text = (ROOT / 'README.md').read_text('utf-8')
  (example,) = [
    block
    for block in re.findall(r'^```python\n(.*?)^```$', text, re.S | re.M)
    if 'ms.model_stock(' in block
  ]
  # Of the kernel cos = 1/2: t = 2/3 of the way to [[1.5, 0.5], [0.5, 0.5]].
  example += (
    '\nassert ms.__file__.startswith(sys.prefix), ms.__file__\n'
    'kernel = jnp.array([[3.0, 1.0], [1.0, 1.0]]) / 3\n'
    "assert abs(merged.params['kernel'] - kernel).max() < 1e-6\n"
    "assert (merged.params['bias'] == 1).all()\n"
  )
  (tmp_path / 'example.py').write_text('import sys\n' + example)
  done = _run([core / 'python', '-W', 'error', 'example.py'], tmp_path)
  assert done.returncode == 0, done.stderr
  assert 'kernel   0.500  0.667' in done.stdout


def test_a_notebook_installs_the_wheel_and_runs(tmp_path):
  """With Jupyter alone, and the wheel in the place of PyPI."""
  programs = _install(tmp_path / 'jupyter', 'nbclient', 'ipykernel', 'pip')
  notebook = ROOT / 'docs' / 'notebooks' / 'the_merge_on_digits.ipynb'
  (tmp_path / notebook.name).write_bytes(notebook.read_bytes())
  done = _run(
    [programs / 'jupyter-execute', '--inplace', notebook.name],
    tmp_path,
    PIP_CONSTRAINT=str(ROOT / 'constraints.txt'),
    PIP_FIND_LINKS=str(DIST),
    PATH=f'{programs}:{os.environ["PATH"]}',
  )
  assert done.returncode == 0, done.stderr
  cells = json.loads((tmp_path / notebook.name).read_text('utf-8'))['cells']
  verdict = ''.join(
    text
    for cell in cells
    for output in cell.get('outputs', ())
    for text in output.get('text', ())
  )
  rows = dict(re.findall(r'^(anchor|Model Stock) +([\d.]+) ', verdict, re.M))
  assert float(rows['Model Stock']) > float(rows['anchor'])


def test_help_without_extras(core, tmp_path):
  done = _run([core / 'modelstock', '--help'], tmp_path)
  assert done.returncode == 0, done.stderr
  commands = re.findall(r'^    (\w+) ', done.stdout, re.MULTILINE)
  assert 'train' in commands
  for command in commands:
    done = _run([core / 'modelstock', command, '--help'], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  'arguments',
  [
    'train --config=CONFIG --workdir=run',
    'demo --workdir=run',
    'plan --config=CONFIG --topology=v5e:2x4',
    'evaluate --workdir=run',
    'report --workdir=run',
    'data check --data_dir=.',
    'convert run out --format=huggingface',
    'merge --anchor a --models b c --output d',
    'inspect a b c',
  ],
)
def test_what_needs_an_extra_says_so(core, tmp_path, arguments):
  program = 'import modelstock_jax as m; print(m.__path__[0])'
  package = _run([core / 'python', '-c', program], tmp_path).stdout.strip()
  arguments = arguments.replace('CONFIG', f'{package}/configs/digits.py')
  done = _run([core / 'modelstock', *arguments.split()], tmp_path)
  command = arguments.split()[0]
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  extra = 'files' if command in ('inspect', 'merge') else 'train'
  remedy = re.escape(f"pip install 'modelstock_jax[{extra}]'")
  assert re.fullmatch(
    rf'modelstock {command}: \w+ is not installed: {remedy} .*, unless .*', line
  )
  assert list(tmp_path.iterdir()) == []


def _write_safetensors(path, values):
  """The format in full: the header's length, the header, the numbers."""
  tensor = {'dtype': 'F32', 'shape': [len(values)]}
  tensor['data_offsets'] = [0, 4 * len(values)]
  header = json.dumps({'w': tensor}).encode()
  numbers = struct.pack(f'<{len(values)}f', *values)
  path.write_bytes(struct.pack('<Q', len(header)) + header + numbers)


def test_files_are_merged_without_the_trainer(files, tmp_path):
  _write_safetensors(tmp_path / 'anchor.safetensors', [1, 1])
  _write_safetensors(tmp_path / 'one.safetensors', [3, 1])
  _write_safetensors(tmp_path / 'two.safetensors', [3, 3])
  done = _run(
    [
      files / 'modelstock',
      'merge',
      '--anchor=anchor.safetensors',
      '--models',
      'one.safetensors',
      'two.safetensors',
      '--output=merged.safetensors',
    ],
    tmp_path,
  )
  assert done.returncode == 0, done.stderr
  written = (tmp_path / 'merged.safetensors').read_bytes()
  # cos = sqrt(1/2), t = 2 cos / (1 + cos) = 2 sqrt(2) - 2, of the way to (3, 2)
  t = 2 * math.sqrt(2) - 2
  for value, step in zip(
    struct.unpack('<2f', written[-8:]), (2, 1), strict=True
  ):
    assert math.isclose(value, 1 + t * step, rel_tol=1e-6)


def test_the_sdist_trains(train, tmp_path):
  program = 'import modelstock_jax.configs.digits as d; print(d.__file__)'
  done = _run([train / 'python', '-c', program], tmp_path)
  config = done.stdout.strip()
  assert pathlib.Path(config).is_relative_to(train.parent), done.stderr
  done = _run(
    [
      train / 'modelstock',
      'train',
      f'--config={config}',
      '--workdir=run',
      '--config.train.epochs=2',
      '--config.train.warmup_steps=2',
      '--config.evaluate.every_epochs=2',
      "--config.evaluate.benchmarks=('digits',)",
    ],
    tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert 'Finished at step 8; the merged model is in run' in done.stdout


# 200 pictures of two classes, and a CLIP of random weights whose vocabulary are
# the letters, as Hugging Face keeps it.
_OWN_DATA = """
import json
import string
import jax
from PIL import Image
import numpy as np
from modelstock_jax import clip
rng = np.random.default_rng(0)
for label, color in (('fox', 'red'), ('jay', 'blue')):
  Path(f'pictures/{label}').mkdir(parents=True)
  for number in range(100):
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    image = Image.blend(Image.new('RGB', (64, 48), color), noise, 0.5)
    image.save(f'pictures/{label}/{number}.jpg')
letters = string.ascii_lowercase
words = [*letters, *(f'{x}</w>' for x in letters), '.</w>']
words += ['<|startoftext|>', '<|endoftext|>']
sizes = clip.CLIPConfig(
  16,
  clip.VisionConfig(image_size=32, patch_size=8, width=64, depth=2, heads=1),
  clip.TextConfig(
    context_length=32, vocab_size=len(words), width=64, depth=1, heads=1
  ),
)
params = jax.jit(clip.create(sizes).init)(jax.random.key(0))
clip.save_pretrained(params, 'clip', config=sizes)
vocabulary = {word: index for index, word in enumerate(words)}
Path('clip/vocab.json').write_text(json.dumps(vocabulary))
Path('clip/merges.txt').write_text('#version: 0.2\\n')
"""


def test_own_pictures_in_three_commands(train, tmp_path, capsys):
  """Without TensorFlow and torch; prints the seconds of each."""
  for module in ('tensorflow', 'torch', 'open_clip'):
    program = f'import importlib.util as u; print(u.find_spec({module!r}))'
    assert _run([train / 'python', '-c', program], tmp_path).stdout == 'None\n'
  (tmp_path / 'make.py').write_text('from pathlib import Path' + _OWN_DATA)
  done = _run([train / 'python', 'make.py'], tmp_path)
  assert done.returncode == 0, done.stderr
  seconds = {}
  for command in (
    'data import pictures --data_dir=prepared',
    'train --config=own_data --workdir=run --config.anchor.weights=clip'
    ' --config.model.dtype=float32 --config.train.learning_rate=1e-3',
    'evaluate --workdir=run',
  ):
    start = time.monotonic()
    done = _run([train / 'modelstock', *command.split()], tmp_path)
    seconds[command.split()[0]] = round(time.monotonic() - start, 1)
    assert done.returncode == 0, done.stderr
  with capsys.disabled():
    print(seconds)
  # Of 20 pictures for validation; red and blue can be told apart.
  rows = json.loads((tmp_path / 'run' / 'results.json').read_text())
  accuracies = {row['method']: row['accuracy'] for row in rows}
  assert 'zero_shot' in accuracies
  assert accuracies['model_stock_epoch_reset'] > 0.9
