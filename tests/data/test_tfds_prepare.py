import importlib.util
import types

from etils import epath
import pytest
import tensorflow_datasets as tfds

from modelstock_jax.data import benchmarks
from modelstock_jax.data import tfds_prepare

needs_no_tensorflow = pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='TensorFlow is installed',
)


def test_data_sets_of_a_benchmark():
  corrupted = benchmarks.find_benchmark('imagenet_c').datasets
  assert len(corrupted) == 75
  assert corrupted[0] == 'imagenet2012_corrupted/gaussian_noise_1'


def test_objectnet_is_not_prepared(tmp_path):
  with pytest.raises(ValueError, match=r'nothing is prepared.*objectnet-1\.0'):
    tfds_prepare.prepare('objectnet', tmp_path)


@needs_no_tensorflow
def test_tensorflow_is_asked_for(tmp_path):
  with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[prepare\]'"):
    tfds_prepare.prepare('imagenet_r', tmp_path)


def test_what_a_kill_left_is_removed(tmp_path, monkeypatch):
  versions = epath.Path(tmp_path) / 'digits'
  for name in ('incomplete.0123AB_1.0.0', 'incomplete.0123AB_2.0.0', '2.0.0'):
    (versions / name / 'part').mkdir(parents=True)
  neighbours = []

  def prepare(download_config):
    del download_config
    neighbours.extend(sorted(path.name for path in versions.iterdir()))

  builder = types.SimpleNamespace(
    data_path=versions / '1.0.0', download_and_prepare=prepare
  )
  monkeypatch.setattr(tfds, 'builder', lambda *_, **__: builder)
  monkeypatch.setattr(tfds_prepare, 'import_tensorflow', lambda: None)
  tfds_prepare.prepare('digits', tmp_path)
  assert neighbours == ['.1.0.0.lock', '2.0.0', 'incomplete.0123AB_2.0.0']
