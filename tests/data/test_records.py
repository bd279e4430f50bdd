import numpy as np
import pytest

from modelstock_jax.data import records


def _halves(name='halves', length=4, class_names=()):
  arrays = {'x': np.arange(length) / 2, 'pair': np.zeros((length, 2), np.int32)}
  return records.ArraySource(name, arrays, class_names)


def test_arrays_are_records():
  source = _halves(class_names=('a', 'b'))
  assert (source.name, source.class_names) == ('halves', ('a', 'b'))
  assert [record['x'] for record in source] == [0.0, 0.5, 1.0, 1.5]
  assert source[3]['pair'].tolist() == [0, 0]
  for index in (-1, 4):
    with pytest.raises(IndexError, match=rf'halves\[{index}\]: it has 4'):
      source[index]


@pytest.mark.parametrize(
  'arrays', [{}, {'x': np.zeros(3), 'y': np.zeros(4)}, {'x': np.float32(1)}]
)
def test_arrays_of_several_lengths(arrays):
  with pytest.raises(ValueError, match='bad: arrays have the shapes'):
    records.ArraySource('bad', arrays)


def test_chain_is_one_source_after_another():
  chain = records.Chain([_halves(name) for name in ('one', 'two', 'three')])
  assert chain.name == 'one to three'
  assert [record['x'] for record in chain] == [0.0, 0.5, 1.0, 1.5] * 3
  with pytest.raises(IndexError, match='12 records'):
    chain[12]


@pytest.mark.parametrize('other', [{'length': 3}, {'class_names': ('a',)}])
def test_chain_of_different_sources(other):
  with pytest.raises(ValueError, match=r'other has \d records, halves has 4'):
    records.Chain([_halves(), _halves('other', **other)])
