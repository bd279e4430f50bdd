import dataclasses

import pytest

import modelstock_jax as ms


def test_the_defaults_are_those_of_model_stock():
  # The paper merges layer by layer, its authors average cosines for N > 2.
  assert ms.StockOptions() == ms.StockOptions('layer', 'cosine', True)


def test_options_cannot_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    ms.StockOptions().unit = 'filter'  # type: ignore


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'unit': 'row'}, "unit: must be one of .*'layer'.*'filter'.*got 'row'"),
    ({'average': 'sum'}, "average: must be one of .*'angle'.*got 'sum'"),
    ({'clip': 'no'}, "clip: must be one of .*True, False.*got 'no'"),
    ({'unit': ['layer']}, r"unit: must be one of .*got \['layer'\]"),
    ({'unit': 'a\nb' * 99}, r"unit: must be one of .*got 'a\\nb.{,60}\.\Z"),
    (
      {'unit': 1, 'average': 2},
      '(?s)unit: must .*got 1.*average: must .*got 2',
    ),
  ],
)
def test_errors_name_the_option_its_value_and_the_choices(options, message):
  with pytest.raises(ValueError, match=message):
    ms.StockOptions(**options)
