import importlib.util

import pytest

from modelstock_jax.data import tfds_prepare

needs_no_tensorflow = pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='TensorFlow is installed',
)


def test_data_sets_of_a_name():
  assert tfds_prepare.datasets('imagenet_v2') == (
    'imagenet_v2/matched-frequency',
  )
  assert tfds_prepare.datasets('imagenet2012') == ('imagenet2012',)
  corrupted = tfds_prepare.datasets('imagenet_c')
  assert len(corrupted) == 75
  assert corrupted[0] == 'imagenet2012_corrupted/gaussian_noise_1'


@pytest.mark.parametrize(
  ('name', 'train'),
  [('imagenet', True), ('imagenet_real', False), ('imagenet_c', False)],
)
def test_missing_archives_are_listed(name, train, tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    tfds_prepare.prepare(name, tmp_path)
  message = str(caught.value)
  assert 'ILSVRC2012_img_val.tar  6,744,924,160 bytes' in message
  assert ('ILSVRC2012_img_train.tar  147,897,477,120 bytes' in message) == train
  assert 'https://image-net.org/download-images' in message
  assert str(tmp_path / 'downloads' / 'manual') in message
  with pytest.raises(FileNotFoundError, match=f'into {tmp_path}/own,'):
    tfds_prepare.prepare(name, tmp_path, tmp_path / 'own')
  assert not list(tmp_path.iterdir())


def test_objectnet_is_not_prepared(tmp_path):
  with pytest.raises(ValueError, match=r'nothing is prepared.*objectnet-1\.0'):
    tfds_prepare.prepare('objectnet', tmp_path)


@needs_no_tensorflow
def test_tensorflow_is_asked_for(tmp_path):
  with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[prepare\]'"):
    tfds_prepare.prepare('imagenet_r', tmp_path)
  # With an archive there is, it comes as far.
  manual = tmp_path / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  (manual / 'ILSVRC2012_img_val.tar').touch()
  with pytest.raises(ModuleNotFoundError, match='TensorFlow'):
    tfds_prepare.prepare('imagenet', tmp_path)
