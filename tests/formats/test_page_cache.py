"""The page cache of Linux."""

import os

import pytest

from modelstock_jax.formats import page_cache


def test_half_of_the_memory(monkeypatch):
  sizes = {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': 1000}
  monkeypatch.setattr(os, 'sysconf', sizes.get)
  assert page_cache.holds(2_048_000)
  assert not page_cache.holds(2_048_001)


@pytest.mark.skipif(not hasattr(os, 'RWF_NOWAIT'), reason='needs Linux')
def test_dropped_pages_are_not_in_memory(tmp_path):
  """Read without waiting for the disk: pages that are not in memory fail."""
  path, buffer = tmp_path / 'data', bytearray(4096)
  path.write_bytes(bytes(4 * 4096))
  with path.open('rb') as file:
    os.fsync(file.fileno())

    def in_memory():
      try:
        return bool(os.preadv(file.fileno(), [buffer], 0, os.RWF_NOWAIT))
      except BlockingIOError:
        return False

    try:
      assert in_memory()
    except OSError:
      pytest.skip('the file system does not tell')
    page_cache.drop(file.fileno(), 4096, 8192)
    assert in_memory()
    page_cache.drop(file.fileno())
    if in_memory():
      pytest.skip('the file system is in memory')
    assert file.read() == bytes(4 * 4096)
