import functools
import json
import logging
import math
import os
import re
import shutil
import signal

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.data import sources as sources_lib
from modelstock_jax.training import auto
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import metrics
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import workdir as workdir_lib

STEPS = 12  # three epochs of four


@pytest.fixture(scope='module')
def finished(tiny_config, setup, tmp_path_factory):
  """An undisturbed run that merges every epoch: (config, workdir, result)."""
  config = tiny_config()
  workdir = tmp_path_factory.mktemp('finished')
  return config, workdir, loop.train(config, workdir, setup=setup)


def _records(workdir, kind):
  return [line for line in metrics.read(workdir) if line['kind'] == kind]


def _steps(workdir, kind):
  return [line['step'] for line in _records(workdir, kind)]


def _on_call(setup, number, act):
  """A setup that does something after so many steps of this attempt."""
  calls = []

  def train(*arguments):
    result = setup.programs.train(*arguments)
    calls.append(1)
    return act(*result) if len(calls) == number else result

  return setup._replace(programs=setup.programs._replace(train=train))


@pytest.mark.parametrize(
  ('every', 'merges', 'restarts'),
  [('epoch', [4, 8, 12], [4, 8]), (2, [8, 12], [8]), ('end', [12], [])],
)
def test_when_models_are_merged(
  tiny_config, setup, tmp_path, every, merges, restarts
):
  config = tiny_config({'merge.every': every, 'evaluate.every_epochs': 9})
  loop.train(config, tmp_path, setup=setup)
  records = _records(tmp_path, 'merge')
  assert [record['step'] for record in records] == merges
  assert [r['step'] for r in records if r['restarts']] == restarts
  assert _steps(tmp_path, 'validation') == [12]


def test_a_measured_merge_restarts_nothing(tiny_config, setup, tmp_path):
  restarts = []
  programs = setup.programs._replace(restart=lambda *_: restarts.append(1))
  loop.train(
    tiny_config({'merge.every': 'end', 'evaluate.every_epochs': 2}),
    tmp_path,
    setup=setup._replace(programs=programs),
  )
  assert _steps(tmp_path, 'merge') == _steps(tmp_path, 'validation') == [8, 12]
  assert not restarts


def test_the_placement_is_recorded(finished):
  config, workdir, _ = finished
  assert 'auto' in auto.settings(config).values()
  recorded = config_lib.from_json(workdir / 'config.json')
  # On CPU: all models on all devices, nothing split, nothing computed again.
  assert [*auto.settings(recorded).values()] == [1, 0, 'none']


def test_the_result_is_the_merge_of_the_last_models(finished, setup):
  config, workdir, result = finished
  assert result.step == STEPS
  host = jax.device_get((setup.anchor, result.models))
  expected = merging.model_stock(
    *host, stacked=True, layers=clip.clip_layers
  ).params
  for actual, wanted in zip(
    jax.tree.leaves(result.merged.params),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
  [score] = setup.evaluate(
    [result.merged.params],
    data.Benchmark('validation', 'digits', config.data.validation),
  )
  last = _records(workdir, 'validation')[-1]
  assert (last['accuracy'], last['n']) == (score.accuracy, 48)


def test_the_validation_loss_is_the_mean_cross_entropy(finished, setup):
  _, workdir, result = finished
  labels, logits = [], []
  for index, record in enumerate(setup.sources.validation):
    example = setup.sources.read_validation(record, index)
    labels.append(example['label'])
    image = {'image': jnp.asarray(example['image'])[None]}
    logits.append(setup.task.predict(result.merged.params, {}, image)[0])
  logits = np.asarray(logits, np.float64)
  losses = np.log(np.exp(logits).sum(-1)) - logits[range(len(labels)), labels]
  last = _records(workdir, 'validation')[-1]
  assert last['loss'] == pytest.approx(losses.mean(), rel=1e-5)


def test_a_short_run_has_its_training_loss(tiny_config, setup, tmp_path):
  config = tiny_config({'log.every_steps': 50, 'merge.every': 'end'})
  mirrored = []
  loop.train(
    config, tmp_path, setup=setup, mirror=lambda *line: mirrored.append(line)
  )
  assert _steps(tmp_path, 'train') == _steps(tmp_path, 'validation')
  assert _steps(tmp_path, 'train') == [4, 8, 12]
  losses = [
    s['train/loss/model_1'] for _, s, _ in mirrored if 'train/loss/model_1' in s
  ]
  assert losses == [line['loss'][1] for line in _records(tmp_path, 'train')]


def test_the_schedule_goes_on_over_merges(finished):
  config, workdir, _ = finished
  records = _records(workdir, 'train')
  assert [record['step'] for record in records] == [2, 4, 6, 8, 10, 12]
  peak = config.train.learning_rate
  for record in records:
    # Two warm-up steps, then ten of a half cosine; a step uses its start.
    expected = peak * (1 + math.cos(math.pi * (record['step'] - 3) / 10)) / 2
    expected = peak / 2 if record['step'] == 2 else expected
    assert record['learning_rate'] == pytest.approx(expected, rel=1e-5)


def test_models_see_different_batches(finished):
  _, workdir, _ = finished
  for record in _records(workdir, 'train'):
    one, two = record['loss']
    assert one != two


def test_every_layer_of_a_merge_is_logged(finished, setup):
  _, workdir, result = finished
  paths = {
    merging.path_name(path)
    for path, _ in jax.tree_util.tree_flatten_with_path(setup.anchor)[0]
  }
  for record in _records(workdir, 'merge'):
    assert set(record['cosine']) == set(record['ratio']) == paths
    assert record['mean_ratio'] == pytest.approx(
      np.mean(list(record['ratio'].values()))
    )
  cosine = float(result.merged.cosine['head']['kernel'])
  assert record['cosine']['head/kernel'] == cosine
  assert record['ratio']['head/kernel'] == pytest.approx(
    2 * cosine / (1 + cosine) if cosine > 0 else 0.0, abs=1e-6
  )
  steps = np.asarray(result.models['head']['kernel'], np.float64)
  steps = (steps - np.asarray(setup.anchor['head']['kernel'])).reshape(2, -1)
  assert record['norm']['head/kernel'] == pytest.approx(
    np.linalg.norm(steps, axis=1).mean(), rel=1e-5
  )


def test_tensorboard_events_are_written(finished):
  _, workdir, _ = finished
  [path] = workdir.glob('events.out.tfevents.*')
  events = path.read_bytes()
  for tag in (b'train/loss/model_1', b'merge/mean_ratio', b'validation/accu'):
    assert tag in events


def test_a_finished_run_is_not_run_again(finished, setup, tmp_path):
  config, workdir, result = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  broken = setup._replace(programs=setup.programs._replace(train=None))
  again = loop.train(config, copy, setup=broken)
  assert again.step == STEPS
  for new, old in zip(
    jax.tree.leaves(again), jax.tree.leaves(result), strict=True
  ):
    np.testing.assert_array_equal(new, old)
  name = metrics.FILE
  assert (copy / name).read_bytes() == (workdir / name).read_bytes()


def test_the_last_merge_may_be_the_anchor(
  tiny_config, setup, restore_run, tmp_path
):
  config = tiny_config({'merge.anchor': 'last_merge'})
  result = loop.train(config, tmp_path, setup=setup)
  shutil.rmtree(tmp_path / 'checkpoints' / '12')
  second = restore_run(config, tmp_path, setup)
  assert int(second.state.step) == 8
  models = jax.device_get(result.models)

  def merge(anchor):
    return merging.model_stock(
      jax.device_get(anchor), models, stacked=True, layers=clip.clip_layers
    )

  moved, fixed = merge(second.merged.params), merge(setup.anchor)
  actual = jax.device_get(result.merged)
  for name in ('cosine', 'params'):
    wanted = jax.tree.leaves(getattr(moved, name))
    for new, old in zip(
      jax.tree.leaves(getattr(actual, name)), wanted, strict=True
    ):
      np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)
  # Against the pretrained weights the angles would have been others.
  distance = [
    abs(float(a) - float(b))
    for a, b in zip(
      jax.tree.leaves(moved.cosine), jax.tree.leaves(fixed.cosine), strict=True
    )
  ]
  assert max(distance) > 0.05


@pytest.mark.parametrize(('ratio', 'warnings'), [(0.995, 1), (0.985, 0)])
def test_a_merge_that_is_a_plain_average_is_warned_of(
  tiny_config, setup, tmp_path, caplog, ratio, warnings
):
  def merge(anchor, models):
    merged = setup.programs.merge(anchor, models)
    constant = jax.tree.map(lambda x: jnp.full_like(x, ratio), merged.ratio)
    return merged._replace(ratio=constant)

  run = setup._replace(programs=setup.programs._replace(merge=merge))
  with caplog.at_level(logging.WARNING, 'modelstock_jax'):
    loop.train(tiny_config(), tmp_path, setup=run)
  messages = [
    record.getMessage()
    for record in caplog.records
    if 'plain average' in record.getMessage()
  ]
  assert len(messages) == warnings  # once a run, though it merges thrice
  assert all('Step 4: the mean ratio is 0.995' in text for text in messages)


def test_a_complete_run_compiles_every_program_once(
  prepare_on, tiny_config, tmp_path, caplog
):
  """With all options on, a merge and a restart, an interruption and a restore.

  Arrays that are created, restarted and restored must look the same to jit.
  """
  config = tiny_config(
    {
      'mesh.stock': 2,
      'merge.anchor': 'last_merge',
      'merge.opt_state': 'average',
      'train.mixup': 0.3,
      'train.label_smoothing': 0.1,
      'checkpoint.every_steps': 3,
    }
  )
  with jax.log_compiles():
    setup = prepare_on(4, config)
    caplog.clear()  # of the anchor, whose text tower is compiled too
    stop = _on_call(setup, 6, _terminate)
    with pytest.raises(loop.Interrupted):
      loop.train(config, tmp_path, setup=stop)
    result = loop.train(config, tmp_path, setup=setup)
  text = '\n'.join(record.getMessage() for record in caplog.records)
  caplog.clear()  # megabytes that nobody wants to see
  assert result.step == STEPS
  names = re.findall(r'Finished XLA compilation of jit\((\w+)\)', text)
  for name in (
    'create',
    'train_step',
    'merge',
    'restart',
    'sums',
  ):
    assert names.count(name) == 1, (name, names.count(name))


def test_only_what_is_asked_for_crosses_to_the_host(
  tiny_config, setup, tmp_path
):
  config = tiny_config()
  with jax.transfer_guard('disallow'):
    result = loop.train(config, tmp_path, setup=setup)
  assert result.step == STEPS


def _terminate(*result):
  os.kill(os.getpid(), signal.SIGTERM)
  return result


def _poison(model):
  """Puts a NaN into the weights of one model."""

  @jax.transfer_guard('allow')
  def act(state, step_metrics):
    poisoned = jax.tree.map(
      lambda x: jax.device_put(x.at[model].set(jnp.nan), x.sharding),
      state.params['head'],
    )
    params = {**state.params, 'head': poisoned}
    return state._replace(params=params), step_metrics

  return act


def _assert_finite(checkpoint, step):
  assert int(checkpoint.state.step) == step
  for leaf in jax.tree.leaves(
    (checkpoint.state.params, checkpoint.state.opt_state, checkpoint.merged)
  ):
    assert np.isfinite(leaf).all()


def test_a_loss_that_is_not_finite_stops_the_run(
  tiny_config, setup, restore_run, tmp_path
):
  config = tiny_config()
  bad = _on_call(setup, 5, _poison(model=1))
  with pytest.raises(FloatingPointError, match=r'Step 6, model 1: .*nan'):
    loop.train(config, tmp_path, setup=bad)
  _assert_finite(restore_run(config, tmp_path, setup), step=4)
  assert max(line['step'] for line in metrics.read(tmp_path)) < 6


@pytest.mark.parametrize('every_steps', [0, 1])
def test_weights_that_are_not_finite_are_not_saved(
  tiny_config, setup, restore_run, tmp_path, every_steps
):
  """The step's own loss was fine, the weights it made are not."""
  config = tiny_config({'checkpoint.every_steps': every_steps})
  step = 6 if every_steps else 8
  bad = _on_call(setup, step, _poison(model=1))
  with pytest.raises(FloatingPointError, match=f'Step {step}, model 1'):
    loop.train(config, tmp_path, setup=bad)
  before = 5 if every_steps else 4
  _assert_finite(restore_run(config, tmp_path, setup), step=before)
  # What went wrong by chance goes right the next time.
  assert loop.train(config, tmp_path, setup=setup).step == STEPS


def test_an_anchor_with_a_nan(tiny_config, setup, tmp_path):
  anchor = dict(setup.anchor)
  anchor['head'] = jax.tree.map(lambda x: x * jnp.nan, anchor['head'])
  with pytest.raises(FloatingPointError, match='Step 1, model 0'):
    loop.train(tiny_config(), tmp_path, setup=setup._replace(anchor=anchor))
  assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_learning_rate_that_is_far_too_high(
  prepare_on, tiny_config, restore_run, tmp_path
):
  config = tiny_config(
    {'train.learning_rate': 1e30, 'checkpoint.every_steps': 1}
  )
  setup = prepare_on(1, config)
  with pytest.raises(
    FloatingPointError, match=r'(?s)Step \d+, model \d.*learning_rate'
  ) as error:
    loop.train(config, tmp_path, setup=setup)
  step = int(re.search(r'Step (\d+)', str(error.value)).group(1))
  assert 1 < step <= 4  # the first one has learning rate 0
  _assert_finite(restore_run(config, tmp_path, setup), step=step - 1)


def test_another_config_is_refused_with_all_differences(
  tiny_config, setup, tmp_path
):
  config = tiny_config()
  with workdir_lib.claim(tmp_path, config.to_json()):
    before = (tmp_path / 'config.json').read_bytes()
    # Another process, or another run of this one.
    with pytest.raises(BlockingIOError, match=f'in use by .*{os.getpid()} on'):
      loop.train(config, tmp_path, setup=setup)
  other = tiny_config({'train.epochs': 5, 'merge.every': 2, 'seed': 7})
  with pytest.raises(ValueError, match=str(tmp_path)) as error:
    loop.train(other, tmp_path, setup=setup)
  lines = [line.strip() for line in str(error.value).splitlines()[1:]]
  assert lines == [
    "merge.every: 'epoch' -> 2",
    'seed: 0 -> 7',
    'train.epochs: 3 -> 5',
  ]
  assert (tmp_path / 'config.json').read_bytes() == before
  assert not (tmp_path / 'checkpoints').exists()


def test_other_inputs_are_refused(finished, setup, tmp_path):
  """A newer data set, another anchor, other random keys: not the same run."""
  config, workdir, _ = finished
  versions = tmp_path / 'digits'
  shutil.copytree(sources_lib.BUNDLED_DIR / 'digits', versions)
  newer = shutil.copytree(versions / '1.0.0', versions / '1.1.0')
  info = newer / 'dataset_info.json'
  info.write_text(info.read_text().replace('1.0.0', '1.1.0'))
  reading = config_lib.override(config, [f'--config.data.data_dir={tmp_path}'])
  sources = clip_task.sources(reading.data, config.augment, 8)
  with jax.default_prng_impl('rbg'), jax.enable_x64(True):
    inputs = setup_lib.inputs(setup.task, sources)
  inputs = {**inputs, 'anchor': 'another', 'example': {'label': 'int8[]'}}
  with pytest.raises(ValueError, match='of a run with another con') as error:
    loop.train(config, workdir, setup=setup._replace(inputs=inputs))
  assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
    f"inputs.anchor: '{setup.inputs['anchor']}' -> 'another'",
    "inputs.example.image: 'uint8[8, 8, 1]' -> 'absent'",
    "inputs.example.label: 'int32[]' -> 'int8[]'",
    "inputs.jax_default_prng_impl: 'threefry2x32' -> 'rbg'",
    'inputs.jax_enable_x64: False -> True',
    "inputs.train: 'digits/1.0.0/train[:32]: 32 examples' -> "
    "'digits/1.1.0/train[:32]: 32 examples'",
    "inputs.validation: 'digits/1.0.0/validation[:48]: 48 examples' -> "
    "'digits/1.1.0/validation[:48]: 48 examples'",
  ]
  assert loop.train(config, workdir, setup=setup).step == STEPS


def test_a_workdir_holds_its_config(tiny_config, tmp_path):
  text = tiny_config({'seed': 4}).to_json()
  path = tmp_path / 'a' / 'b' / 'config.json'
  with workdir_lib.claim(tmp_path / 'a' / 'b', text) as folder:
    assert folder == path.parent
  assert json.loads(path.read_text())['seed'] == 4


def test_a_workdir_that_cannot_be_written(tiny_config, setup, tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  for workdir in (file, file / 'below'):
    with pytest.raises(OSError, match=f'--workdir={workdir}: cannot be writ'):
      loop.train(tiny_config(), workdir, setup=setup)


@pytest.mark.parametrize(
  ('changes', 'error', 'words'),
  [
    (
      {'anchor.weights': '/nowhere/w'},
      FileNotFoundError,
      "anchor.weights: '/nowhere/w'",
    ),
    ({'data.dataset': 'imagenet2012'}, FileNotFoundError, "'imagenet2012'"),
    ({'data.data_dir': '/nowhere'}, FileNotFoundError, '/nowhere'),
    ({'data.train': 'trian'}, ValueError, "'trian'"),
    ({'data.validation': 'valid'}, ValueError, "'valid'"),
    ({'train.batch_size': 12}, ValueError, 'train.batch_size: .*multiple of 8'),
    ({'train.batch_size': 64}, ValueError, '32 examples'),
    ({'train.warmup_steps': 12}, ValueError, 'train.warmup_steps'),
    (
      {'mesh.stock': 3, 'merge.num_models': 3},
      ValueError,
      'mesh.stock: 3 models do not divide 8 devices',
    ),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
  tiny_config, tmp_path, changes, error, words
):
  workdir = tmp_path / 'workdir'
  config = tiny_config(changes)
  prepare = functools.partial(clip_task.prepare, config)
  with pytest.raises(error, match=words):
    loop.train(config, workdir, setup=prepare)
  # A corrected config may take the same workdir.
  assert not workdir.exists()


@pytest.mark.parametrize('text', ['', '{"seed": 0', '[]', 'null'])
def test_a_workdir_with_a_broken_config_is_refused(text, tiny_config, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with (
    pytest.raises(ValueError, match=r'config\.json: is not the config'),
    workdir_lib.claim(tmp_path, tiny_config().to_json()),
  ):
    pass


def test_too_little_memory_is_explained(tiny_config, setup, tmp_path):
  def train(*arguments):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9G.\n\nx' * 9
    )

  programs = setup.programs._replace(train=train)
  with pytest.raises(MemoryError, match=r'allocate 9G\.\n.*\n.*remat=block'):
    loop.train(tiny_config(), tmp_path, setup=setup._replace(programs=programs))


def test_unknown_benchmarks_are_refused_before_training(tiny_config):
  config = tiny_config({'evaluate.benchmarks': "('digits','noize')"})
  with pytest.raises(ValueError, match="no benchmark 'noize'"):
    clip_task.prepare(config)


def test_images_are_augmented_as_the_config_says(tiny_config, setup):
  mirrored = {'data.cache': False, 'augment.flip': 1.0}
  batches = [
    setup_lib.read_batches(
      config,
      clip_task.sources(config.data, config.augment, 8),
      setup.placement,
      range(2),
      start=5,
    )
    for config in (tiny_config(), tiny_config(mirrored))
  ]
  plain, flipped = map(next, batches)
  for reader in batches:
    reader.close()
  np.testing.assert_array_equal(plain['label'], flipped['label'])
  np.testing.assert_array_equal(plain['image'][..., ::-1, :], flipped['image'])
  assert (plain['image'] != flipped['image']).any()


def test_a_folder_of_other_files_is_no_workdir(tmp_path):
  (tmp_path / 'thesis.tex').touch()
  (tmp_path / 'pictures').mkdir()
  with (
    pytest.raises(ValueError, match='Choose a new folder') as error,
    workdir_lib.claim(tmp_path, '{}'),
  ):
    pass
  assert str(error.value) == (
    f"--workdir={tmp_path}: has no config.json of a run, but ['pictures', "
    "'thesis.tex']. Choose a new folder."
  )
  assert not (tmp_path / 'config.json').exists()


def test_the_log_of_a_run_may_be_in_its_workdir(tmp_path):
  (tmp_path / 'train.log').touch()
  (tmp_path / 'slurm-1.out').touch()
  (tmp_path / '.DS_Store').touch()
  with workdir_lib.claim(tmp_path, '{}'):
    assert (tmp_path / 'config.json').read_text() == '{}'
