"""Hashes of the files of a checkpoint."""

import pytest

from modelstock_jax.formats import hashes


def test_a_manifest_that_another_process_is_writing(tmp_path):
  """It is no file of the checkpoint, although it lies there for a moment."""
  data = tmp_path / 'state' / 'd' / 'data'
  data.parent.mkdir(parents=True)
  data.write_bytes(b'weights')
  partial = tmp_path / '.sha256.process_1.txt.partial' / 'sha256.process_1.txt'
  partial.parent.mkdir()
  partial.write_text('')
  hashes.write(tmp_path, 0)
  partial.unlink()
  hashes.verify(tmp_path)
  data.write_bytes(b'other')
  with pytest.raises(hashes.DamagedFileError, match='its hash differs'):
    hashes.verify(tmp_path)
