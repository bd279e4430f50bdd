"""Sources of examples, batches and benchmarks."""

from modelstock_jax.data.augment import Augment
from modelstock_jax.data.benchmarks import BENCHMARKS
from modelstock_jax.data.benchmarks import GROUPS
from modelstock_jax.data.benchmarks import IMAGENET_SHIFTS
from modelstock_jax.data.benchmarks import SHIFTS
from modelstock_jax.data.benchmarks import Benchmark
from modelstock_jax.data.benchmarks import answers
from modelstock_jax.data.benchmarks import benchmark_reader
from modelstock_jax.data.benchmarks import find_benchmark
from modelstock_jax.data.benchmarks import open_benchmark
from modelstock_jax.data.pipeline import Batches
from modelstock_jax.data.pipeline import EvalRead
from modelstock_jax.data.pipeline import TrainRead
from modelstock_jax.data.pipeline import eval_batches
from modelstock_jax.data.pipeline import steps_per_epoch
from modelstock_jax.data.pipeline import train_batches
from modelstock_jax.data.preprocessing import decode
from modelstock_jax.data.preprocessing import image_reader
from modelstock_jax.data.preprocessing import normalize
from modelstock_jax.data.records import ArraySource
from modelstock_jax.data.records import BadExample
from modelstock_jax.data.records import Source
from modelstock_jax.data.sources import TfdsSource
from modelstock_jax.data.sources import class_names
from modelstock_jax.data.sources import open_source

__all__ = [
  'BENCHMARKS',
  'GROUPS',
  'IMAGENET_SHIFTS',
  'SHIFTS',
  'ArraySource',
  'Augment',
  'BadExample',
  'Batches',
  'Benchmark',
  'EvalRead',
  'Source',
  'TfdsSource',
  'TrainRead',
  'answers',
  'benchmark_reader',
  'class_names',
  'decode',
  'eval_batches',
  'find_benchmark',
  'image_reader',
  'normalize',
  'open_benchmark',
  'open_source',
  'steps_per_epoch',
  'train_batches',
]
