import re
import sys

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
    absolute = re.search(rb'(^|[\s"\'=])/\w+/\w+', path.read_bytes())
    if path.suffix in ('.json', '.txt'):
      assert absolute is None, (path, absolute)


def test_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with pytest.raises(ModuleNotFoundError, match=r'\[prepare\]'):
    prepare.prepare('digits', tmp_path)
