import dataclasses
import json
import pathlib

import huggingface_hub
import jax
from jax import numpy as jnp
import numpy as np
import pytest
import tokenizers

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import probe
from modelstock_jax.clip import tokenizer as tokenizer_lib
from modelstock_jax.data import captions
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation as evaluation_lib
from modelstock_jax.training import loop
from modelstock_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]

DIGITS = [
  *('zero', 'one', 'two', 'three', 'four'),
  *('five', 'six', 'seven', 'eight', 'nine'),
]
TEMPLATES = ['a photo of the digit {}.', 'the number {}!', '{} by hand']


def load(config, placement=None):
  """On all devices, unless a placement says otherwise."""
  if placement is None:
    placement = sharding.place(stock=1, batch_size=8)
  return anchor_lib.load(config, placement)


def test_missing_weights_are_named_with_those_that_ship(tiny_config):
  config = tiny_config({'anchor.weights': '/nowhere/w.safetensors'})
  with pytest.raises(
    FileNotFoundError, match=r"anchor.weights: '/nowhere/w.*mini_clip"
  ):
    load(config)


def test_no_weights_at_all(tiny_config):
  with pytest.raises(FileNotFoundError, match=r"anchor.weights: ''"):
    load(tiny_config({'anchor.weights': ''}))


def test_missing_data_set_is_named(tiny_config):
  with pytest.raises(FileNotFoundError, match="'imagenet2012'"):
    load(tiny_config({'data.dataset': 'imagenet2012'}))


def test_weights_of_another_network_are_refused(tiny_config):
  with pytest.raises(
    ValueError, match=r'model.image.width: config 12, weights'
  ):
    load(tiny_config({'model.image.width': 12}))


def test_a_name_is_what_ships(tiny_config):
  config = tiny_config({'anchor.weights': 'mini_clip'})
  assert (
    anchor_lib.weights_path(config.anchor.weights).name
    == 'mini_clip.safetensors'
  )


def test_head_is_the_mean_over_templates(tiny_config):
  """In numpy, class by class, from the text tower's embeddings."""
  config = tiny_config()
  params = load(config)
  model = clip.create(config.model.network())
  like = jax.eval_shape(model.init, jax.random.key(0))
  weights = clip.load_safetensors(config.anchor.weights, like)
  for name in jax.tree.leaves(
    jax.tree.map(
      lambda a, b: bool(jnp.array_equal(a, b)),
      params['image'],
      weights['image'],
    )
  ):
    assert name
  names = [captions.describe(n) for n in data.class_names('digits')]
  for index in (0, 9):
    tokens = captions.tokenize(
      [t.format(names[index]) for t in captions.TEMPLATES]
    )
    texts = np.asarray(model.encode_text(weights, tokens), np.float64)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    mean = texts.mean(0)
    np.testing.assert_allclose(
      params['head']['kernel'][:, index],
      100 * mean / np.linalg.norm(mean),
      rtol=1e-5,
      atol=1e-4,
    )
  assert not np.any(params['head']['bias'])


# A CLIP of another library, with OpenAI's 49,408 tokens.


@pytest.fixture(scope='module')
def network(tiny_config):
  """The network of `tiny_config`, but for the sizes of its text tower."""
  text = clip.TextConfig(
    context_length=77, vocab_size=49408, width=16, depth=1, heads=2
  )
  ours = tiny_config().model.network()
  return dataclasses.replace(ours, text=text)


@pytest.fixture(scope='module')
def params(network):
  return clip.create(network).init(jax.random.key(3))


@pytest.fixture
def folder(network, params, tmp_path):
  """It, as Hugging Face keeps it."""
  clip.save_pretrained(params, tmp_path / 'clip', config=network)
  return tmp_path / 'clip'


@pytest.fixture
def write_prompts(tmp_path):
  def write(name='prompts.json', **changes):
    content = {'names': DIGITS, 'templates': TEMPLATES, **changes}
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path

  return write


@pytest.fixture
def real_config(tiny_config, folder, write_prompts):
  """A config that starts from the folder, with changes."""

  def real(changes=()):
    values = {
      'model.text.context_length': 77,
      'model.text.vocab_size': 49408,
      'model.text.width': 16,
      'anchor.weights': folder,
      'anchor.prompts': write_prompts(),
      **dict(changes),
    }
    return tiny_config(values)

  return real


def assert_head(head, network, params, texts, tokenizer=None):
  """It is that of K lists of texts, by the definition in float64."""
  tokenizer = tokenizer or tokenizer_lib.load_tokenizer()
  model = clip.create(network)
  columns = []
  for individual in texts:
    embeddings = np.float64(model.encode_text(params, tokenizer(individual)))
    embeddings /= np.sqrt((embeddings**2).sum(1, keepdims=True))
    mean = embeddings.mean(0)
    columns.append(100 * mean / np.sqrt((mean**2).sum()))
  np.testing.assert_allclose(
    head['kernel'], np.stack(columns, 1), rtol=1e-5, atol=1e-4
  )
  np.testing.assert_array_equal(head['bias'], np.zeros(len(texts)))


def texts_of(templates):
  return [[t.replace('{}', name) for t in templates] for name in DIGITS]


@pytest.fixture
def one_device():
  """Eight pretended devices cost the linear probe half a minute."""
  return sharding.Placement(_mesh(1))


def _mesh(devices):
  grid = np.array(jax.devices()[:devices]).reshape(1, devices)
  axes = (sharding.STOCK, sharding.DATA)
  return jax.sharding.Mesh(
    grid, axes, axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def equal(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
  )


def test_from_a_folder_and_prompts_of_a_user(real_config, network, params):
  actual = load(real_config())
  assert equal(actual['image'], params['image'])
  assert_head(actual['head'], network, params, texts_of(TEMPLATES))


def test_all_of_it_is_where_it_is_asked_to_be(real_config):
  placement = sharding.place(stock=2, batch_size=8)
  actual = load(real_config(), placement)
  for leaf in jax.tree.leaves(actual):
    assert leaf.dtype == jnp.float32
    assert leaf.sharding.is_equivalent_to(placement.replicated, leaf.ndim)


def test_a_few_texts_give_the_same_bits_on_every_mesh():
  """As a cheap head is kept in no file, and a run may change its devices."""
  config = config_lib.load(ROOT / 'configs' / 'digits.py')
  one, *others = [
    load(config, sharding.Placement(_mesh(devices)))['head']
    for devices in (1, 3, 8)
  ]
  assert all(equal(one, other) for other in others)


def test_chunks_give_what_all_at_once_gives(network, params, monkeypatch):
  templates = [*TEMPLATES, 'a {}', 'one {}']
  texts = [text for individual in texts_of(templates) for text in individual]
  tokens = tokenizer_lib.load_tokenizer()(texts).reshape(10, 5, 77)
  placement = sharding.place(stock=1, batch_size=8)
  model = clip.create(network)
  shapes = []

  def encode(params, tokens):
    shapes.append(tokens.shape)
    return model.encode_text(params, tokens)

  def head():
    traced = model._replace(encode_text=encode)
    shapes.clear()
    return anchor_lib.zero_shot_head(traced, params, tokens, placement)

  complete = head()
  assert shapes == [(50, 77)]
  # In 24, 24 and 2, and that filled up: one program for the three.
  monkeypatch.setattr(anchor_lib, 'CHEAP', 50)
  monkeypatch.setattr(anchor_lib, 'CHUNK', 3)
  chunked = head()
  assert shapes == [(24, 77)]
  np.testing.assert_allclose(
    chunked['kernel'], complete['kernel'], rtol=1e-5, atol=1e-4
  )
  assert_head(
    chunked, network, params, texts_of([*TEMPLATES, 'a {}', 'one {}'])
  )


def test_the_tokenizer_next_to_the_weights(
  real_config, network, params, folder
):
  """Its ids are others than OpenAI's: letters, and no merges."""
  letters = {chr(97 + i): i for i in range(26)}
  letters |= {f'{x}</w>': 26 + i for x, i in letters.items()}
  letters |= {tokenizer_lib.START: 52, tokenizer_lib.END: 53}
  individual = tokenizers.Tokenizer(
    tokenizers.models.BPE(letters, [], end_of_word_suffix='</w>')
  )
  individual.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  individual.save(str(folder / 'tokenizer.json'))
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  assert tokenizer('ab')[0, :4].tolist() == [52, 0, 27, 53]

  elsewhere = folder.parent / 'tokenizer.json'
  (folder / 'tokenizer.json').rename(elsewhere)
  openai = load(real_config())['head']
  assert_head(openai, network, params, texts_of(TEMPLATES))
  named = real_config({'anchor.tokenizer': elsewhere})
  named = load(named)['head']
  assert_head(named, network, params, texts_of(TEMPLATES), tokenizer)
  elsewhere.rename(folder / 'tokenizer.json')
  assert equal(load(real_config())['head'], named)
  assert not equal(openai, named)


def test_all_sizes_that_differ_are_listed(real_config):
  changes = {'model.image.image_size': 12, 'model.text.depth': 2}
  with pytest.raises(ValueError, match='is of another network') as raised:
    load(real_config(changes))
  assert str(raised.value).splitlines()[1:] == [
    '  model.image.image_size: config 12, weights 8',
    '  model.text.depth: config 2, weights 1',
  ]


def test_sizes_that_are_not_set_are_those_of_the_weights(real_config):
  config = real_config()
  assert clip_task.missing_sizes(config.model, config.anchor) == []
  values = config.to_dict()
  values['model'] = {'dtype': 'float32', 'image': {'width': 8}}
  values = config_lib.Config.model_validate_json(json.dumps(values))
  with pytest.raises(ValueError, match=r'model\.\*: .*Set the sizes'):
    values.model.network()
  flags = clip_task.missing_sizes(values.model, values.anchor)
  assert config_lib.override(values, flags) == config


@pytest.mark.parametrize('format', ['huggingface', 'open_clip'])
def test_pixels_that_are_not_set_are_those_of_the_weights(
  format, real_config, tmp_path
):
  path = tmp_path / 'stated'
  path.mkdir()
  if format == 'huggingface':
    stated = {'image_mean': [0.125], 'image_std': [0.5]}
    (path / 'preprocessor_config.json').write_text(json.dumps(stated))
  else:
    stated = {'preprocess_cfg': {'mean': [0.125], 'std': [0.5]}}
    (path / 'open_clip_config.json').write_text(json.dumps(stated))
  config = real_config(
    {'data.mean': None, 'data.std': (0.25,), 'anchor.weights': str(path)}
  )
  flags = clip_task.missing_pixels(config.data, config.anchor, 1)
  filled = config_lib.override(config, flags)
  # What is set stays; the rest is as the weights state it.
  assert filled.data.pixels == ((0.125,), (0.25,))
  assert clip_task.missing_pixels(filled.data, filled.anchor, 1) == []
  zero, one = filled.data.normalizer()(jnp.uint8([[0], [255]]))[:, 0]
  assert (zero, one) == (-0.125 / 0.25, 0.875 / 0.25)
  # Of a run, those that it was trained with.
  step = tmp_path / 'run' / 'checkpoints' / '4'
  (step / 'merged').mkdir(parents=True)
  (tmp_path / 'run' / 'config.json').write_text(filled.to_json())
  config = real_config(
    {'data.mean': None, 'data.std': None, 'anchor.weights': str(step)}
  )
  flags = clip_task.missing_pixels(config.data, config.anchor, 1)
  assert config_lib.override(config, flags).data.pixels == filled.data.pixels


def test_pixels_are_those_of_clip_where_nothing_states_them(
  real_config, tmp_path
):
  weights = tmp_path / 'w.pt'
  weights.write_bytes(b'')
  config = real_config({'data.mean': None, 'data.std': None})
  anchor = config.anchor.model_copy(update={'weights': str(weights)})
  # Of the code of CLIP, clip/clip.py.
  expected = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
  )
  assert config.data.pixels == expected
  flags = clip_task.missing_pixels(config.data, anchor, 3)
  assert config_lib.override(config, flags).data.pixels == expected
  with pytest.raises(ValueError, match='not those of images with 1 channels'):
    clip_task.missing_pixels(config.data, anchor, 1)


def test_pickles_are_read_when_they_are_trusted(tiny_config, tmp_path):
  sizes = {
    f'model.{tower}.{key}': value
    for tower in ('image', 'text')
    for key, value in {'width': 64, 'heads': 1}.items()
  }
  sizes['model.image.channels'] = 3
  network = tiny_config(sizes).model.network()
  params = clip.create(network).init(jax.random.key(0))
  clip.save_pretrained(params, tmp_path / 'clip', 'scenic', config=network)
  values = {**sizes, 'anchor.weights': tmp_path / 'clip' / 'clip.npy'}
  with pytest.raises(ValueError, match=r'anchor\.weights: .*is a pickle'):
    load(tiny_config(values))
  trusted = tiny_config({**values, 'anchor.allow_pickle': True})
  assert equal(load(trusted)['image'], params['image'])


def test_id_of_the_hub(real_config, params, folder, tmp_path, monkeypatch):
  """Write what is made of it to the user's cache, not to the hub's."""
  asked = []

  def snapshot_download(name, **_):
    asked.append(name)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(anchor_lib, 'CHEAP', 30)
  actual = load(real_config({'anchor.weights': 'someone/clip'}))
  assert equal(actual['image'], params['image'])
  assert set(asked) == {'someone/clip'}
  assert not list(folder.glob('zero_shot_head-*'))
  assert list((tmp_path / 'cache/modelstock_jax').glob('zero_shot_head-*'))


# Heads that are kept.


@pytest.fixture
def long_config(real_config, write_prompts):
  """As many texts as make a head worth keeping: 1,000."""
  templates = [f'picture {i} of the digit {{}}' for i in range(100)]
  path = write_prompts('long.json', templates=templates)

  def long(changes=()):
    return real_config({'anchor.prompts': path, **dict(changes)})

  return long


def refuse(*_, **__):
  raise AssertionError('computed again')


def heads_in(folder):
  return sorted(folder.glob('*_head-*'))


def test_a_head_of_few_texts_is_not_kept(real_config, folder):
  before = sorted(folder.iterdir())
  load(real_config())
  assert sorted(folder.iterdir()) == before


def test_a_head_is_computed_once(
  long_config, network, params, folder, monkeypatch
):
  first = load(long_config())
  texts = texts_of([f'picture {i} of the digit {{}}' for i in range(100)])
  assert_head(first['head'], network, params, texts)
  [path] = folder.glob('zero_shot_head-*')
  name, _, key = path.stem.partition('-')
  assert (name, path.suffix) == ('zero_shot_head', '.npy')
  assert len(bytes.fromhex(key)) == 8
  monkeypatch.setattr(anchor_lib, 'zero_shot_head', refuse)
  again = load(long_config())
  assert equal(again, first)


def test_another_head_for_other_prompts_and_weights(
  long_config, network, params, folder, write_prompts
):
  first = load(long_config())['head']
  templates = [f'picture {i} of the number {{}}' for i in range(100)]
  other = write_prompts('other.json', templates=templates)
  other = long_config({'anchor.prompts': other})
  assert not equal(load(other)['head'], first)
  assert len(heads_in(folder)) == 2

  text = params['text']
  text = {**text, 'positional_embedding': 2 * text['positional_embedding']}
  params = {**params, 'text': text}
  changed = folder.with_name('changed')
  clip.save_pretrained(params, changed, config=network)
  for path in heads_in(folder):
    (changed / path.name).write_bytes(path.read_bytes())
  changed = long_config({'anchor.weights': changed})
  actual = load(changed)['head']
  assert not equal(actual, first)
  texts = texts_of([f'picture {i} of the digit {{}}' for i in range(100)])
  assert_head(actual, network, params, texts)


@pytest.mark.parametrize('damage', ['cut', 'empty', 'other shape'])
def test_a_damaged_head_is_made_again(long_config, folder, damage):
  first = load(long_config())
  [path] = heads_in(folder)
  if damage == 'other shape':
    np.save(path, np.ones((8, 9), np.float32))
  else:
    path.write_bytes(path.read_bytes()[:200] if damage == 'cut' else b'')
  assert equal(load(long_config()), first)
  array = np.load(path)
  assert equal({'kernel': array[:-1], 'bias': array[-1]}, first['head'])


def test_what_only_one_process_has_read_is_used_by_none(
  long_config, monkeypatch
):
  """One that has a file must not leave the others alone in a collective."""
  first = load(long_config())
  monkeypatch.setattr(anchor_lib.hosts, 'gather', lambda text: [text, ''])
  made = []
  make = anchor_lib.zero_shot_head
  monkeypatch.setattr(
    anchor_lib, 'zero_shot_head', lambda *a: made.append(a) or make(*a)
  )
  assert equal(load(long_config()), first)
  assert made


def test_where_nothing_can_be_written_next_to_the_weights(
  long_config, folder, tmp_path, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  load(long_config())
  [path] = heads_in(folder)
  # Permissions do not stop the superuser, so a folder stands in the way.
  path.unlink()
  path.mkdir()
  load(long_config())
  assert len(heads_in(tmp_path / 'cache/modelstock_jax')) == 1


def test_a_full_disk_costs_the_file_alone(
  long_config, tmp_path, monkeypatch, caplog
):
  def full(*_):
    raise OSError('no space left on device')

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(np, 'save', full)
  actual = load(long_config())
  assert actual['head']['kernel'].shape == (8, 10)
  assert 'no space left on device' in caplog.text


# The linear probe.


def test_a_linear_probe_is_fitted_to_the_split_it_may_see(
  tiny_config, one_device, monkeypatch
):
  """Check what reaches `probe.linear_probe`, whose tests show what it fits."""
  head = {'kernel': np.ones((8, 10), np.float32), 'bias': np.zeros(10)}
  given = {}

  def linear_probe(train, validation, *, num_classes, sharding):
    del sharding
    given.update(train=train, validation=validation, num_classes=num_classes)
    return probe.Probe(head, 0.1, 0.5, {0.1: 0.5})

  monkeypatch.setattr(probe, 'linear_probe', linear_probe)
  config = tiny_config({'anchor.head': 'linear_probe'})
  params = load(config, one_device)
  assert equal(params['head'], head)
  assert given['num_classes'] == 10
  model = clip.create(config.model.network())
  for name in ('train', 'validation'):
    source = data.open_source('digits', getattr(config.data, name))
    images = np.stack([data.decode(record['image']) for record in source])
    pixels = (images / 255 - 0.3) / 0.37  # of configs/digits.py
    expected = np.float64(model.encode_image(params, np.float32(pixels)))
    expected /= np.sqrt((expected**2).sum(1, keepdims=True))
    features, labels = given[name]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert labels.tolist() == [record['label'] for record in source]


def test_a_linear_probe_beats_the_zero_shot_head_of_the_demo(prepare_on):
  """For 200 digits of the test set's own kind, on the tower that ships."""
  scores = {}
  for head in ('zero_shot', 'linear_probe'):
    flag = f'--config.anchor.head={head}'
    config = config_lib.load(ROOT / 'configs' / 'digits.py', [flag])
    setup = prepare_on(1, config)
    benchmark = data.find_benchmark('digits')
    [scores[head]] = setup.evaluate([setup.anchor], benchmark)
  # The tower was pretrained on printed characters: far above chance.
  assert scores['zero_shot'].accuracy > 0.5
  assert scores['linear_probe'].accuracy > scores['zero_shot'].accuracy + 0.1


def test_a_linear_probe_is_kept(real_config, one_device, folder, monkeypatch):
  def probed(changes=()):
    changes = {'anchor.head': 'linear_probe', **dict(changes)}
    return load(real_config(changes), one_device)

  monkeypatch.setattr(anchor_lib, 'CHEAP', 80)  # 32 + 48 images
  first = probed()
  [path] = heads_in(folder)
  assert path.name.startswith('linear_probe_head-')
  monkeypatch.setattr(evaluation_lib, 'image_features', refuse)
  assert equal(probed(), first)
  for changes in (
    {'data.mean': (0.2,)},
    {'data.train': 'train[:31]'},
    {'data.validation': 'validation[:49]'},
  ):
    with pytest.raises(AssertionError, match='computed again'):
      probed(changes)


def test_a_run_from_a_linear_probe(
  tiny_config, prepare_on, one_device, tmp_path
):
  config = tiny_config({'anchor.head': 'linear_probe', 'train.epochs': 1})
  setup = prepare_on(1, config)
  result = loop.train(config, tmp_path / 'run', setup=setup)
  assert result.step == 4
  # And from what that run left, which has no text tower.
  values = {'anchor.weights': tmp_path / 'run', 'train.epochs': 1}
  with pytest.raises(ValueError, match=r"no text tower.*head='linear_probe'"):
    load(tiny_config(values))
  config = tiny_config({**values, 'anchor.head': 'linear_probe'})
  before = sorted((tmp_path / 'run').rglob('*'))
  actual = load(config, one_device)
  assert equal(actual['image'], result.merged.params['image'])
  assert sorted((tmp_path / 'run').rglob('*')) == before


# Errors.


def test_every_size_that_differs_is_listed(real_config):
  changes = {
    'model.embed_dim': 16,
    'model.image.width': 12,
    'model.activation': 'gelu',
    'model.text.context_length': 9,
  }
  with pytest.raises(ValueError, match='is of another network') as raised:
    load(real_config(changes))
  assert sorted(str(raised.value).splitlines()[1:]) == [
    "  model.activation: config 'gelu', weights 'quick_gelu'",
    '  model.embed_dim: config 16, weights 8',
    '  model.image.width: config 12, weights 8',
    '  model.text.context_length: config 9, weights 77',
  ]


def test_an_image_tower_alone(
  tiny_config, params, network, one_device, tmp_path
):
  path = tmp_path / 'image'
  network = dataclasses.replace(network, text=None)
  clip.save_pretrained({'image': params['image']}, path, config=network)
  with pytest.raises(
    ValueError, match=r"has no text tower.*anchor\.head='linear_probe'"
  ):
    load(tiny_config({'anchor.weights': path}))
  values = {'anchor.weights': path, 'anchor.head': 'linear_probe'}
  actual = load(tiny_config(values), one_device)
  assert equal(actual['image'], params['image'])


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'names': DIGITS[:9]}, 'has 10 classes, but the prompts have 9 names'),
    ({'labels': [*'0123456798']}, "class 8 is '8' in the data set, '9' in the"),
    ({'names': []}, 'names: Tuple should have at least 1 item'),
    (
      {'templates': ['a {} ' + 'very ' * 80]},
      '10 of 10 texts are not strings of at most 77',
    ),
  ],
)
def test_prompts_that_do_not_fit(real_config, write_prompts, changes, words):
  path = write_prompts('wrong.json', **changes)
  with pytest.raises(ValueError, match=f'anchor.prompts: .{path}') as raised:
    load(real_config({'anchor.prompts': path}))
  assert words in str(raised.value)


def test_labels_of_the_data_set_are_accepted(real_config, write_prompts):
  path = write_prompts('labelled.json', labels=[*'0123456789'])
  expected = load(real_config())
  assert equal(load(real_config({'anchor.prompts': path})), expected)


def test_the_names_of_imagenet_are_for_imagenet(real_config):
  with pytest.raises(
    ValueError, match=r"'imagenet': the data set has 10 classes.* 1000 names"
  ):
    load(real_config({'anchor.prompts': 'imagenet'}))


@pytest.mark.parametrize('key', ['anchor.prompts', 'anchor.tokenizer'])
def test_files_that_are_not_there(real_config, key):
  with pytest.raises(FileNotFoundError, match=f'{key}: .*/nowhere/x.json'):
    load(real_config({key: '/nowhere/x.json'}))


def test_captions_and_weights_of_two_vocabularies(
  real_config, tiny_config, write_prompts
):
  with pytest.raises(ValueError, match=r'58 ids, the text tower of .* 49408'):
    load(real_config({'anchor.prompts': 'characters'}))
  config = tiny_config({'anchor.prompts': write_prompts(templates=['{}'])})
  with pytest.raises(ValueError, match=r'49408 ids, the text tower of .* 58'):
    load(config)


def test_the_digest_of_files_is_that_of_what_the_anchor_is_made_of(
  tiny_config, weights, tmp_path
):
  folder, prompts = tmp_path / 'clip', tmp_path / 'prompts.json'
  folder.mkdir()
  (folder / 'model.safetensors').write_bytes(weights.read_bytes())
  prompts.write_text('{}')
  changes = {'anchor.weights': str(folder), 'anchor.prompts': str(prompts)}
  anchor = tiny_config(changes).anchor
  digests = {anchor_lib.digest_files(anchor)}
  # What runs and commands write there.
  for name in ('zero_shot_head-0123456789abcdef.safetensors', 'results.json'):
    (folder / name).write_text('new')
    assert anchor_lib.digest_files(anchor) in digests
  for path in (folder / 'merges.txt', prompts, folder / 'model.safetensors'):
    path.write_text('changed')
    digests.add(anchor_lib.digest_files(anchor))
  assert len(digests) == 4
