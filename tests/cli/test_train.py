"""What `modelstock train` does before a run."""

import argparse
import os

import jax
import pytest

from modelstock_jax.cli import train
from modelstock_jax.training import config_keys


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """Joins as one process of a backend; returns where programs are kept."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  before = jax.config.jax_compilation_cache_dir
  alone = argparse.Namespace(
    coordinator=None, num_processes=None, process_id=None
  )

  def join(backend):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    jax.config.update('jax_compilation_cache_dir', None)
    train.join(alone, config_keys.Hosts())
    return jax.config.jax_compilation_cache_dir

  yield join
  jax.config.update('jax_compilation_cache_dir', before)


def test_programs_for_accelerators_are_kept(kept, tmp_path, monkeypatch):
  folder = tmp_path / 'modelstock_jax' / 'programs'
  assert kept('cpu') is None
  assert not folder.exists()
  assert kept('tpu') == str(folder)
  assert folder.stat().st_mode & 0o777 == 0o700
  assert kept('gpu') == str(folder)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'chosen')
  assert kept('tpu') is None  # JAX itself has read the variable


def test_a_folder_that_others_can_write_is_not_used(kept, tmp_path, caplog):
  folder = tmp_path / 'modelstock_jax' / 'programs'
  folder.mkdir(parents=True)
  folder.chmod(0o777)
  assert kept('tpu') is None
  assert f'{folder}: other users can write to it' in caplog.text


def test_a_folder_that_cannot_be_written_is_not_used(
  kept, tmp_path, caplog, monkeypatch
):
  folder = tmp_path / 'modelstock_jax' / 'programs'
  monkeypatch.setattr(os, 'access', lambda *_: False)  # root writes everywhere
  assert kept('tpu') is None
  assert f'{folder}: it cannot be written' in caplog.text


def test_a_file_in_the_way_is_named(kept, tmp_path, caplog):
  (tmp_path / 'modelstock_jax').write_text('')
  assert kept('tpu') is None
  assert 'JAX_COMPILATION_CACHE_DIR' in caplog.text
