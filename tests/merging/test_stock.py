import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (6, 8), 'bias': (8,), 'scale': (), 'conv': (2, 3, 4)}


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def _merge(anchor, models, form, **options):
  """The merge of a family given as a list, a stack, or under jit."""
  if form == 'list':
    return ms.model_stock(anchor, models, **options)
  merge = _jitted if form == 'jit' else ms.model_stock
  return merge(anchor, ms.stack(models), stacked=True, **options)


_jitted = jax.jit(
  ms.model_stock,
  static_argnames=('stacked', 'layers', 'unit', 'average', 'clip'),
)


FORMS = pytest.mark.parametrize('form', ['list', 'stack', 'jit'])
LIST_AND_JIT = pytest.mark.parametrize('form', ['list', 'jit'])
OPTIONS = pytest.mark.parametrize(
  ('form', 'options'),
  [
    ('list', {}),
    ('stack', {'average': 'angle', 'clip': False, 'strength': 1.5}),
    ('jit', {'clip': False, 'strength': 0.5}),
  ],
  ids=str,
)


@pytest.mark.parametrize(
  # agreement 0.1: short leaves come out with negative cosines
  ('num_models', 'agreement', 'form', 'options'),
  [
    (2, 0.7, 'list', {}),
    (2, 0.7, 'stack', {'clip': False}),
    (3, 0.5, 'stack', {}),
    (3, 0.5, 'jit', {'average': 'angle'}),
    (3, 0.1, 'list', {'average': 'angle', 'clip': False, 'strength': 1.5}),
    (5, 0.1, 'list', {'clip': False}),
    (5, 0.1, 'jit', {'strength': 0.5}),
    # many: measured in another way
    (6, 0.5, 'list', {'average': 'angle'}),
    (9, 0.1, 'stack', {'clip': False}),
    (9, 0.7, 'jit', {}),
  ],
  ids=str,
)
def test_layers(make_family, merge_layer, num_models, agreement, options, form):
  shapes = dict(SHAPES)
  if 'average' in options:
    # Angles of scalars are 0 and 180 degrees, where arccos turns the last
    # digit of a float32 cosine into 5e-4.
    del shapes['scale']
  anchor, models = make_family(shapes, num_models, agreement=agreement)
  merged = _merge(anchor, models, form, **options)
  for name in shapes:
    params, cosine, ratio = merge_layer(
      anchor[name], [m[name] for m in models], **options
    )
    assert merged.cosine[name].shape == ()
    _close(merged.cosine[name], cosine)
    _close(merged.ratio[name], ratio)
    _close(merged.params[name], params)


@OPTIONS
@pytest.mark.parametrize('axis', [-1, 0])
def test_filters(make_family, merge_layer, axis, options, form):
  anchor, models = make_family(SHAPES, 3)
  merged = _merge(
    anchor,
    models,
    form,
    unit='filter',
    layers=lambda path, leaf: ms.Layer(filter_axis=axis),
    **options,
  )
  for name in ('kernel', 'conv'):
    leaves = [np.moveaxis(x[name], axis, 0) for x in (anchor, *models)]
    params = np.moveaxis(np.asarray(merged.params[name]), axis, 0)
    assert merged.cosine[name].shape == (len(params),)
    for i in range(len(params)):
      expected, cosine, ratio = merge_layer(
        leaves[0][i], [leaf[i] for leaf in leaves[1:]], **options
      )
      _close(merged.cosine[name][i], cosine)
      _close(merged.ratio[name][i], ratio)
      _close(params[i], expected)


@LIST_AND_JIT
def test_leaves_of_one_axis_are_one_filter(make_family, merge_layer, form):
  anchor, models = make_family(SHAPES, 3)
  merged = _merge(anchor, models, form, unit='filter')
  for name in ('bias', 'scale'):
    params, cosine, _ = merge_layer(anchor[name], [m[name] for m in models])
    assert merged.cosine[name].shape == ()
    _close(merged.cosine[name], cosine)
    _close(merged.params[name], params)


@OPTIONS
def test_complete_model(make_family, merge_layer, options, form):
  anchor, models = make_family(SHAPES, 3, agreement=0.3)
  merged = _merge(anchor, models, form, unit='model', **options)
  flat = [
    np.concatenate([x[name].ravel() for name in SHAPES])
    for x in (anchor, *models)
  ]
  params, cosine, ratio = merge_layer(flat[0], flat[1:], **options)
  got = np.concatenate([np.ravel(merged.params[name]) for name in SHAPES])
  _close(got, params)
  for name in SHAPES:
    _close(merged.cosine[name], cosine)
    _close(merged.ratio[name], ratio)


def _attention(path, leaf):
  for name in ('query', 'key', 'value'):
    if f'/{name}/' in path:
      return ms.Layer(group=path.replace(name, 'qkv'))
  return None


@LIST_AND_JIT
def test_query_key_and_value_share_a_cosine(make_family, merge_layer, form):
  names = ('query', 'key', 'value')
  flat_anchor, flat_models = make_family(
    {
      **{f'{name}/kernel': (6, 2, 3) for name in names},
      **{f'{name}/bias': (2, 3) for name in names},
      'out/kernel': (6, 6),
    },
    3,
    agreement=0.2,
  )

  def nest(flat):
    return {
      'attention': {
        name: {k.split('/')[1]: x for k, x in flat.items() if name in k}
        for name in (*names, 'out')
      }
    }

  merged = _merge(
    nest(flat_anchor),
    [nest(m) for m in flat_models],
    form,
    layers=_attention,
  )
  for kind in ('kernel', 'bias'):
    # what PyTorch holds as one in_proj tensor
    fused = [
      np.stack([x[f'{name}/{kind}'] for name in names])
      for x in (flat_anchor, *flat_models)
    ]
    params, cosine, ratio = merge_layer(fused[0], fused[1:])
    for i, name in enumerate(names):
      _close(merged.cosine['attention'][name][kind], cosine)
      _close(merged.ratio['attention'][name][kind], ratio)
      _close(merged.params['attention'][name][kind], params[i])
  params, cosine, _ = merge_layer(
    flat_anchor['out/kernel'], [m['out/kernel'] for m in flat_models]
  )
  _close(merged.cosine['attention']['out']['kernel'], cosine)
  _close(merged.params['attention']['out']['kernel'], params)


@pytest.mark.parametrize(
  ('form', 'axis'), [('list', 0), ('stack', 1), ('jit', 0), ('jit', -1)]
)
def test_layers_of_a_scan_keep_their_cosines(
  make_family, merge_layer, axis, form
):
  anchor, models = make_family({'kernel': (4, 5, 6)}, 3)
  merged = _merge(
    anchor, models, form, layers=lambda path, leaf: ms.Layer(axes=(axis,))
  )
  leaves = [np.moveaxis(x['kernel'], axis, 0) for x in (anchor, *models)]
  params = np.moveaxis(np.asarray(merged.params['kernel']), axis, 0)
  assert merged.cosine['kernel'].shape == (len(params),)
  for i in range(len(params)):
    expected, cosine, ratio = merge_layer(
      leaves[0][i], [leaf[i] for leaf in leaves[1:]]
    )
    _close(merged.cosine['kernel'][i], cosine)
    _close(merged.ratio['kernel'][i], ratio)
    _close(params[i], expected)


@LIST_AND_JIT
def test_groups_of_scanned_layers(make_family, merge_layer, form):
  # three layers scanned on axis 0, q and k in one group: three cosines
  anchor, models = make_family({'q': (3, 4, 5), 'k': (3, 4)}, 2)
  merged = _merge(
    anchor,
    models,
    form,
    layers=lambda path, leaf: ms.Layer(group='qk', axes=(0,)),
  )
  for i in range(3):
    joined = [
      np.concatenate([x['q'][i].ravel(), x['k'][i].ravel()])
      for x in (anchor, *models)
    ]
    params, cosine, _ = merge_layer(joined[0], joined[1:])
    for name in ('q', 'k'):
      _close(merged.cosine[name][i], cosine)
    _close(merged.params['q'][i].ravel(), params[:20])
    _close(merged.params['k'][i], params[20:])


@LIST_AND_JIT
def test_filters_of_scanned_layers(make_family, merge_layer, form):
  anchor, models = make_family({'kernel': (3, 4, 5)}, 2)
  merged = _merge(
    anchor,
    models,
    form,
    unit='filter',
    layers=lambda path, leaf: ms.Layer(axes=(0,)),
  )
  assert merged.cosine['kernel'].shape == (3, 5)
  for i, j in np.ndindex(3, 5):
    params, cosine, _ = merge_layer(
      anchor['kernel'][i, :, j], [m['kernel'][i, :, j] for m in models]
    )
    _close(merged.cosine['kernel'][i, j], cosine)
    _close(merged.params['kernel'][i, :, j], params)


def test_layers_sees_paths_and_leaves(make_family):
  anchor, models = make_family({'a': (2, 3), 'b': (4,)})
  seen = {}
  ms.model_stock(
    {'block_0': [anchor]},
    [{'block_0': [m]} for m in models],
    layers=lambda path, leaf: seen.update({path: leaf.shape}),
  )
  assert seen == {'block_0/0/a': (2, 3), 'block_0/0/b': (4,)}


@LIST_AND_JIT
def test_displacement_cosine_is_that_of_the_merge(make_family, form):
  anchor, models = make_family(SHAPES, 3)
  merged = _merge(anchor, models, form, unit='filter', average='angle')
  cosines = ms.displacement_cosine(
    anchor, models, unit='filter', average='angle'
  )
  for name in SHAPES:
    _close(cosines[name], merged.cosine[name])


def test_strength_zero_is_the_anchor(make_family):
  anchor, models = make_family(SHAPES)
  merged = ms.model_stock(anchor, models, strength=0.0)
  jax.tree.map(np.testing.assert_array_equal, merged.params, anchor)


def test_strength_may_be_traced(make_family):
  anchor, models = make_family(SHAPES)
  sweep = jax.vmap(
    lambda strength: ms.model_stock(anchor, models, strength=strength).params
  )(jnp.array([0.0, 0.5, 1.0]))
  for i, strength in enumerate((0.0, 0.5, 1.0)):
    one = ms.model_stock(anchor, models, strength=strength).params
    jax.tree.map(lambda x, y, i=i: _close(x[i], y), sweep, one)


# Where a displacement vanishes, cancels or repeats.


@pytest.mark.parametrize(
  ('form', 'clip', 'average'),
  [
    ('list', True, 'cosine'),
    ('stack', False, 'angle'),
    ('jit', False, 'cosine'),
  ],
)
def test_a_layer_nobody_moved_stays(make_family, clip, average, form):
  anchor, models = make_family({'a': (3, 4), 'b': (5,)}, 3)
  for model in models:
    model['a'] = anchor['a']
  merged = _merge(anchor, models, form, clip=clip, average=average)
  np.testing.assert_array_equal(merged.params['a'], anchor['a'])
  assert merged.ratio['a'] == 0
  assert merged.ratio['b'] != 0
  assert np.all(np.asarray(merged.params['b']) != anchor['b'])


@pytest.mark.parametrize(
  ('form', 'clip', 'average'),
  [
    ('list', True, 'cosine'),
    ('stack', False, 'angle'),
    ('jit', False, 'cosine'),
  ],
)
def test_a_layer_one_of_two_moved_stays(make_family, clip, average, form):
  anchor, models = make_family({'a': (3, 4)}, 2)
  models[1] = anchor
  merged = _merge(anchor, models, form, clip=clip, average=average)
  _close(merged.params['a'], anchor['a'])
  assert merged.cosine['a'] == pytest.approx(0, abs=1e-7)


@LIST_AND_JIT
def test_a_layer_two_of_three_moved(make_family, merge_layer, form):
  # the pairs with the third count as orthogonal, the one left does not
  anchor, models = make_family({'a': (30, 40)}, 3, agreement=0.9)
  models[1] = anchor
  merged = _merge(anchor, models, form)
  params, cosine, _ = merge_layer(anchor['a'], [m['a'] for m in models])
  assert 0.25 < cosine < 1 / 3
  _close(merged.cosine['a'], cosine)
  _close(merged.params['a'], params)


@LIST_AND_JIT
@pytest.mark.parametrize('num_models', [2, 4])
def test_identical_models_are_returned(make_family, num_models, form):
  anchor, models = make_family(SHAPES, num_models)
  merged = _merge(anchor, [models[0]] * num_models, form)
  eps = float(jnp.finfo(jnp.float32).eps)
  for name in SHAPES:
    assert abs(merged.cosine[name] - 1) <= 2 * eps
    assert abs(merged.ratio[name] - 1) <= 2 * eps
    np.testing.assert_allclose(
      merged.params[name], models[0][name], rtol=2 * eps, atol=2 * eps
    )


@pytest.mark.parametrize(
  ('form', 'clip', 'num_models'),
  [
    ('list', True, 2),
    ('list', False, 2),
    ('stack', True, 3),
    ('stack', False, 3),
    ('jit', False, 2),
    ('jit', False, 4),
  ],
)
def test_opposite_models_give_the_anchor(num_models, clip, form):
  # a regular simplex about the anchor: pairwise cosine -1 / (N - 1), the
  # pole of t, and displacements that add up to zero
  for seed in range(10):
    rng = np.random.default_rng(seed)
    corners = np.linalg.qr(rng.normal(size=(50, num_models)))[0].T
    corners -= corners.mean(axis=0)
    anchor = {'w': rng.normal(size=50).astype(np.float32)}
    models = [
      {'w': (anchor['w'] + 0.5 * step).astype(np.float32)} for step in corners
    ]
    merged = _merge(anchor, models, form, clip=clip)
    assert merged.cosine['w'] == pytest.approx(-1 / (num_models - 1), abs=1e-6)
    assert merged.ratio['w'] == 0
    np.testing.assert_array_equal(merged.params['w'], anchor['w'])


def test_clip_holds_a_layer_that_turned_apart(make_family, merge_layer):
  anchor, models = make_family({'w': (20,)}, 2, agreement=0.0)
  models[1]['w'] = anchor['w'] - 0.5 * (models[0]['w'] - anchor['w'])
  models[1]['w'][0] += 1
  clipped = ms.model_stock(anchor, models)
  raw = ms.model_stock(anchor, models, clip=False)
  assert raw.cosine['w'] < -0.2
  assert clipped.cosine['w'] == raw.cosine['w']
  assert clipped.ratio['w'] == 0
  np.testing.assert_array_equal(clipped.params['w'], anchor['w'])
  params, _, ratio = merge_layer(
    anchor['w'], [m['w'] for m in models], clip=False
  )
  assert ratio < -0.2
  _close(raw.ratio['w'], ratio)
  _close(raw.params['w'], params)


@LIST_AND_JIT
def test_tiny_displacements_are_not_lost(make_family, merge_layer, form):
  # 1e-10 from a bias that starts at zero: mergekit's floor takes it for none
  _, models = make_family({'bias': (50,)}, 2, scale=1.0, agreement=0.5)
  anchor = {'bias': np.zeros(50, np.float32)}
  models = [{'bias': m['bias'] * np.float32(1e-10)} for m in models]
  merged = _merge(anchor, models, form)
  params, cosine, _ = merge_layer(anchor['bias'], [m['bias'] for m in models])
  _close(merged.cosine['bias'], cosine)
  np.testing.assert_allclose(merged.params['bias'], params, rtol=1e-5)


def test_leaves_without_elements():
  tree = {'empty': jnp.zeros((0, 3)), 'w': jnp.ones(2)}
  merged = ms.model_stock(tree, [tree, tree])
  assert merged.params['empty'].shape == (0, 3)
  assert merged.cosine['empty'] == 0


# Dtypes.


@FORMS
@pytest.mark.parametrize(
  ('dtype', 'precision'),
  [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11), (jnp.float32, 2**-22)],
)
def test_dtypes(make_family, merge_layer, dtype, precision, form):
  anchor, models = jax.tree.map(
    lambda x: jnp.asarray(x, dtype), make_family({'w': (30, 40)}, 3)
  )
  merged = _merge(anchor, models, form)
  assert merged.params['w'].dtype == dtype
  assert merged.cosine['w'].dtype == jnp.float32
  assert merged.ratio['w'].dtype == jnp.float32
  params, cosine, ratio = merge_layer(anchor['w'], [m['w'] for m in models])
  # statistics in float32 whatever the dtype, one rounding at the end
  _close(merged.cosine['w'], cosine)
  _close(merged.ratio['w'], ratio)
  np.testing.assert_allclose(
    merged.params['w'].astype(jnp.float32), params, rtol=precision, atol=1e-6
  )


@LIST_AND_JIT
def test_float64(x64, make_family, merge_layer, form):
  anchor, models = jax.tree.map(
    lambda x: x.astype(np.float64), make_family({'w': (30, 40)}, 3)
  )
  models = [{'w': m['w'] + 1e-12} for m in models]
  merged = _merge(anchor, models, form)
  params, cosine, ratio = merge_layer(anchor['w'], [m['w'] for m in models])
  assert merged.params['w'].dtype == jnp.float64
  assert merged.cosine['w'].dtype == jnp.float64
  np.testing.assert_allclose(merged.cosine['w'], cosine, rtol=1e-12)
  np.testing.assert_allclose(merged.ratio['w'], ratio, rtol=1e-12)
  np.testing.assert_allclose(merged.params['w'], params, rtol=1e-12)


@LIST_AND_JIT
def test_a_group_of_several_dtypes(x64, make_family, merge_layer, form):
  dtypes = {'a': jnp.bfloat16, 'b': jnp.float32, 'c': jnp.float64}
  cast = make_family(dict.fromkeys(dtypes, (40,)), 2)
  anchor, models = (
    {k: jnp.asarray(x, dtypes[k]) for k, x in cast[0].items()},
    [{k: jnp.asarray(x, dtypes[k]) for k, x in m.items()} for m in cast[1]],
  )
  merged = _merge(anchor, models, form, unit='model')
  flat = [
    np.concatenate([np.asarray(x[k], np.float64) for k in dtypes])
    for x in (anchor, *models)
  ]
  _, cosine, _ = merge_layer(flat[0], flat[1:])
  for name, dtype in dtypes.items():
    assert merged.params[name].dtype == dtype
    _close(merged.cosine[name], cosine)


# Reports.


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('clip', [True, False])
def test_not_finite_names_the_leaf(make_family, bad, clip):
  anchor, models = make_family({'a': (3,), 'b': (2, 2), 'c': (4,)})
  models[1]['b'][1, 0] = bad
  merged = ms.model_stock({'block': anchor}, [{'block': m} for m in models])
  assert ms.not_finite(merged) == ['block/b']
  assert not np.isfinite(merged.cosine['block']['b'])
  assert np.isfinite(merged.cosine['block']['a'])
  assert ms.describe(merged).startswith('not finite: block/b\n')


def test_not_finite_of_a_good_merge(make_family):
  anchor, models = make_family(SHAPES)
  assert ms.not_finite(ms.model_stock(anchor, models)) == []


def test_describe(make_family):
  # two right-angled steps, then two equal ones: cosines 0 and 1
  anchor = {'apart': jnp.zeros((2, 1)), 'near': jnp.zeros(2), 'n': jnp.int32(3)}
  right, up = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
  models = [
    {'apart': step[:, None], 'near': right, 'n': jnp.int32(3)}
    for step in (right, up)
  ]
  assert ms.describe(ms.model_stock(anchor, models)).split('\n') == [
    'leaf   cosine  ratio',
    'apart   0.000  0.000',
    'near    1.000  1.000',
  ]


def test_describe_takes_the_mean_over_filters():
  anchor = {'w': jnp.zeros((2, 2))}
  models = [
    {'w': jnp.array([[1.0, 1.0], [0.0, 0.0]])},
    {'w': jnp.array([[1.0, 0.0], [0.0, 1.0]])},
  ]
  # columns: equal, and at right angles
  merged = ms.model_stock(anchor, models, unit='filter')
  assert ms.describe(merged).split('\n')[1].split() == ['w', '0.500', '0.500']


# Bad options; trees that differ are in test_trees.py.


@pytest.mark.parametrize(
  'strength',
  [None, 'x', 1j, True, [1.0], jnp.ones(2), np.nan, np.inf, jnp.float32('nan')],
)
def test_strength_is_one_finite_number(strength):
  trees = [{'w': jnp.ones(3) * i} for i in range(3)]
  with pytest.raises(
    ValueError,
    match=r'^strength: must be one finite number, '
    r'got \S.*\.$',
  ):
    ms.model_stock(trees[0], trees[1:], strength=strength)


@pytest.mark.parametrize('call', [ms.model_stock, ms.displacement_cosine])
@pytest.mark.parametrize(
  ('option', 'value', 'known'),
  [('unit', 'tensor', 'filter'), ('average', 'mean', 'angle')],
)
def test_unknown_option(call, option, value, known):
  with pytest.raises(ValueError, match=f'{option}: .*{known}.*{value}'):
    call(jnp.zeros(2), [jnp.zeros(2)] * 2, **{option: value})


@pytest.mark.parametrize('axis', [2, -3])
@pytest.mark.parametrize('field', ['axes', 'filter_axis'])
def test_axis_that_is_not_there(axis, field):
  layer = ms.Layer(**{field: (axis,) if field == 'axes' else axis})
  with pytest.raises(ValueError, match=rf'w: .*axis {axis}.*\(2, 3\)'):
    ms.model_stock(
      {'w': jnp.zeros((2, 3))},
      [{'w': jnp.zeros((2, 3))}] * 2,
      layers=lambda path, leaf: layer,
      unit='filter',
    )


def test_layers_of_a_wrong_type():
  with pytest.raises(ValueError, match=r"w: .*ms.Layer.*got 'qkv'"):
    ms.model_stock(
      {'w': jnp.zeros(2)},
      [{'w': jnp.zeros(2)}] * 2,
      layers=lambda path, leaf: 'qkv',
    )


def test_a_group_of_unlike_stacks():
  tree = {'k': jnp.zeros((4, 2)), 'q': jnp.zeros((3, 2))}
  with pytest.raises(ValueError, match=r'q: .*with k.*\(3,\).*of k is \(4,\)'):
    ms.model_stock(
      tree, [tree, tree], layers=lambda path, leaf: ms.Layer('qk', (0,))
    )


@pytest.fixture(scope='module')
def merged():
  """Two blocks, by hand: cosines 0 and 1, so ratios 0 and 1; a bias at 3/5."""
  zeros = np.zeros(2, np.float32)
  ends = {
    'block_0/kernel': ([1, 0], [0, 1]),
    'block_1/kernel': ([1, 0], [2, 0]),
    'bias': ([1, 0], [3, 4]),
  }
  models = [
    {name: np.float32(end[i]) for name, end in ends.items()} for i in range(2)
  ]
  return ms.model_stock(dict.fromkeys(ends, zeros), models)


def test_a_merge_is_short_to_print(merged):
  """For two models t = 2 c / (1 + c); the means are 1.6 / 3 and 1.75 / 3."""
  assert repr(merged) == (
    'Merged(3 leaves: cosine 0.533 (0.000 to 1.000), ratio 0.583 (0.000 to '
    '1.000))'
  )


def test_a_merge_is_a_table_in_notebooks(merged):
  assert merged._repr_markdown_().splitlines()[2:] == [
    '| leaves | number | cosine | ratio |',
    '|:--|--:|--:|--:|',
    '| bias | 1 | 0.600 | 0.750 |',
    '| block_*/kernel | 2 | 0.500 (0.000 to 1.000) | 0.500 (0.000 to 1.000) |',
  ]


def test_a_table_of_many_kinds_ends(merged):
  names = [chr(97 + i) for i in range(23)]
  cosine = dict.fromkeys(names, jnp.float32(0.5))
  lines = ms.Merged({}, cosine, cosine)._repr_markdown_().splitlines()
  assert len(lines) == 4 + 20 + 1
  assert lines[-1] == '| ... 3 more | | | |'


def test_a_merge_without_values_can_be_printed(merged):
  traced = []
  jax.jit(lambda x: traced.append(repr(x)))(merged)
  shapes = repr(jax.eval_shape(lambda: merged))
  for text in (*traced, shapes, repr(ms.Merged({}, None, None))):
    assert text.startswith('Merged(')
