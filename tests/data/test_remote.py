import pytest

from modelstock_jax.data import remote


def test_remote_path_hands_results_and_errors_on():
  assert remote.with_timeout('gs://bucket', lambda: 5) == 5
  with pytest.raises(KeyError, match='absent'):
    remote.with_timeout('gs://bucket', lambda: {}['absent'])

  def missing():
    raise ImportError('Please install gcsfs')

  with pytest.raises(
    ImportError, match=r'gs://bucket .*install gcsfs.*gcsfuse'
  ):
    remote.with_timeout('gs://bucket', missing)
