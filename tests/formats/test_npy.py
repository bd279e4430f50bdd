"""Archives that NumPy wrote: what is found in them, and what is refused."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.formats import npy


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_arrays_of_an_archive(arrays, same, tmp_path, save):
  arrays |= {
    'params/w': np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4),
    'transposed': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'none': np.zeros((3, 0), np.int32),
  }
  save(tmp_path / 'a.npz', **arrays)
  same(npy.read_archive(tmp_path / 'a.npz'), arrays)


def _archive(path, **members):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in members.items():
      archive.writestr(f'{name}.npy', data)


def _bytes(array, write=np.save):
  file = io.BytesIO()
  write(file, array)
  return file.getvalue()


WHOLE = _bytes(np.arange(3.0))


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (_bytes(np.array([print], object)), r"w.npy has the dtype '\|O'"),
    (_bytes(np.arange(3.0).astype('>f8')), "w.npy has the dtype '>f8'"),
    (_bytes(np.array(['x'])), "w.npy has the dtype '<U1'"),
    (_bytes(np.zeros(2, [('a', 'f4')])), 'w.npy has the dtype'),
    (WHOLE[:-1], 'w.npy has another size'),
    (WHOLE.replace(b'(3,)', b'(9,)'), 'w.npy has another size'),
    (WHOLE.replace(b'(3,), ', b'(-3,),'), 'w.npy has another size'),
    (WHOLE.replace(b'(3,)', b'(x,)'), 'is not a complete .npz of arrays'),
    (WHOLE[:9], 'is not a complete .npz of arrays'),
    (WHOLE.replace(b'NUMPY\1', b'NUMPY\7'), 'is not a complete .npz of arrays'),
    (b'text', 'is not a complete .npz of arrays'),
  ],
)
def test_members_that_are_refused(tmp_path, data, message):
  path = tmp_path / 'a.npz'
  _archive(path, w=data)
  with pytest.raises(ValueError, match=message) as error:
    npy.read_archive(path)
  assert str(error.value).startswith(f'{path} is not a complete .npz')
  assert '\n' not in str(error.value)


def test_an_archive_that_is_damaged(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez_compressed(path, w=np.random.default_rng(0).normal(size=50_000))
  data = path.read_bytes()
  for stop in range(0, len(data), 40_000):
    path.write_bytes(data[:stop])
    with pytest.raises(ValueError, match='is not a complete'):
      npy.read_archive(path)
  middle = len(data) // 2
  path.write_bytes(data[:middle] + b'\0\0' + data[middle + 2 :])
  with pytest.raises(ValueError, match=r'a.npz cannot be read: w.npy: '):
    npy.read_archive(path)['w'].load()
