"""JSON that others wrote, and values in messages."""

import pytest

from modelstock_jax.formats import text


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'{', 'Expecting'),
    (b'[' * 101 + b']' * 101, 'nested more than 100 deep'),
    (b'[' * 10**4 + b']' * 10**4, 'nested more than 100 deep'),
    (b'[' * 10**6 + b']' * 10**6, 'more than 100000 values'),
    (b'[' + b'[],' * 10**5 + b'0]', 'more than 100000 values'),
    (b'{"a": {"b": 1, "b": 2}}', "key 'b' stands twice"),
    (b'\xff', "can't decode"),
    (b'1' * 5000, 'Exceeds the limit'),
  ],
)
def test_json_that_is_refused(data, message, tmp_path):
  path = tmp_path / 'file.json'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    text.read_json(path)


def test_json_that_is_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(text, 'MAX_BYTES', 5)
  path = tmp_path / 'file.json'
  path.write_text('[1,2]')
  assert text.read_json(path) == [1, 2]
  path.write_text('[1, 2]')
  with pytest.raises(ValueError, match='6 bytes, more than 5'):
    text.read_json(path)


@pytest.mark.parametrize(
  'value',
  ['\x1b[31m\n', 'x' * 10**6, ['\n'] * 10**5, {'a': [[[[1]]]] * 99}, 10**4000],
)
def test_values_become_one_short_line(value):
  line = text.shown(value)
  assert line.isprintable()
  assert len(line) <= 200


def test_a_line_is_short():
  assert text.line(ValueError('a\nb')) == 'ValueError: a'
  assert text.line(KeyError()) == 'KeyError'
  line = text.line(OSError('a' * 10000 + ' No space left on device'))
  assert len(line) < 420
  assert line.startswith('OSError: aaa')
  assert line.endswith('No space left on device')
  spec = """ [tensorstore_spec='{"driver": "zarr"}'] [os_error_code='13']"""
  assert (
    text.line(OSError('Forbidden' + spec))
    == "OSError: Forbidden [os_error_code='13']"
  )
