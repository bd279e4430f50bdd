"""Controls of the merges: their defining properties, and a tiny run."""

import itertools
import pathlib
import shutil

from flax import traverse_util
import jax
import numpy as np
import pytest

from experiments import shrinkage
from experiments.geometry import ablations
from experiments.geometry import gram as gram_lib
from modelstock_jax.training import clip_task

# Layers as they are merged, and their kinds.
QKV = [f'image/block_0/attention/{x}/kernel' for x in ('query', 'key', 'value')]
LAYERS = {
  'attention': [QKV, ['image/block_0/attention/out/kernel']],
  'mlp': [[f'image/block_{i}/mlp/fc/kernel'] for i in range(3)],
  'norm': [[f'image/block_{i}/ln_1/scale'] for i in range(4)],
}
NUMBER = 4


@pytest.fixture(scope='module')
def seeds():
  """The anchor, and three times eight models, with noise of its own a layer."""
  rng = np.random.default_rng(0)
  anchor, families = {}, [[{} for _ in range(8)] for _ in range(3)]
  for layer in itertools.chain(*LAYERS.values()):
    signal, noise = rng.uniform(0.05, 0.3, 2)
    for path in layer:
      shape = (12,) if 'ln_1' in path else (12, 12)
      anchor[path] = rng.normal(size=shape).astype(np.float32)
      shared = anchor[path] + signal * rng.normal(size=shape)
      for model in itertools.chain(*families):
        step = noise * rng.normal(size=shape)
        model[path] = (shared + step).astype(np.float32)
  return traverse_util.unflatten_dict(anchor, sep='/'), [
    [traverse_util.unflatten_dict(m, sep='/') for m in models]
    for models in families
  ]


@pytest.fixture(scope='module')
def merged(seeds):
  anchor, families = seeds
  return [shrinkage.merge(anchor, models) for models in families]


def _steps(anchor, params):
  """Displacements of layers in float64, by name of the first leaf."""
  w0, w = gram_lib.by_path(anchor), gram_lib.by_path(params)
  return {
    layer[0]: np.concatenate(
      [np.ravel(np.asarray(w[path], np.float64) - w0[path]) for path in layer]
    )
    for layer in itertools.chain(*LAYERS.values())
  }


def _by_name(merge, factors):
  """Factors by the name of the first leaf."""
  names = [layer.name.replace('/qkv/', '/query/') for layer in merge.layers]
  return dict(zip(names, factors, strict=True))


def _total(anchor, params):
  return np.sqrt(sum(x @ x for x in _steps(anchor, params).values()))


def _ratios(anchor, models):
  """t = N c / (1 + (N - 1) c) of the mean cosine of pairs, in float64."""
  steps = [_steps(anchor, model) for model in models]
  ratios = {}
  for name in steps[0]:
    units = [x[name] / np.linalg.norm(x[name]) for x in steps]
    n = len(units)
    pairs = [units[i] @ units[j] for i in range(n) for j in range(i)]
    cosine = np.mean(pairs).clip(0, 1)
    ratios[name] = n * cosine / (1 + (n - 1) * cosine)
  return ratios


def _controls(merged, method, number):
  first, *others = (each[method, number] for each in merged)
  return first, shrinkage.controls(first, others, seed=5)


def test_factors_of_model_stock_are_its_ratios(seeds, merged):
  anchor, families = seeds
  merge, rows = _controls(merged, 'Model Stock', NUMBER)
  expected = _ratios(anchor, families[0][:NUMBER])
  assert np.ptp(list(expected.values())) > 0.1  # else all factors would do
  actual = _by_name(merge, rows['factors'][0])
  assert actual.keys() == expected.keys()
  for name, ratio in expected.items():
    assert actual[name] == pytest.approx(ratio, rel=1e-4), name
  for models, factors in zip(
    families[1:], rows['factors of other seeds'], strict=True
  ):
    expected = _ratios(anchor, models[:NUMBER])
    for name, factor in _by_name(merge, factors).items():
      assert factor == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize(
  ('method', 'number'), [('MonoSoup', 1), ('Model Stock', 2), ('YOYO-Scale', 2)]
)
def test_matched_controls_have_the_displacement_of_the_merge(
  seeds, merged, method, number
):
  anchor, families = seeds
  merge, rows = _controls(merged, method, number)
  group = [_steps(anchor, model) for model in families[0][:number]]
  means = {name: np.mean([x[name] for x in group], axis=0) for name in group[0]}
  wanted = _total(anchor, merge.params)
  length = np.sqrt(sum(x @ x for x in means.values()))
  matched = [name for name in rows if name.endswith(', matched')]
  assert len(matched) == 3
  for name in [*matched, 'factors']:
    for factors in rows[name]:
      scaled = shrinkage.scale(anchor, merge.base, factors)
      assert _total(anchor, scaled) == pytest.approx(wanted, rel=1e-5), name
      for layer, factor in _by_name(merge, factors).items():
        np.testing.assert_allclose(
          _steps(anchor, scaled)[layer], factor * means[layer], atol=1e-6
        )
    lengths = merge.length(rows[name])
    np.testing.assert_allclose(lengths, wanted / length, rtol=1e-5)
  np.testing.assert_allclose(
    rows['one factor, matched'], wanted / length, rtol=1e-5
  )
  steps = _steps(anchor, merge.params)
  for layer, factor in _by_name(merge, rows['factors'][0]).items():
    of_layer = np.linalg.norm(steps[layer]) / np.linalg.norm(means[layer])
    assert factor == pytest.approx(of_layer, rel=1e-4), layer


def test_permutations_keep_the_factors_of_a_kind(merged):
  merge, rows = _controls(merged, 'Model Stock', NUMBER)
  [factors] = rows['factors']
  original = _by_name(merge, factors)
  draws = rows['factors, permuted within kinds']
  assert len(draws) == shrinkage.DRAWS
  for draw in draws:
    permuted = _by_name(merge, draw)
    for kind, layers in LAYERS.items():
      names = [layer[0] for layer in layers]
      assert sorted(permuted[name] for name in names) == sorted(
        original[name] for name in names
      ), kind
  assert any((draw != factors).any() for draw in draws)
  for draw in rows['factors, permuted, matched']:
    ratio = np.sort(draw) / np.sort(factors)  # of one number
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert not np.allclose(draw / factors, ratio[0])
  randoms = rows['random factors, matched']
  assert len(np.unique(randoms)) == randoms.size


def test_a_run(tmp_path, geometry_flags, monkeypatch, capsys):
  devices = jax.devices()[:1]  # eight cost time to compile for
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  monkeypatch.setattr(
    shrinkage, 'METHODS', {'MonoSoup': (1,), 'Model Stock': (2,)}
  )
  monkeypatch.setattr(shrinkage, 'ALPHAS', np.array([0.5, 1]))
  monkeypatch.setattr(
    shrinkage, 'FLAGS', ['--config.merge.num_models=2', *shrinkage.FLAGS[1:]]
  )
  monkeypatch.setattr(ablations, 'ON_TEST', ablations.ON_TEST[:2])
  monkeypatch.setattr(ablations, 'ON_VALIDATION', ablations.ON_VALIDATION[:2])
  measured, measure = [], ablations.measure

  def recorded(setup, models, benchmarks):
    result = measure(setup, models, benchmarks)
    measured.append(({spec.split for spec in benchmarks}, result))
    return result

  monkeypatch.setattr(ablations, 'measure', recorded)
  # In the place of a second anchor, whose pretraining has a test.
  flags = geometry_flags()
  weights = pathlib.Path(flags[-1].partition('=')[2])
  shutil.copy(weights, tmp_path / 'anchor_1.safetensors')
  prepare, setups = clip_task.prepare, []

  def prepared(config):
    # Compiled once: the second anchor is another by its weights alone.
    setups.append(setups[0] if setups else prepare(config))
    other = jax.tree.map(lambda x: 1.1 * x, setups[0].anchor)
    pretrained = config.anchor.weights == str(tmp_path / 'anchor_1.safetensors')
    return setups[0]._replace(anchor=other) if pretrained else setups[0]

  monkeypatch.setattr(clip_task, 'prepare', prepared)
  arguments = ['shrinkage', f'--workdir={tmp_path}', '--seeds=2', *flags]
  monkeypatch.setattr('sys.argv', arguments)
  shrinkage.main()
  # Two anchors of two seeds, chosen on validation before any test.
  splits = [split for split, _ in measured]
  assert splits == [{'validation'}] * 4 + [{'test'}] * 4
  printed = capsys.readouterr().out
  for number in (1, 2):
    for name, part in (('digits', slice(1)), ('digits and shifts', slice(2))):
      values = [
        np.mean([each[str(number), a][part] for _, each in measured[:4]])
        for a in (0.5, 1.0)
      ]
      best = (0.5, 1.0)[int(np.argmax(values))]
      assert f'of {number}, by {name}: {best}' in printed
  tables = printed.split('both anchors')[1].split('\n\n')
  rows = [line.split(' | ') for line in tables[2].splitlines()[2:]]
  of_stock = {row[0].strip('| '): row[1:] for row in rows}
  stocks = [result['Model Stock', 2][:, 0] for _, result in measured[4:]]
  for i in range(2):
    assert of_stock['Model Stock'][i] == f'{np.mean(stocks, 0)[i]:.2f}'
    assert of_stock['Model Stock'][3 + i].startswith('+0.00 ± 0.00')
  assert of_stock['average of 2'][2] == '1.00'

  def fail(*_):
    raise AssertionError('trained again')

  monkeypatch.setattr(shrinkage.loop.setup_lib, 'read_batches', fail)
  again = shrinkage.train(tmp_path, 2, flags)
  assert [len(runs) for runs in again.values()] == [2, 2]
