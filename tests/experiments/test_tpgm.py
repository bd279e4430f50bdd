import signal

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import tpgm

from modelstock_jax.training import loop

ANCHOR = {
  'image': {'kernel': np.zeros((3, 2)), 'bias': np.array([1.0, -1.0])},
  'head': {'kernel': np.ones((2, 2))},
}
PARAMS = {
  'image': {
    'kernel': np.array([[1.0, 0.1], [-2.0, 0.2], [1.0, -0.1]]),
    'bias': np.array([1.5, -3.0]),
  },
  'head': {'kernel': np.full((2, 2), 3.0)},
}


def _f32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_radii_begin_at_half_of_the_least_row():
  # Rows of a kernel are its columns, of norms 4 and 0.4; a bias is one row.
  radii = tpgm.start(_f32(ANCHOR), _f32(PARAMS), ('head',))
  assert set(radii) == {'image'}
  assert float(radii['image']['kernel']) == pytest.approx(0.2, rel=1e-6)
  assert float(radii['image']['bias']) == pytest.approx(1.25, rel=1e-6)


def test_projection_is_that_of_the_paper():
  radii = _f32({'image': {'kernel': 1.0, 'bias': 0.5}})
  projected = tpgm.project(_f32(ANCHOR), _f32(PARAMS), radii)
  kernel = PARAMS['image']['kernel'] * np.array([1 / 4, 1.0])  # one is inside
  moved = PARAMS['image']['bias'] - ANCHOR['image']['bias']
  bias = ANCHOR['image']['bias'] + 0.5 / 2.5 * moved
  np.testing.assert_allclose(projected['image']['kernel'], kernel, rtol=1e-6)
  np.testing.assert_allclose(projected['image']['bias'], bias, rtol=1e-6)
  np.testing.assert_array_equal(projected['head']['kernel'], 3.0)


def test_radii_go_down_the_loss_and_stay_in_bounds():
  """Adam's first step is its rate, against the sign of the slope."""
  target = {'kernel': np.zeros((3, 2)), 'bias': PARAMS['image']['bias']}

  def loss(params, xp):
    return sum(
      xp.sum((params['image'][name] - target[name]) ** 2) for name in target
    )

  def projected(radius):  # in float64
    kernel = PARAMS['image']['kernel'] * np.minimum(
      radius['kernel'] / np.array([4.0, 0.4]), 1
    )
    moved = PARAMS['image']['bias'] - ANCHOR['image']['bias']
    bias = ANCHOR['image']['bias'] + min(radius['bias'] / 2.5, 1) * moved
    return {'image': {'kernel': kernel, 'bias': bias}}

  radius = {'kernel': 1.0, 'bias': 1.25}
  expected = {}
  for name in radius:
    high, low = (
      loss(projected({**radius, name: radius[name] + e}), np)
      for e in (1e-6, -1e-6)
    )
    expected[name] = radius[name] - 0.01 * np.sign(high - low)
  assert expected == {'kernel': 0.99, 'bias': 1.26}
  radii = _f32({'image': radius})
  learnt, _ = tpgm.learn(
    lambda p: loss(p, jnp),
    _f32(ANCHOR),
    _f32(PARAMS),
    radii,
    tpgm.adam().init(radii),
  )
  for name, value in expected.items():
    assert float(learnt['image'][name]) == pytest.approx(value, rel=1e-5)
  # At the greatest norm it goes no further, and can come back.
  for bound, sign, after in ((2.5, 1, 2.5), (2.5, -1, 2.49), (1e-8, -1, 1e-8)):
    radii = _f32({'image': {'kernel': 1.0, 'bias': bound}})
    learnt, _ = tpgm.learn(
      lambda p, s=sign: -s * jnp.sum(p['image']['bias'][:1]),
      _f32(ANCHOR),
      _f32(PARAMS),
      radii,
      tpgm.adam().init(radii),
    )
    assert float(learnt['image']['bias']) == pytest.approx(after, rel=1e-5)


@pytest.fixture(scope='module')
def short():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tpgm, 'STEPS', 20)
    yield


def _kernels(models):
  return np.asarray(models['image']['block_0']['mlp']['fc']['kernel'])


def test_a_run_ends_on_its_balls(
  short,
  tiny_config,
  prepare_baseline,
  read_run,
  assert_identical,
  tmp_path,
  setup,
):
  config, projected = prepare_baseline('tpgm.py')
  result = loop.train(config, tmp_path / 'a', setup=projected)
  free = loop.train(
    tiny_config({'merge.every': 'end'}), tmp_path / 'free', setup=setup
  )
  anchor = _kernels(projected.anchor)
  moved, freely = (
    np.abs(_kernels(r.models) - anchor).sum(1) for r in (result, free)
  )
  assert (moved <= freely * (1 + 1e-5)).all()
  assert (moved < 0.99 * freely).any()
  # All rows of a layer obey one radius, those inside excepted.
  for rows, before in zip(moved, freely, strict=True):
    cut = rows < before * (1 - 1e-4)
    np.testing.assert_allclose(rows[cut], rows[cut].max(), rtol=1e-4)
    assert (rows[~cut] <= rows[cut].max() * (1 + 1e-4)).all()
  np.testing.assert_array_equal(
    result.models['head']['kernel'], free.models['head']['kernel']
  )

  # Cut off, it ends the same; and so does each model alone.
  def interrupted(*args):
    interrupted.calls += 1
    if interrupted.calls == 7:
      signal.raise_signal(signal.SIGTERM)
    return projected.programs.train(*args)

  interrupted.calls = 0
  programs = projected.programs._replace(train=interrupted)
  with pytest.raises(loop.Interrupted):
    loop.train(
      config, tmp_path / 'b', setup=projected._replace(programs=programs)
    )
  loop.train(config, tmp_path / 'b', setup=projected)
  runs = [read_run(config, tmp_path / name, projected) for name in ('a', 'b')]
  for run in runs:
    del run['metrics']
  assert_identical(*runs)
  alone, setup = prepare_baseline('tpgm.py', {'merge.num_models': 1})
  single = loop.train(alone, tmp_path / 'alone', setup=setup)
  np.testing.assert_allclose(
    _kernels(single.models)[0] - anchor,
    _kernels(result.models)[0] - anchor,
    atol=2e-3 * np.abs(_kernels(result.models)[0] - anchor).max(),
  )
