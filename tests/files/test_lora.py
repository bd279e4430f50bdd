"""Model Stock of LoRA adapters, against the dense merge in float64."""

import itertools
import json
import re

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files
from modelstock_jax.cli import main
from modelstock_jax.merging import options as options_lib

PREFIX = 'base_model.model.'
QUERY, KEY = 'model.layers.0.q_proj', 'model.layers.0.k_proj'
CONV, EMBED = 'model.conv', 'model.embed_tokens'
MODULES = (QUERY, KEY, CONV, EMBED)
NORM, HEAD = 'model.norm.weight', 'head.weight'


def _dense(folder):
  """The displacements of an adapter in float64, by peft's rules."""
  config = json.loads((folder / 'adapter_config.json').read_text())
  stored = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
  dense = {}
  for module in MODULES:
    kind = 'lora_embedding_{}' if module == EMBED else 'lora_{}.weight'
    a, b = (
      np.float64(stored[f'{PREFIX}{module}.{kind.format(letter)}'])
      for letter in 'AB'
    )
    rank = len(a)
    alpha = config['lora_alpha']
    for pattern, value in config.get('alpha_pattern', {}).items():
      if re.match(rf'(.*\.)?({pattern})$', module):
        alpha = value
        break
    wanted = config['r']
    for pattern, value in config.get('rank_pattern', {}).items():
      if re.match(rf'(.*\.)?({pattern})$', module):
        wanted = value
        break
    assert rank == wanted  # peft makes the parameters of this rank
    root = rank**0.5 if config.get('use_rslora') else rank
    step = alpha / root * np.tensordot(b.reshape(-1, rank), a, 1)
    turned = config['fan_in_fan_out'] or module == EMBED
    dense[f'{module}.weight'] = step.T if turned else step
  return dense


def _oracle(steps, *, axis=None, clip=True, average='cosine', joint=()):
  """Equation 3 in float64 of displacements; rows apart if axis is 0."""

  def flat(step):
    return step.reshape(1 if axis is None else len(step), -1)

  merged, cosines = {}, {}
  for name in steps[0]:
    names = joint if name in joint else [name]
    parts = [np.concatenate([flat(s[n]) for n in names], 1) for s in steps]
    values = [
      np.sum(one * two, 1)
      / np.linalg.norm(one, axis=1)
      / np.linalg.norm(two, axis=1)
      for one, two in itertools.combinations(parts, 2)
    ]
    cosine = np.mean(values, axis=0)
    if average == 'angle':
      cosine = np.cos(np.mean(np.arccos(values), axis=0))
    cosines[name] = cosine
    cosine = np.clip(cosine, 0, 1) if clip else cosine
    t = len(steps) * cosine / (1 + (len(steps) - 1) * cosine)
    mean = sum(s[name] for s in steps) / len(steps)
    merged[name] = t.reshape(-1, *(1,) * (mean.ndim - 1)) * mean
  return merged, cosines


def _close(actual, expected):
  assert actual.keys() >= expected.keys()
  for name, array in expected.items():
    size = np.max(np.abs(array))
    np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize(
  ('ranks', 'config', 'options'),
  [
    ((3, 3), {}, {}),
    ((2, 1, 3), {'use_rslora': True}, {'average': 'angle'}),
    ((3, 3), {'alpha_pattern': {'^model.conv': 2, 'proj': 9, 'k_.*': 1}}, {}),
    ((2, 3), {}, {'unit': 'filter', 'clip': False}),
  ],
)
def test_the_merge_is_an_adapter(
  save_adapters, tmp_path, ranks, config, options
):
  _, folders = save_adapters(ranks, **config)
  steps = [_dense(folder) for folder in folders]
  options = options_lib.StockOptions(**options)
  # The base is named alone: no weight of it is needed.
  merged = files.merge(
    'someone/base', folders, tmp_path / 'out', options=options
  )
  axis = 0 if options.unit == 'filter' else None
  expected, cosines = _oracle(
    steps, axis=axis, clip=options.clip, average=options.average
  )
  _close(_dense(tmp_path / 'out'), expected)
  for name, cosine in cosines.items():
    np.testing.assert_allclose(
      np.ravel(merged.cosine[name]), cosine, rtol=0, atol=1e-6
    )
  written = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert written['r'] == written['lora_alpha'] == sum(ranks)
  first = json.loads((folders[0] / 'adapter_config.json').read_text())
  for key in ('base_model_name_or_path', 'target_modules', 'peft_type'):
    assert written[key] == first[key]
  report = json.loads((tmp_path / 'out' / 'model_stock.json').read_text())
  assert report['anchor'] == 'someone/base'
  assert report['tensors'].keys() == expected.keys()


def test_adapters_of_a_torch_file(save_adapters, tmp_path):
  _, folders = save_adapters(form='bin')
  files.merge('someone/base', folders, tmp_path / 'out')
  for folder in folders:
    (folder / 'adapter_model.bin').unlink()
  for path in tmp_path.glob('[ab]*'):
    path.rename(tmp_path / f'old_{path.name}')
  _, folders = save_adapters()
  expected, _ = _oracle([_dense(folder) for folder in folders])
  _close(_dense(tmp_path / 'out'), expected)


def test_modules_that_share_a_cosine(save_adapters, tmp_path):
  _, folders = save_adapters()
  layers = r'(.*)[.][qk]_proj[.](.*)'
  files.merge('someone/base', folders, tmp_path / 'out', layers=layers)
  joint = [f'{QUERY}.weight', f'{KEY}.weight']
  expected, _ = _oracle([_dense(folder) for folder in folders], joint=joint)
  _close(_dense(tmp_path / 'out'), expected)


def test_weights_that_are_stored_turned(save_adapters, tmp_path):
  """As those of transformers' Conv1D."""
  shapes = dict.fromkeys(MODULES, (8, 6))
  _, folders = save_adapters(shapes=shapes, fan_in_fan_out=True)
  options = options_lib.StockOptions('filter')
  files.merge('someone/base', folders, tmp_path / 'out', options=options)
  expected, _ = _oracle([_dense(folder) for folder in folders], axis=0)
  _close(_dense(tmp_path / 'out'), expected)


@pytest.mark.parametrize('rank', [2, 5, 6, 40])
def test_truncated_to_a_rank(save_adapters, tmp_path, rank, capsys):
  """It is the best approximation (Eckart and Young), of a known error."""
  _, folders = save_adapters()
  arguments = ['merge', '--anchor=someone/base', '--models', *map(str, folders)]
  out = tmp_path / 'out'
  assert main.main([*arguments, f'--output={out}', f'--rank={rank}']) == 0
  merged, _ = _oracle([_dense(folder) for folder in folders])
  errors, expected = {}, {}
  for name, array in merged.items():
    u, values, v = np.linalg.svd(array.reshape(len(array), -1), False)
    kept = (u[:, :rank] * values[:rank]) @ v[:rank]
    expected[name] = kept.reshape(array.shape)
    errors[name] = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
  _close(_dense(out), expected)
  report = json.loads((out / 'model_stock.json').read_text())
  for name, error in errors.items():
    assert report['error'][name] == pytest.approx(error, rel=1e-5, abs=1e-12)
  worst = max(report['error'].values())
  assert (worst == 0) == (rank >= 6)
  assert f'Rank {rank} loses at most {worst:.3g} of' in capsys.readouterr().out


@pytest.mark.parametrize('rank', [None, 1])
def test_no_product_is_made(tmp_path, rank):
  """The full weights would take 720 GB; the base is not even there."""
  size, name = 300_000, 'base_model.model.layer.lora_{}.weight'
  rng = np.random.default_rng(0)
  shared, *noise = rng.normal(size=(3, 2, size))
  factors = [np.float32(shared + 0.5 * each) for each in noise]
  for number, (a, b) in enumerate(factors):
    (tmp_path / str(number)).mkdir()
    arrays = {name.format('A'): a[None], name.format('B'): b[:, None]}
    file = tmp_path / str(number) / 'adapter_model.safetensors'
    safetensors.numpy.save_file(arrays, file)
    config = {'peft_type': 'LORA', 'r': 1, 'lora_alpha': 1}
    config['base_model_name_or_path'] = 'some/base'
    path = tmp_path / str(number) / 'adapter_config.json'
    path.write_text(json.dumps(config))
  paths = [tmp_path / '0', tmp_path / '1']
  merged = files.merge('some/base', paths, tmp_path / 'out', rank=rank)
  (a, b), (c, d) = np.float64(factors)
  norms = np.prod([np.linalg.norm(x) for x in (a, b, c, d)])
  cosine = (a @ c) * (b @ d) / norms
  [actual] = merged.cosine.values()
  np.testing.assert_allclose(actual, cosine, rtol=1e-6)
  file = tmp_path / 'out' / 'adapter_model.safetensors'
  shapes = {x.shape for x in safetensors.numpy.load_file(file).values()}
  assert shapes == {(rank or 2, size), (size, rank or 2)}


@pytest.mark.parametrize('form', ['dense', 'added', 'mixed'])
def test_full_weights(save_adapters, tmp_path, form):
  base, folders = save_adapters((2, 3))
  weights = safetensors.numpy.load_file(base / 'model.safetensors')
  steps = [_dense(folder) for folder in folders]
  models = folders
  if form == 'added':
    models = [f'{base}+{folder}' for folder in folders]
  if form == 'mixed':
    added = {name: weights[name] + steps[1].get(name, 0) for name in weights}
    (tmp_path / 'full').mkdir()
    safetensors.numpy.save_file(
      {name: np.float32(array) for name, array in added.items()},
      tmp_path / 'full' / 'model.safetensors',
    )
    models = [folders[0], tmp_path / 'full']
  out = tmp_path / 'out'
  merged = files.merge(base, models, out, dense=form == 'dense')
  written = safetensors.numpy.load_file(out / 'model.safetensors')
  expected, _ = _oracle(steps)
  for name in (NORM, HEAD):
    np.testing.assert_array_equal(written[name], weights[name])
  _close(written, {n: weights[n] + step for n, step in expected.items()})
  if form != 'mixed':  # what no adapter changes has no cosine
    assert merged.cosine.keys() == expected.keys()
  assert (out / 'config.json').read_text() == '{"vocab_size": 20}'


def test_the_base_is_one_of_float16(save_adapters, tmp_path):
  """What is added is rounded once, at the end."""
  base, folders = save_adapters()
  path = base / 'model.safetensors'
  weights = safetensors.numpy.load_file(path)
  halves = {name: np.float16(array) for name, array in weights.items()}
  safetensors.numpy.save_file(halves, path)
  files.merge(base, folders, tmp_path / 'out', dense=True)
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  expected, _ = _oracle([_dense(folder) for folder in folders])
  for name, step in expected.items():
    wanted = (halves[name].astype(np.float64) + step).astype(np.float16)
    assert np.mean(written[name] == wanted) > 0.99, name


def test_modules_that_are_stored_whole(save_adapters, tmp_path):
  base, folders = save_adapters(stored=[HEAD], modules_to_save=['head'])
  with pytest.raises(FileNotFoundError, match=r"\['head\.weight'\] .*modules_"):
    files.merge('someone/base', folders, tmp_path / 'out')
  files.merge(base, folders, tmp_path / 'out')
  stored = [
    safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
    for folder in (*folders, tmp_path / 'out')
  ]
  weights = safetensors.numpy.load_file(base / 'model.safetensors')
  *models, merged = (np.float64(each[PREFIX + HEAD]) for each in stored)
  steps = [{HEAD: model - weights[HEAD]} for model in models]
  expected, _ = _oracle(steps)
  _close({HEAD: merged}, {HEAD: weights[HEAD] + expected[HEAD]})
  expected, _ = _oracle([_dense(folder) for folder in folders])
  _close(_dense(tmp_path / 'out'), expected)


def test_embeddings_below_their_adapter(save_adapters, tmp_path):
  """peft stores the embeddings too, where an adapter changes them."""
  base, folders = save_adapters()
  weights = safetensors.numpy.load_file(base / 'model.safetensors')
  name = f'{PREFIX}{EMBED}.base_layer.weight'
  for folder in folders:
    file = folder / 'adapter_model.safetensors'
    stored = safetensors.numpy.load_file(file)
    stored[name] = weights[f'{EMBED}.weight']
    safetensors.numpy.save_file(stored, file)
  files.merge(base, folders, tmp_path / 'out')
  out = tmp_path / 'out' / 'adapter_model.safetensors'
  merged = safetensors.numpy.load_file(out)
  np.testing.assert_array_equal(merged[name], weights[f'{EMBED}.weight'])
  expected, _ = _oracle([_dense(folder) for folder in folders])
  _close(_dense(tmp_path / 'out'), expected)


def test_names_of_a_base_inside_another_model(save_adapters, tmp_path):
  """The base of GPT-2 on the hub lacks the 'transformer.' of its modules."""
  base, folders = save_adapters()
  path = base / 'model.safetensors'
  weights = safetensors.numpy.load_file(path)
  inner = {n.removeprefix('model.'): array for n, array in weights.items()}
  safetensors.numpy.save_file(inner, path)
  files.merge(base, folders, tmp_path / 'out', dense=True)
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  expected, _ = _oracle([_dense(folder) for folder in folders])
  _close(
    {f'model.{name}': array for name, array in written.items()},
    {n: weights[n] + step for n, step in expected.items()},
  )


def test_the_common_part(save_adapters, edit_adapter, tmp_path):
  """Rows of a vocabulary that grew, and modules that one adapter lacks."""
  _, folders = save_adapters()
  names = [f'{PREFIX}{EMBED}.lora_embedding_{x}' for x in 'AB']
  stored = folders[1] / 'adapter_model.safetensors'
  a, b = (safetensors.numpy.load_file(stored)[name] for name in names)
  gone = [f'{PREFIX}{QUERY}.lora_{x}.weight' for x in 'AB']
  grown = {names[0]: np.tile(a, (1, 2))}
  edit_adapter(folders[1], grown | dict.fromkeys(gone))
  out = tmp_path / 'out'
  merged = files.merge('someone/base', folders, out, common=True)
  assert merged.left_out == [f'{QUERY}.weight']
  assert merged.cut == {f'{EMBED}.weight': 20}
  written = safetensors.numpy.load_file(out / 'adapter_model.safetensors')
  steps = []
  for folder in folders:
    each = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
    a, b = (np.float64(each[name]) for name in names)
    steps.append({EMBED: 5 / 3 * (b @ a[:, :20]).T})
  a, b = (np.float64(written[name]) for name in names)
  _close({EMBED: (b @ a).T}, _oracle(steps)[0])
