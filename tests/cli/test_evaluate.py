import functools
import json
import os
import shutil

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import demo
from modelstock_jax.cli import main
from modelstock_jax.data import corruptions
from modelstock_jax.data import sources
from modelstock_jax.formats import runs
from modelstock_jax.report import differences
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import sharding

pytestmark = pytest.mark.usefixtures('two_devices')

# Patches of 32 pixels as in ViT-B/32, little else.
THIN = clip.CLIPConfig(
  embed_dim=16,
  vision=clip.VisionConfig(
    image_size=64, patch_size=32, width=64, depth=1, heads=1
  ),
  text=None,
)
IMAGENET = [
  name for name in data.BENCHMARKS if name not in ('digits', *data.SHIFTS)
]
SHORT = [
  '--config.data.train=train[:40]',
  '--config.data.validation=validation[:40]',
  '--config.train.batch_size=20',
  '--config.train.epochs=1',
  '--config.train.warmup_steps=1',
  '--config.evaluate.batch_size=200',
  "--config.evaluate.benchmarks=('digits','noise')",
]


@pytest.fixture(scope='module')
def thin():
  """Model and params of a classifier of 1000 classes, of random weights."""
  model = clip.classifier(THIN, 1000)
  params = model.init(jax.random.key(3))
  # Of features, not of noise: images that differ get different answers.
  params['head']['kernel'] = 50 * params['head']['kernel']
  return model, params


@pytest.fixture(scope='module')
def folder(thin, tmp_path_factory):
  """The classifier as `modelstock convert` writes it."""
  path = tmp_path_factory.mktemp('thin') / 'thin_clip'
  labels = sources.imagenet_wnids()
  clip.save_pretrained(thin[1], path, config=THIN, labels=labels)
  return path


@pytest.fixture(scope='module')
def logits(thin, imagenet):
  """Logits [n, 1000] and labels of every benchmark, one image at a time."""
  model, params = thin
  apply = jax.jit(model.apply)
  mean, std = np.float32(clip.saving.MEAN), np.float32(clip.saving.STD)
  actual = {}
  for name in IMAGENET:
    benchmark = data.find_benchmark(name)
    source = data.open_benchmark(benchmark, imagenet)
    read = data.benchmark_reader(benchmark, source, 64)
    records = list(source)
    known = {}
    for record in records:
      image = read(record, 0)['image'].astype(np.float32) / 255
      image = ((image - mean) / std)[None]
      if image.tobytes() not in known:
        known[image.tobytes()] = np.asarray(apply(params, image))[0]
      record['logits'] = known[image.tobytes()]
    actual[name] = records
  return actual


def _expected(name, records, members):
  """Right answers and images that count, by what the papers say of the sets."""
  right = counted = 0
  for record in records:
    row, label = record['logits'], record['label']
    if name in ('imagenet_r', 'imagenet_a'):
      first = {'imagenet_r': 1, 'imagenet_a': 4}[name]
      ok = max(range(first, 1000, 5), key=lambda k: row[k]) == label
    elif name.startswith('objectnet'):
      ok = np.argmax([max(row[ids]) for ids in members]) == label
    elif name == 'imagenet_real':
      if label.max() < 0:
        continue
      ok = row.argmax() in label
    else:
      ok = row.argmax() == label
    counted += 1
    right += bool(ok)
  return right, counted


def _evaluate(checkpoint, imagenet, names, *flags):
  return main.main(
    [
      'evaluate',
      f'--checkpoint={checkpoint}',
      f'--data_dir={imagenet}',
      f'--benchmarks={",".join(names)}',
      *flags,
    ]
  )


def test_all_benchmarks_of_a_converted_folder(
  folder, imagenet, make_imagenet, logits, tmp_path, capsys
):
  output = tmp_path / 'new' / 'found.json'
  flags = [f'--output={output}', '--batch_size=14']
  assert _evaluate(folder, imagenet, IMAGENET, *flags) == 0
  rows = {row.benchmark: row for row in results.load(output)}
  members = list(make_imagenet.OBJECTNET.values())
  for name in IMAGENET:
    right, counted = _expected(name, logits[name], members)
    row = rows[name]
    assert (row.n, row.accuracy) == (counted, right / counted), name
    assert (row.method, row.seed) == ('thin_clip', 0)
  assert {name: row.num_classes for name, row in rows.items()} == {
    **dict.fromkeys(IMAGENET, 1000),
    **dict.fromkeys(['imagenet_r', 'imagenet_a'], 200),
    **dict.fromkeys(['objectnet', 'objectnet_uncropped'], 113),
  }
  text = capsys.readouterr().out
  head = text.splitlines()[0].split()
  assert head[1:9] == ['imagenet', 'mean', 'shift', *data.IMAGENET_SHIFTS]
  words = ' '.join(text.split())
  assert (
    'Mean shift: of ImageNet-V2, ImageNet-R, ImageNet-Sketch, ObjectNet '
    '(uncropped), ImageNet-A.' in words
  )
  assert f'Wrote {output}' in text


def test_a_table_of_the_paper_is_printed_with_its_published_rows(
  folder, imagenet, make_imagenet, logits, tmp_path, caplog, capsys
):
  """Of ViT-B/32; ImageNet-A and ObjectNet are missing the second time."""
  group = data.GROUPS['paper_b32']
  members = list(make_imagenet.OBJECTNET.values())
  part = tmp_path / 'part'
  part.mkdir()
  for path in imagenet.iterdir():
    if path.name not in ('imagenet_a', 'objectnet-1.0'):
      (part / path.name).symlink_to(path)
  # The means of five that the authors print, and those of V2, R and Sketch:
  # (69.22 + 67.237 + 47.183) / 3, (68.93 + 64.293 + 46.21) / 3.
  for data_dir, once, epoch in (
    (imagenet, '52.7', '51.0'),
    (part, '61.2', '59.8'),
  ):
    output = tmp_path / 'results.json'
    flags = [f'--output={output}']
    assert _evaluate(folder, data_dir, ['paper_b32'], *flags) == 0
    table, _, note = capsys.readouterr().out.partition('* best')
    lines = {
      line[:18].strip(): [cell.lstrip('*') for cell in line.split()]
      for line in table.splitlines()
    }
    names = [x for x in group.benchmarks if x in lines['method']]
    assert lines['published (end)'][2:5] == ['79.7', once, '69.2']
    assert lines['published (epoch)'][3] == epoch
    rows = {row.benchmark: row for row in results.load(output)}
    assert list(rows) == names
    for name, row in rows.items():
      right, counted = _expected(name, logits[name], members)
      assert (row.accuracy, row.n) == (right / counted, counted)
    titles = ', '.join(map(results.benchmark_title, names[1:]))
    assert f'Mean shift: of {titles}.' in ' '.join(note.split())
    if data_dir == imagenet:
      assert names == list(group.benchmarks)
      assert not caplog.text
  assert names == ['imagenet', 'imagenet_v2', 'imagenet_r', 'imagenet_sketch']
  for name in ('imagenet_a', 'objectnet_uncropped'):
    assert f'Left out, as it is missing: {name}: ' in caplog.text


def test_all_of_a_group_is_missing_or_what_is_named_itself(
  folder, imagenet, tmp_path, capsys
):
  assert _evaluate(folder, tmp_path, ['paper_b32']) == 1
  lines = capsys.readouterr().err
  for name in data.GROUPS['paper_b32'].benchmarks:
    assert f'{name}: ' in lines
  (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
  assert _evaluate(folder, tmp_path, ['paper_b16', 'imagenet_a']) == 1
  assert 'imagenet_a: no prepared data set' in capsys.readouterr().err


def test_a_model_that_knows_is_right(thin, imagenet, tmp_path):
  # The head's bias decides: class 7 for every image, which is that of V2's
  # only top image, and among R's 200 it is no choice.
  params = {**thin[1], 'head': dict(thin[1]['head'])}
  params['head']['kernel'] = jnp.zeros_like(params['head']['kernel'])
  params['head']['bias'] = params['head']['bias'].at[7].set(1.0).at[6].set(0.5)
  path = tmp_path / 'knows'
  labels = sources.imagenet_wnids()
  clip.save_pretrained(params, path, config=THIN, labels=labels)
  names = ['imagenet_v2_top', 'imagenet_r', 'imagenet_sketch']
  assert _evaluate(path, imagenet, names) == 0
  rows = {row.benchmark: row for row in results.load(path / 'results.json')}
  # 6 is one of R's (1, 6, 11, ...), with one image of 200.
  assert rows['imagenet_v2_top'].accuracy == 1
  assert rows['imagenet_r'].accuracy == 1 / 200
  assert rows['imagenet_sketch'].accuracy == 0


@pytest.fixture
def relabelled(folder, tmp_path):
  def make(labels):
    path = tmp_path / 'relabelled'
    shutil.copytree(folder, path)
    (path / 'labels.json').write_text(json.dumps(labels))
    return path

  return make


def test_labels_in_another_order_are_an_error(relabelled, imagenet, capsys):
  labels = list(sources.imagenet_wnids())
  labels[3], labels[4] = labels[4], labels[3]
  path = relabelled(labels)
  for name in ('imagenet_v2', 'objectnet'):
    assert _evaluate(path, imagenet, [name]) == 1
    error = capsys.readouterr().err
    assert f'2 labels of its head are not those of {name}' in error
    assert "class 3 is 'n01494475', and 'n01491361' in the data" in error
  assert not (path / 'results.json').exists()


def test_classes_of_other_data_are_an_error(folder, capsys):
  flags = ['--benchmarks=digits', f'--checkpoint={folder}']
  assert main.main(['evaluate', *flags]) == 1
  assert 'a head of 1000 classes, digits has 10' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--benchmarks=imagenet_v3'], "no benchmark 'imagenet_v3'"),
    ([], 'imagenet2012'),  # that of 1000 classes
    (['--benchmarks=imagenet', '--batch_size=0'], '--batch_size=0'),
    (['--benchmarks=imagenet'], 'imagenet2012'),
    (['--benchmarks=objectnet'], '--data_dir'),
  ],
)
def test_bad_flags(folder, flags, message, capsys):
  assert main.main(['evaluate', f'--checkpoint={folder}', *flags]) == 1
  assert message in capsys.readouterr().err


def test_folder_without_a_head(thin, imagenet, tmp_path, capsys):
  assert _evaluate(tmp_path / 'nowhere', imagenet, ['imagenet']) == 1
  assert 'there is no such file or folder' in capsys.readouterr().err
  path = tmp_path / 'bare'
  clip.save_pretrained({'image': thin[1]['image']}, path, config=THIN)
  assert _evaluate(path, imagenet, ['imagenet']) == 1
  assert 'classifier.safetensors' in capsys.readouterr().err


@pytest.mark.parametrize('argv', [[], ['--workdir=a', '--checkpoint=b']])
def test_one_model_is_asked_for(argv, capsys):
  with pytest.raises(SystemExit) as done:
    main.main(['evaluate', *argv])
  assert done.value.code == 2
  assert '--checkpoint' in capsys.readouterr().err


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, two_devices):
  """A short run on digits."""
  path = tmp_path_factory.mktemp('run')
  config = config_lib.load(demo.digits_config(), SHORT)
  loop.train(config, path, setup=clip_task.prepare(config))
  return path


def _accuracies(path):
  return {
    (row.method, row.benchmark): row.accuracy for row in results.load(path)
  }


def test_a_run_its_checkpoint_and_its_conversion_agree(
  workdir, tmp_path, capsys
):
  assert main.main(['evaluate', f'--workdir={workdir}']) == 0
  of_run = _accuracies(workdir / 'results.json')
  assert len(of_run) == 12  # six models on two benchmarks
  [step] = (workdir / 'checkpoints').glob('[0-9]*')
  target = tmp_path / 'merged'
  convert = ['convert', str(workdir), str(target), '--format=huggingface']
  assert main.main([*convert, '--vision-only']) == 0
  for checkpoint in (workdir, step, target):
    output = tmp_path / 'results.json'
    flags = ['--benchmarks=noise,digits', f'--output={output}']
    assert main.main(['evaluate', f'--checkpoint={checkpoint}', *flags]) == 0
    actual = _accuracies(output)
    assert len(actual) == 2
    for (_, benchmark), accuracy in actual.items():
      merged = [
        value
        for (method, name), value in of_run.items()
        if method.startswith('model_stock') and name == benchmark
      ]
      assert [accuracy] == merged
  assert 'digits' in capsys.readouterr().out


def test_a_run_is_evaluated_on_whatever_devices_there_are(
  workdir, tmp_path, monkeypatch
):
  assert main.main(['evaluate', f'--workdir={workdir}']) == 0
  expected = _accuracies(workdir / 'results.json')
  elsewhere = tmp_path / 'elsewhere'
  shutil.copytree(workdir, elsewhere)
  path = elsewhere / 'config.json'
  config = json.loads(path.read_text())
  config['mesh'] = {'stock': 2, 'fsdp_min_size': 64}  # trained on a pod
  path.write_text(json.dumps(config))
  [device] = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert main.main(['evaluate', f'--workdir={elsewhere}']) == 0
  assert _accuracies(elsewhere / 'results.json') == expected


def test_rows_are_of_the_models_of_the_last_step(workdir, tmp_path, capsys):
  """Averaged here in float64, and asked one after another."""
  flags = ['--benchmarks=validation,digits/test[:50]', '--corruptions']
  output = tmp_path / 'results.json'
  flags.append(f'--output={output}')
  assert main.main(['evaluate', f'--workdir={workdir}', *flags]) == 0
  config = config_lib.load(demo.digits_config(), SHORT)
  [step] = (workdir / 'checkpoints').glob('[0-9]*')
  stack = jax.tree.map(np.float64, runs.read(step, runs.STATE))
  placement = sharding.place()
  anchor, _, _ = clip_task.task(config).load(placement)
  one, two = (jax.tree.map(lambda x, i=i: x[i], stack) for i in (0, 1))
  half = functools.partial(jax.tree.map, lambda x, y: (x + y) / 2)
  models = {
    'zero_shot': anchor,
    'fine_tuned': one,
    'fine_tuned_2': two,
    'uniform_soup': half(one, two),
    'wise_ft_0.5': half(jax.tree.map(np.float64, anchor), one),
    'model_stock_epoch_reset': runs.read(step),
  }
  apply = jax.jit(clip.classifier(config.model.network(), 10).apply)
  expected = {}
  for name, split, kind in [
    (f'{name}@{kind}' if kind else name, split, kind)
    for name, split in [
      ('validation', 'validation[:40]'),
      ('digits/test[:50]', 'test[:50]'),
    ]
    for kind in ('', *corruptions.CORRUPTIONS)
  ]:
    records = list(data.open_source('digits', split))
    images = [data.decode(x['image']) for x in records]
    if kind:
      images = [corruptions.apply(kind, x, i) for i, x in enumerate(images)]
    images = np.stack(images)
    pixels = config.data.normalizer()(jnp.asarray(images))
    labels = np.array([x['label'] for x in records])
    for method, params in models.items():
      params = jax.tree.map(jnp.float32, params)
      right = np.asarray(apply(params, pixels)).argmax(-1) == labels
      expected[method, name] = pytest.approx(right.mean(), abs=1e-9)
  for method in models:
    for name in ('validation', 'digits/test[:50]'):
      shares = [
        expected[method, f'{name}@{kind}'].expected
        for kind in corruptions.CORRUPTIONS
      ]
      mean = pytest.approx(np.mean(shares), abs=1e-7)
      expected[method, f'{name}@mean'] = mean
  assert _accuracies(output) == expected
  out = capsys.readouterr().out
  assert out.splitlines()[0].split()[1:] == [
    'validation',
    'validation@mean',
    'digits/test[:50]',
    'digits/test[:50]@mean',
    'cost',
  ]
  words = ' '.join(out.split())
  assert words.count('the best of 2 single models (95 % interval ') == 4
  assert 'Corrupted: mean over corruptions of the same images.' in words
  paired = differences.load(tmp_path / 'results.differences.json')
  assert len(paired) == 5 * 2 * (1 + 8 + 1)
  for each in paired:
    one, two = (
      expected[method, each.benchmark].expected
      for method in (each.method, each.other)
    )
    assert each.difference == pytest.approx(one - two, abs=1e-7)


def _with_restarts(workdir, target, steps):
  """Copy a run of two steps whose models started again after some of them."""
  shutil.copytree(workdir, target)
  lines = [
    {'step': step, 'kind': 'merge', 'restarts': step in steps}
    for step in (1, 2)
  ]
  (target / 'metrics.jsonl').write_text(
    '\n'.join(map(json.dumps, lines)) + '\n'
  )
  assert main.main(['evaluate', f'--workdir={target}']) == 0
  return results.methods(results.load(target / 'results.json'))


def test_models_that_started_again_are_named_so(workdir, tmp_path, caplog):
  assert _with_restarts(workdir, tmp_path / 'late', [1]) == [
    'zero_shot',
    'fine_tuned_restarted',
    'fine_tuned_2_restarted',
    'uniform_soup_restarted',
    'wise_ft_0.5_restarted',
    'model_stock_epoch_reset',
  ]
  assert 'is not its last' not in caplog.text
  assert _with_restarts(workdir, tmp_path / 'now', [1, 2]) == [
    'zero_shot',
    'model_stock_epoch_reset',
  ]
  assert 'Step 2 of the run is not its last' in caplog.text
  paired = differences.load(tmp_path / 'now' / 'results.differences.json')
  assert {each.other for each in paired} == {'zero_shot'}


def test_a_split_of_other_classes_is_an_error(workdir, capsys):
  flags = [f'--workdir={workdir}', '--benchmarks=glyphs/train']
  assert main.main(['evaluate', *flags]) == 1
  error = capsys.readouterr().err
  assert 'glyphs/train: its classes are not those of the run' in error
  assert "('0', '1', '2'" in error


def test_the_anchor_is_named_by_its_head(workdir, tmp_path, capsys):
  elsewhere = tmp_path / 'probe'
  shutil.copytree(workdir, elsewhere)
  path = elsewhere / 'config.json'
  config = json.loads(path.read_text())
  config['anchor']['head'] = 'linear_probe'
  path.write_text(json.dumps(config))
  assert main.main(['evaluate', f'--workdir={elsewhere}']) == 0
  out = capsys.readouterr().out
  assert 'Linear probe' in out
  assert 'Zero-shot' not in out
  assert main.main(['report', f'--workdir={elsewhere}']) == 0
  page = (elsewhere / 'report.html').read_text('utf-8')
  assert '<th scope="row">Linear probe</th>' in page
  assert '<th scope="row">Zero-shot</th>' not in page
  rows = results.load(elsewhere / 'results.json')
  assert rows[0].method == 'zero_shot'


class Acts:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (os.mkdir, (str(self.path),))


def test_a_workdir_grants_itself_no_trust(workdir, tmp_path, capsys):
  """Its config.json names a pickle, and says that it is to be trusted."""
  elsewhere, acted = tmp_path / 'run', tmp_path / 'acted'
  shutil.copytree(workdir, elsewhere)
  np.save(tmp_path / 'clip.npy', np.array(Acts(acted), object))
  path = elsewhere / 'config.json'
  config = json.loads(path.read_text())
  config['anchor'] |= {
    'weights': str(tmp_path / 'clip.npy'),
    'allow_pickle': True,
  }
  path.write_text(json.dumps(config))
  assert main.main(['evaluate', f'--workdir={elsewhere}']) == 1
  assert 'clip.npy is a pickle' in capsys.readouterr().err
  assert not acted.exists()
  flags = [f'--workdir={elsewhere}', '--allow-pickle']
  assert main.main(['evaluate', *flags]) == 1
  assert acted.exists()  # so it would be, if this command said so


def test_a_run_reads_its_data(workdir, capsys):
  flags = [f'--workdir={workdir}', '--data_dir=/elsewhere']
  assert main.main(['evaluate', *flags]) == 1
  assert '--data_dir=/elsewhere: a run reads its own' in capsys.readouterr().err


def test_all_that_is_missing_is_said_before_anything_is_evaluated(
  workdir, capsys
):
  flags = [f'--workdir={workdir}', '--benchmarks=digits,imagenet_r,objectnet']
  assert main.main(['evaluate', *flags]) == 1
  error = capsys.readouterr().err
  assert 'imagenet_r: no prepared data set' in error
  assert 'objectnet: ' in error


def test_digits_run_is_refused_for_imagenet(workdir, imagenet, capsys):
  assert _evaluate(workdir, imagenet, ['imagenet_v2']) == 1
  assert 'a head of 10 classes, imagenet_v2 has 1000' in capsys.readouterr().err
