import json
import pathlib

import pytest

from modelstock_jax.report import results


def test_file_holds_plain_dicts_and_gives_the_rows_back(rows, tmp_path):
  path = tmp_path / 'results.json'
  results.save(rows, path)
  assert results.load(path) == rows
  assert json.loads(path.read_text())[0] == {
    'method': 'fine_tuned',
    'benchmark': 'digits',
    'seed': 0,
    'accuracy': 0.9,
    'n': 100,
    'num_classes': None,
  }
  assert [file.name for file in tmp_path.iterdir()] == ['results.json']


def test_save_that_fails_leaves_the_old_file(rows, tmp_path, monkeypatch):
  path = tmp_path / 'results.json'
  results.save(rows, path)

  def write_half(self, text, **options):
    with self.open('w', **options) as file:
      file.write(text[: len(text) // 2])
    raise OSError('No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_text', write_half)
  with pytest.raises(OSError, match='No space left'):
    results.save(rows[:2], path)
  assert results.load(path) == rows


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'accuracy': 90.0},
      'rows, 0, accuracy: .* less than or equal to 1, got 90',
    ),
    ({'accuracy': float('nan')}, 'accuracy: .* got nan'),
    ({'accuracy': '0.9'}, "accuracy: .* valid number, got '0.9'"),
    ({'n': 0}, 'n: .* greater than or equal to 1, got 0'),
    ({'seed': 0.5}, 'seed: .* valid integer, got 0.5'),
    ({'method': 3}, 'method: .* valid string, got 3'),
    ({'n': 99}, r'differs from other rows .* n, num_classes: \(99, None\)'),
    ({'num_classes': 200}, r'n, num_classes: \(100, 200\)'),
    ({'num_classes': 0}, 'num_classes: .* greater than or equal to 1'),
    ({'num_classes': 10.0}, 'num_classes: .* valid integer'),
    ({'seed': 1}, 'stands there twice'),
  ],
)
def test_rows_are_checked(rows, tmp_path, change, message):
  rows[0] = rows[0]._replace(**change)
  path = tmp_path / 'results.json'
  with pytest.raises(ValueError, match=message):
    results.save(rows, path)
  assert not path.exists()
  path.write_text(json.dumps([row._asdict() for row in rows]))
  with pytest.raises(ValueError, match=message) as error:
    results.load(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[{"method": "a"', 'does not hold results'),
    ('{}', 'rows: .* valid list'),
    ('[]', 'no rows'),
    ('[{"method": "a"}]', 'rows, 0, benchmark: Field required'),
  ],
)
def test_load_says_what_is_wrong(tmp_path, text, message):
  path = tmp_path / 'results.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    results.load(path)


def test_load_of_no_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='there is no such file'):
    results.load(tmp_path / 'results.json')
