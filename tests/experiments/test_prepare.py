import re
import shutil
import sys

from array_record.python import array_record_module
import pytest

from experiments.digits import builders
from experiments.digits import prepare
from modelstock_jax.data import sources

FILES = [path for path in sources.BUNDLED_DIR.rglob('*') if path.is_file()]


def test_prepared_files_are_small_and_few():
  assert sum(path.stat().st_size for path in FILES) < 1_000_000
  shards = [path for path in FILES if 'array_record' in path.name]
  assert len(shards) == 5  # one per split
  assert {path.relative_to(sources.BUNDLED_DIR).parts[0] for path in FILES} == (
    builders.BUILDERS.keys()
  )


def test_prepared_files_hold_no_path():
  for path in FILES:
    # An absolute path: a slash after a quote, blank, equals sign or nothing.
    found = re.search(rb'(^|[\s"\'=])/\w+/\w+', path.read_bytes())
    if path.suffix in ('.json', '.txt'):
      assert found is None, (path, found)


def test_copy_does_not_differ(tmp_path):
  shutil.copytree(sources.BUNDLED_DIR, tmp_path / 'copy')
  for dataset in builders.BUILDERS:
    difference = prepare.first_difference(
      dataset, tmp_path / 'copy', sources.BUNDLED_DIR
    )
    assert difference is None


def test_first_difference_is_named(tmp_path):
  shutil.copytree(sources.BUNDLED_DIR, tmp_path / 'copy')
  (path,) = (tmp_path / 'copy').glob('digits/*/digits-validation.*')
  records = array_record_module.ArrayRecordReader(str(path)).read_all()
  records[17], records[27] = records[27], records[17]  # of one class
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:16')
  for record in records:
    writer.write(record)
  writer.close()
  difference = prepare.first_difference(
    'digits', tmp_path / 'copy', sources.BUNDLED_DIR
  )
  assert difference is not None
  assert difference.startswith("digits/validation[17]['image']")


def test_missing_split_is_named(tmp_path):
  shutil.copytree(sources.BUNDLED_DIR, tmp_path / 'copy')
  info = tmp_path / 'copy' / 'digits' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('"validation"', '"val"'))
  difference = prepare.first_difference(
    'digits', tmp_path / 'copy', sources.BUNDLED_DIR
  )
  assert difference is not None
  assert 'splits' in difference


def test_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with pytest.raises(ModuleNotFoundError, match=r'\[train,prepare\]'):
    prepare.prepare('digits', tmp_path)
