import json
import pathlib
import re
import shutil
import tempfile

from matplotlib import colors
from matplotlib import image as mpl_image
import numpy as np
import pytest

from modelstock_jax.report import plots
from modelstock_jax.report import results
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = ROOT / 'configs' / 'digits.py'
SOUPS = ROOT / 'experiments' / 'soups' / 'digits_grid.py'

PATHS = [
  'head/bias',
  'head/kernel',
  *(
    f'image/block_{block}/{name}'
    for block in range(2)
    for name in (
      'attention/key/kernel',
      'attention/query/kernel',
      'attention/value/kernel',
      'attention/out/kernel',
      'ln_1/scale',
      'mlp/fc/bias',
      'mlp/fc/kernel',
    )
  ),
  'image/ln_post/scale',
  'image/ln_pre/scale',
  'image/patch_embedding/kernel',
]


class Drawn:
  """Figures as their files show them."""

  @staticmethod
  def pixels(figure):
    """Return the pixels of a figure, as its PNG has them."""
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, 'figure')
      plots.save(figure, path)
      read = mpl_image.imread(f'{path}.png')[..., :3]
    return (read * 255).round().astype(np.uint8)

  @staticmethod
  def has(pixels, color):
    """Return a mask of the pixels that have a color."""
    return (pixels == np.array(colors.to_rgb(color)) * 255).all(-1)

  @staticmethod
  def center(pixels, color):
    """Return the mean place (right, up) of a color, and its pixels."""
    down, right = np.nonzero(Drawn.has(pixels, color))
    return right.mean(), -down.mean(), len(right)

  @staticmethod
  def titles(figure):
    """Return the texts of a figure's points."""
    return re.findall(r'<title>(.*?)</title>', plots.svg(figure), re.DOTALL)


@pytest.fixture
def drawn():
  return Drawn


def _merge_line(epoch, cosine, *, restarts=False, **of_paths):
  """A line as a run logs it; ratios are those of two models."""
  cosines = {
    path: of_paths.get(path.replace('/', '_'), cosine) for path in PATHS
  }
  ratios = {path: 2 * c / (1 + c) for path, c in cosines.items()}
  return {
    'step': 4 * epoch,
    'kind': 'merge',
    'epoch': epoch,
    'restarts': restarts,
    'mean_ratio': float(np.mean(list(ratios.values()))),
    'cosine': cosines,
    'ratio': ratios,
    'norm': dict.fromkeys(PATHS, 2.0),
  }


@pytest.fixture
def merge_line():
  return _merge_line


@pytest.fixture
def rows():
  return _rows()


def _rows():
  """Two methods, two seeds; seeds 0 and 1 differ by 4 points on digits."""
  table = {
    ('fine_tuned', 'digits'): (0.90, 0.94),
    ('fine_tuned', 'noise'): (0.50, 0.60),
    ('fine_tuned', 'blur'): (0.30, 0.20),
    ('model_stock_end', 'digits'): (0.92, 0.95),
    ('model_stock_end', 'noise'): (0.70, 0.60),
    ('model_stock_end', 'blur'): (0.10, 0.30),
  }
  return [
    evaluation.Row(method, benchmark, seed, accuracy, 100)
    for (method, benchmark), accuracies in table.items()
    for seed, accuracy in enumerate(accuracies)
  ]


@pytest.fixture
def histories():
  return _histories()


def _histories():
  """Two seeds of two modes: lines by seed and mode."""
  train = {'step': 1, 'kind': 'train', 'loss': [1.0, 2.0]}
  runs = {}
  for seed in range(2):
    runs[seed, 'end'] = [train, _merge_line(5, 0.9), _merge_line(10, 0.6)]
    runs[seed, 'epoch'] = [
      train,
      *(
        _merge_line(epoch, 1 - 0.2**epoch, restarts=epoch < 6)
        for epoch in range(1, 7)
      ),
    ]
  return runs


@pytest.fixture(scope='session')
def write_run():
  """Writes what a training run leaves, but for weights."""

  def write(workdir, lines, *overrides, grid=False):
    file = SOUPS if grid else DIGITS
    config = config_lib.load(file, [f'--config.{x}' for x in overrides])
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').write_text(config.to_json())
    (workdir / 'metrics.jsonl').write_text(
      ''.join(f'{json.dumps(line)}\n' for line in lines)
    )

  return write


@pytest.fixture
def comparison(tmp_path, finished):
  """The workdir of a finished comparison."""
  return shutil.copytree(finished, tmp_path / 'comparison')


@pytest.fixture(scope='session')
def finished(tmp_path_factory, write_run):
  """A workdir to copy."""
  workdir = tmp_path_factory.mktemp('finished')
  write_run(workdir, [], 'train.epochs=6')
  for (seed, mode), lines in _histories().items():
    epochs = 10 if mode == 'end' else 6
    write_run(
      workdir / f'seed_{seed}' / mode,
      lines,
      f'seed={seed}',
      f'merge.every={mode}',
      f'train.epochs={epochs}',
      'merge.opt_state=keep',
    )
  results.save(_rows(), workdir / 'results.json')
  session = {'Command': 'modelstock demo', 'Hardware': '1 x abc'}
  (workdir / 'run.json').write_text(json.dumps([session]))
  return workdir
