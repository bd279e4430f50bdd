"""Run every test on eight CPU devices, with jax at its strictest.

Programs are compiled without optimization, which takes a quarter of the time,
and kept between runs: what they compute is held to the same tolerances.
"""

import collections
import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import zipfile

# Read by jax when it starts its backend, so set before anyone imports it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
# The emitters that XLA has by default take three times as long to compile; from
# jax 0.11 on it has no others, and an unknown flag ends the process.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    *(
      ['--xla_cpu_use_fusion_emitters=false']
      if re.match(r'0\.([0-9]|10)\.', importlib.metadata.version('jaxlib'))
      else []
    ),
    '--xla_cpu_parallel_codegen_split_count=1',
    *os.environ.get('XLA_FLAGS', '').split(),
  ]
)

# Processes that a test starts inherit these.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
  pathlib.Path(__file__).parents[1] / 'build' / 'programs'
)

import jax
from jax._src import compiler
import numpy as np
import pytest

# No silent float32 of a bfloat16 and a float32, no silent new axes.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).parents[1]
ORACLES = pathlib.Path(__file__).parent / 'oracles'
# The slowest files, and pages of the documentation. They start first:
# a process that starts one last leaves the other idle.
SLOWEST = (
  # test
  'training/test_anchor.py',
  'cli/test_evaluate.py',
  'training/test_loop.py',
  'training/test_step.py',
  'cli/test_convert.py',
  'cli/test_demo.py',
  'cli/test_imagenet.py',
  'training/test_resume.py',
  'clip/test_model.py',
  'clip/test_loading.py',
  'merging/test_stock.py',
  'clip/test_probe.py',
  'planning/test_plan.py',
  'cli/test_single_model.py',
  'files/test_runs.py',
  'training/test_checkpoints.py',
  'report/test_card.py',
  'files/test_orbax_merge.py',
  'formats/test_torch.py',
  'report/test_page.py',
  'merging/test_stock_accuracy.py',
  'merging/contrib/test_yoyo.py',
  'training/test_single_model.py',
  'files/test_trainers.py',
  'training/test_image_features.py',
  'report/test_run_plots.py',
  # test-experiments
  'experiments/test_baselines.py',
  'experiments/test_geometry.py',
  'experiments/test_soups.py',
  # test-docs
  '[docs/paper.md: ',
  'docs/test_own_network.py',
  '[docs/soups.md: ',
  '[docs/checkpoints.md: ',
  '[docs/imagenet.md: ',
  '[docs/own_data.md: ',
  '[README.md: ',
  '[docs/files.md: ',
  'docs/test_site.py',
  'docs/test_notebooks.py',
  # test-oracles
  'oracles/test_clip_huggingface.py',
  'oracles/test_documented_commands.py',
  'oracles/test_plan_tpu.py',
  'oracles/test_imagenet_builders.py',
  'kills/test_commands.py',
  'oracles/test_clip_open_clip.py',
  'oracles/test_tokenizer.py',
  'oracles/test_clip_openai.py',
  'oracles/test_digits.py',
)
# Of the cases of the attacks; `make test-attack` and `make test-kills` run all.
SHARE = float(os.environ.get('ATTACK_SHARE', '1'))
OUTCOMES = ('refused', 'read', 'wrong', 'traceback', 'hang', 'written')


def _resident():
  """Bytes of this process in memory, 0 where it is not known."""
  pages = pathlib.Path('/proc/self/statm')
  if not pages.exists():
    return 0
  return int(pages.read_text().split()[1]) * os.sysconf('SC_PAGESIZE')


def _release_memory():
  """Empties the caches of jax, and returns to the system what glibc holds."""
  gc.collect()
  jax.clear_caches()
  with contextlib.suppress(AttributeError):  # not glibc
    ctypes.CDLL(None).malloc_trim(0)
  return _resident()


@pytest.fixture(scope='session')
def released():
  """Bytes in memory after the last release."""
  return {'bytes': _resident()}


@pytest.fixture(autouse=True)
def limit_memory(released):
  """Releases memory when it has grown, or a worker takes 3 GB."""
  yield
  if _resident() > max(1.1e9, released['bytes'] + 0.1e9):
    released['bytes'] = _release_memory()


@pytest.fixture(scope='module')
def optimized():
  """Compiles as users do, for numbers that are promised of what they get."""
  make = compiler.get_compile_options

  def as_users_do(*arguments, env_options_overrides=None, **options):
    overrides = dict(env_options_overrides or {})
    if 'use_fusion_emitters' in os.environ['XLA_FLAGS']:
      overrides['xla_cpu_use_fusion_emitters'] = True
    return make(*arguments, env_options_overrides=overrides, **options)

  jax.config.update('jax_disable_most_optimizations', False)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compiler, 'get_compile_options', as_users_do)
    yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def scaled():
  """The share of a full number of cases that is run; skips a test of none."""

  def scale(count):
    if not (number := round(count * SHARE)):
      pytest.skip(f'{count} cases, of which ATTACK_SHARE={SHARE} leaves none')
    return number

  return scale


@pytest.fixture
def tally(record_property):
  """Counts what the cases of an attack end in, for the table that is printed.

  `tally(name, outcomes)`: pairs of one of `OUTCOMES` and what to print of it.
  All but the first two fail the test: wrong in silence, an error that is not
  explained, no end, and what is done or left where it should not be.
  """

  def count(name, outcomes):
    counts, failed = collections.Counter(), []
    for number, (kind, text) in enumerate(outcomes):
      counts[kind] += 1
      if kind in OUTCOMES[2:]:
        failed.append(f'{name} {number}: {kind} {text[-1000:]}')
    record_property('outcomes', [name, *(counts[kind] for kind in OUTCOMES)])
    assert not failed, '\n'.join(failed[:5])
    return counts

  return count


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  """Sorts `SLOWEST` first, then files of many tests: xdist takes this order."""
  counts = collections.Counter(item.path for item in items)

  def rank(item):
    ranks = (i for i, name in enumerate(SLOWEST) if name in item.nodeid)
    return next(ranks, len(SLOWEST)), -counts[item.path], item.path

  items.sort(key=rank)


def pytest_terminal_summary(terminalreporter):
  """Prints the table of all attacks."""
  rows = [
    row
    for status in ('passed', 'failed')
    for report in terminalreporter.stats.get(status, [])
    for name, row in getattr(report, 'user_properties', ())
    if name == 'outcomes'
  ]
  if rows:
    rows.append(
      ['all', *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
    )
    rows = [['attack', *OUTCOMES], ['---', *(['--:'] * len(OUTCOMES))], *rows]
    terminalreporter.section('outcomes')
  for row in rows:
    terminalreporter.line(f'| {" | ".join(map(str, row))} |')


@pytest.fixture(scope='session')
def make_imagenet():
  """The module that has made, and describes, the tiny ImageNet."""
  path = pathlib.Path(__file__).parent / 'data' / 'make_imagenet.py'
  spec = importlib.util.spec_from_file_location('make_imagenet', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def imagenet(make_imagenet, tmp_path_factory):
  """The data directory of a tiny ImageNet with all its shifts: to read."""
  folder = tmp_path_factory.mktemp('imagenet')
  make_imagenet.unpack(folder)
  make_imagenet.spread_corruption(folder)
  make_imagenet.write_objectnet(folder / 'objectnet-1.0')
  return folder


@pytest.fixture(scope='session')
def imagenet_run(imagenet):
  """Writes what a run on the tiny ImageNet takes: two steps from scratch.

  A CLIP of random weights as a Hugging Face folder, names of the classes, and
  a config that starts from them.
  """

  def write(folder, sizes=None):
    from modelstock_jax import clip
    from modelstock_jax.data import sources

    sizes = sizes or clip.CLIPConfig(
      embed_dim=16,
      vision=clip.VisionConfig(
        image_size=32, patch_size=16, channels=3, width=64, depth=1, heads=1
      ),
      text=clip.TextConfig(
        context_length=77, vocab_size=49408, width=64, depth=1, heads=1
      ),
    )
    model = clip.create(sizes)
    params = jax.jit(model.init)(jax.random.key(0))
    clip.save_pretrained(params, folder / 'clip', config=sizes)
    wnids = sources.imagenet_wnids()
    prompts = dict(
      names=[f'thing number {i}' for i in range(1000)],
      templates=['a photo of a {}.'],
      labels=list(wnids),
    )
    (folder / 'prompts.json').write_text(json.dumps(prompts))
    values = {
      'model.embed_dim': sizes.embed_dim,
      'model.dtype': 'float32',
      'anchor.weights': str(folder / 'clip'),
      'anchor.prompts': str(folder / 'prompts.json'),
      'data.dataset': 'imagenet2012',
      'data.data_dir': str(imagenet),
      'augment.crop_scale': (0.5, 1.0),
      'augment.flip': 0.5,
      'train.epochs': 1,
      'train.batch_size': 6,  # of 15 images
      'train.learning_rate': 1e-3,
      'train.warmup_steps': 1,
      'evaluate.batch_size': 16,
      'log.every_steps': 1,
    }
    for name, tower in (('image', sizes.vision), ('text', sizes.text)):
      for key, value in dataclasses.asdict(tower).items():
        values[f'model.{name}.{key}'] = value
    lines = [f'  config.{key} = {value!r}' for key, value in values.items()]
    path = folder / 'config.py'
    path.write_text(
      'from modelstock_jax.training import config as config_lib\n\n\n'
      'def get_config():\n  config = config_lib.defaults()\n'
      + '\n'.join(lines)
      + '\n  return config\n'
    )
    return path

  return write


@pytest.fixture(scope='session')
def run_script():
  """Runs Python in a process of its own, which has to end well."""

  def run(script, *arguments):
    done = subprocess.run(
      [sys.executable, '-c', script, *arguments],
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    assert done.returncode == 0, done.stderr

  return run


@pytest.fixture(scope='session')
def one_epoch():
  """Flags of a run on digits that ends after one epoch of two steps."""
  return [
    '--config.train.epochs=1',
    '--config.train.warmup_steps=1',
    '--config.train.batch_size=48',
    '--config.data.train=train[:100]',
    '--config.data.validation=validation[:50]',
    '--config.evaluate.benchmarks=()',
  ]


@pytest.fixture(scope='session')
def tfrecord(make_imagenet, run_script, tmp_path_factory):
  """ImageNet and ReaL as tfrecord in several shards, by the real builders."""
  folder = tmp_path_factory.mktemp('tfrecord')
  make_imagenet.write_manual(folder / 'manual')
  (folder / 'real.json').write_text(json.dumps(make_imagenet.REAL))
  script = """
import pathlib, sys
from unittest import mock
import tensorflow_datasets as tfds
folder = pathlib.Path(sys.argv[1])
config = tfds.download.DownloadConfig(
    manual_dir=folder / 'manual', num_shards=3)
with mock.patch.object(tfds.download.DownloadManager, 'download',
                       lambda self, url: tfds.core.Path(folder / 'real.json')):
  for name in ('imagenet2012', 'imagenet2012_real'):
    tfds.builder(name, data_dir=folder, file_format='tfrecord'
                 ).download_and_prepare(download_config=config)
"""
  run_script(script, folder)
  return folder


_STORAGES = {'float32': 'Float', 'float16': 'Half', 'int64': 'Long'}
_STORAGES |= {'bfloat16': 'BFloat16'}


def _torch_tensor(key, array):
  """Opcodes of a pickle that make a tensor of storage `key`."""
  strides = tuple(n // array.itemsize for n in array.strides)
  values = (key, 'cpu', array.size, array.shape, strides)
  key, device, size, shape, strides = (pickle.dumps(x, 2)[2:-1] for x in values)
  kind = f'ctorch\n{_STORAGES[array.dtype.name]}Storage\n'.encode()
  return (
    b'ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage'
    + (kind + key + device + size + b'tQK\0' + shape + strides)
    + b'\x89ccollections\nOrderedDict\n)RtR'
  )


@pytest.fixture(scope='session')
def save_torch():
  """Writes arrays as torch.save writes a state dict, without torch."""

  def write(path, arrays):
    arrays = {name: np.asarray(x, order='C') for name, x in arrays.items()}
    content = b'\x80\2}('
    for number, (name, array) in enumerate(arrays.items()):
      content += pickle.dumps(name, 2)[2:-1] + _torch_tensor(str(number), array)
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('archive/data.pkl', content + b'u.')
      archive.writestr('archive/byteorder', b'little')
      for number, array in enumerate(arrays.values()):
        archive.writestr(f'archive/data/{number}', array.tobytes())

  return write


# 32 digits in batches of 8 are 4 steps an epoch, 12 in all.
_TINY = {
  'model.embed_dim': 8,
  'model.image.width': 8,
  'model.image.depth': 1,
  'model.image.heads': 2,
  'model.text.width': 8,
  'model.text.heads': 2,
  'data.train': 'train[:32]',
  'data.validation': 'validation[:48]',
  'train.epochs': 3,
  'train.batch_size': 8,
  'train.learning_rate': 3e-2,
  'train.warmup_steps': 2,
  'evaluate.batch_size': 48,
  'evaluate.every_epochs': 1,
  'checkpoint.every_merges': 1,
  'checkpoint.every_steps': 0,
  'log.every_steps': 2,
}


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
  """A file with the untrained weights of the tiny CLIP."""
  from modelstock_jax import clip
  from modelstock_jax.training import config as config_lib

  path = tmp_path_factory.mktemp('anchor') / 'tiny.safetensors'
  config = config_lib.load(ROOT / 'configs' / 'digits.py', _flags(_TINY))
  model = clip.create(config.model.network())
  clip.save_safetensors(
    model.init(jax.random.key(7)), path, {'model': config.model.to_json()}
  )
  return path


@pytest.fixture(scope='session')
def tiny_flags(weights):
  """Return flags that make the demo's config tiny, with changes."""

  def tiny(changes=()):
    values = {**_TINY, 'anchor.weights': weights, **dict(changes)}
    return _flags(values)

  return tiny


@pytest.fixture(scope='session')
def tiny_config(tiny_flags):
  """The demo's config made tiny, with changes: {'train.epochs': 2, ...}."""
  from modelstock_jax.training import config as config_lib

  def tiny(changes=()):
    return config_lib.load(ROOT / 'configs' / 'digits.py', tiny_flags(changes))

  return tiny


@pytest.fixture(scope='session')
def prepare_on():
  """Prepares a run on the first few devices: eight cost time to compile."""
  from modelstock_jax.training import clip_task

  def prepare(number, config, **hooks):
    devices = jax.devices()[:number]
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, 'devices', lambda: devices)
      return clip_task.prepare(config, **hooks)

  return prepare


@pytest.fixture(scope='session')
def setup(prepare_on, tiny_config):
  """Compiled once for all runs that differ in when things happen."""
  return prepare_on(2, tiny_config())


@pytest.fixture(scope='session')
def restore_run():
  """Reads the latest checkpoint of a run, finished or not."""
  from modelstock_jax.training import checkpoints as checkpoints_lib
  from modelstock_jax.training import setup as setup_lib

  def restore(config, workdir, setup):
    models = np.arange(config.merge.num_models, dtype=np.int32)
    with checkpoints_lib.Checkpoints(workdir / 'checkpoints') as checkpoints:
      return setup_lib.resume(
        setup,
        checkpoints,
        models,
        seed=config.seed,
        moving_base=config.merge.anchor == 'last_merge',
      )

  return restore


@pytest.fixture(scope='session')
def read_run(restore_run):
  """All that a finished run leaves, as one flat dict of numpy arrays."""

  def read(config, workdir, setup):
    checkpoint = restore_run(config, workdir, setup)
    leaves = jax.tree_util.tree_flatten_with_path(checkpoint)[0]
    actual = {jax.tree_util.keystr(path): _host(leaf) for path, leaf in leaves}
    actual['metrics'] = np.array(_untimed(workdir))
    return actual

  return read


@pytest.fixture(scope='session')
def assert_identical():
  """Two dicts of arrays hold the same bits."""

  def check(actual, expected):
    assert actual.keys() == expected.keys()
    different = [
      name
      for name, value in expected.items()
      if value.dtype != actual[name].dtype
      or value.tobytes() != actual[name].tobytes()
    ]
    assert not different

  return check


@pytest.fixture(scope='session')
def apart():
  """Return the distance of two models, in units of how far one of them went.

  But for the biases of keys, which add the same to all of a query's logits: a
  softmax takes no notice, their gradient is 0, and Adam makes steps of its
  rounding.
  """

  def measure(actual, expected, anchor):
    paths, start = zip(
      *jax.tree_util.tree_leaves_with_path(anchor), strict=True
    )
    names = [jax.tree_util.keystr(path) for path in paths]
    counts = ["['key']['bias']" not in name for name in names]
    assert not all(counts)
    distance, moved = (
      sum(
        np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
        for a, b, taken in zip(x, y, counts, strict=True)
        if taken
      )
      for x, y in ((actual, expected), (expected, start))
    )
    assert moved > 0
    return np.sqrt(distance / moved)

  return measure


@pytest.fixture(scope='session')
def run_processes():
  """Return a function that runs a script as connected processes.

  `run(script, count, *arguments, devices=...)` starts it as `script INDEX COUNT
  PORT ARGUMENTS`, each with so many devices, and returns what each has printed.
  """

  def run(script, count, *arguments, devices):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    running = [
      subprocess.Popen(
        [sys.executable, script, *map(str, (index, count, port, *arguments))],
        env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for index in range(count)
    ]
    try:
      outputs = [process.communicate(timeout=200) for process in running]
    finally:
      for process in running:
        process.kill()
        process.wait()
    for process, (_, errors) in zip(running, outputs, strict=True):
      assert process.returncode == 0, errors
    return [printed for printed, _ in outputs]

  return run


def _flags(values):
  return [f'--config.{key}={value}' for key, value in values.items()]


def _host(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.array(leaf)


def _untimed(workdir):
  """The text lines of metrics.jsonl without what a clock decides."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    record.pop('images_per_second', None)
  return [json.dumps(record) for record in records]


def pytest_ignore_collect(collection_path, config):
  """Leaves foreign code alone unless it is asked for.

  pytest does not call this for paths given on its command line: both
  `pytest tests/oracles` and `pytest -m oracle` run the oracles, and fail
  where the foreign code is not installed.
  """
  if collection_path == ORACLES and config.option.markexpr != 'oracle':
    return True
  return None
