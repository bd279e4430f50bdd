"""The page of all keys is the one that their types give."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_is_not_stale():
  path = ROOT / 'docs' / 'config_keys.py'
  spec = importlib.util.spec_from_file_location('config_keys_page', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  written = module.PAGE.read_text('utf-8')
  assert module.page() == written, 'run python docs/config_keys.py'
