import numpy as np
import pytest

from modelstock_jax.data import benchmarks
from modelstock_jax.data import pipeline
from modelstock_jax.data import shifts
from modelstock_jax.data import sources


def test_names_are_those_of_the_results():
  assert list(benchmarks.BENCHMARKS) == ['digits', *benchmarks.SHIFTS]
  assert benchmarks.SHIFTS == (
    'noise',
    'blur',
    'rotate_ccw',
    'rotate_cw',
    'contrast',
    'occlusion',
    'shift',
    'fonts',
  )


def test_every_shift_is_used_once():
  used = [b.shift for b in benchmarks.BENCHMARKS.values() if b.shift]
  assert sorted(used) == sorted(shifts.SHIFTS)


@pytest.mark.parametrize('name', benchmarks.BENCHMARKS)
def test_benchmark_reads_in_the_label_space_of_the_digits(name):
  benchmark = benchmarks.BENCHMARKS[name]
  assert benchmark.name == name
  assert sources.class_names(benchmark.dataset) == tuple('0123456789')
  batches = pipeline.eval_batches(benchmark, batch_size=600)
  batch = next(batches)
  batches.close()
  size = sources.split_sizes(benchmark.dataset)[benchmark.split]
  assert batch['image'].shape == (600, 8, 8, 1)
  assert batch['mask'].sum() == size
  np.testing.assert_array_equal(np.unique(batch['label']), np.arange(10))
