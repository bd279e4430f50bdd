"""`modelstock train`."""

import argparse
from collections.abc import Iterator
import contextlib
import faulthandler
import functools
import logging
import os
import pathlib
import signal
import sys
from typing import TYPE_CHECKING
from typing import Any

from modelstock_jax.cli import xla
from modelstock_jax.formats import text

if TYPE_CHECKING:
  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import config_keys
  from modelstock_jax.training import metrics

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add(
    '--config',
    required=True,
    help='Python file with get_config(), or the name of one of the package',
  )
  add(
    '--workdir',
    required=True,
    help='run directory; checkpoints and metrics are written there, and an '
    'interrupted run is resumed',
  )
  add(
    '--log',
    choices=['wandb'],
    help='log to Weights & Biases as well; WANDB_PROJECT names the project, '
    'WANDB_MODE=offline needs no account, and WANDB_RUN_ID with '
    'WANDB_RESUME=allow resumes a run there',
  )
  xla.add_argument(parser)
  add_host_arguments(parser)
  parser.epilog = 'Any value of the config can be set: --config.train.epochs=3.'


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags by which the processes of a run find each other."""
  add = parser.add_argument_group(
    'several processes',
    'Run the same command on every host. TPU pods, srun and mpirun need no '
    'flag; elsewhere give all three, or set JAX_COORDINATOR_ADDRESS, '
    'JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
  ).add_argument
  add('--coordinator', help='HOST:PORT of process 0')
  add('--num_processes', type=int, help='number of processes')
  add('--process_id', type=int, help='index of this process, from 0')


def run(args: argparse.Namespace) -> None:
  """Train, and print where the result is."""
  logging.basicConfig(format='%(asctime)s %(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)
  xla.set_flags(args.xla)

  import jax
  from tqdm.contrib import logging as tqdm_logging

  from modelstock_jax.data import sources
  from modelstock_jax.report import provenance
  from modelstock_jax.training import auto
  from modelstock_jax.training import clip_task
  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import loop

  config, hooks = config_lib.load_with_hooks(args.config, args.overrides)
  join(args, config.hosts)
  if config.data.dataset and 'get_source' not in hooks:
    # Data that is not prepared is said before weights are downloaded.
    sources.split_sizes(config.data.dataset, data_dir=config.data.data_dir)
  if config.anchor.weights:
    sizes = clip_task.missing_sizes(config.model, config.anchor)
    config = config_lib.override(config, sizes)
    channels = config.model.network().vision.channels
    pixels = clip_task.missing_pixels(config.data, config.anchor, channels)
    config = config_lib.override(config, pixels)
  config = auto.resolve(config)
  prepare = functools.partial(clip_task.prepare, config, **hooks)
  with (
    _tracker(args, config) as mirror,
    provenance.session(args.workdir),
    tqdm_logging.logging_redirect_tqdm(),
  ):
    result = loop.train(config, args.workdir, setup=prepare, mirror=mirror)
  if jax.process_index() == 0:
    print(
      f'Finished at step {result.step}; the merged model is in {args.workdir}.'
    )


@contextlib.contextmanager
def _tracker(
  args: argparse.Namespace, config: 'config_lib.Config'
) -> Iterator['metrics.Mirror | None']:
  """Open the run of --log, on process 0."""
  import jax

  if args.log is None or jax.process_index() > 0:
    yield None
    return
  import wandb

  try:
    run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'modelstock'),
      name=pathlib.Path(args.workdir).name,
      config=config.to_dict(),
    )
  except wandb.Error as error:
    raise ValueError(
      f'--log=wandb: {text.line(error)} Log in with `wandb login`, or set '
      'WANDB_MODE=offline.'
    ) from error

  def mirror(step: int, scalars: dict[str, float], layers: Any) -> None:
    histograms = {tag: wandb.Histogram(x) for tag, x in layers.items()}
    run.log({**scalars, **histograms}, step=step)

  with run:
    yield mirror


def join(args: argparse.Namespace, seconds: 'config_keys.Hosts') -> None:
  """Join the other processes, if there are any.

  From here on SIGUSR1 prints the stacks of all threads, and programs for
  accelerators are kept.

  Args:
    args: with the flags of `add_host_arguments`.
    seconds: the time-outs, `hosts` of a config.
  """
  import jax

  from modelstock_jax.training import hosts

  # Notebooks replace sys.stderr by something that is no file.
  if sys.__stderr__ is not None:
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
  hosts.start(
    args.coordinator, args.num_processes, args.process_id, **dict(seconds)
  )
  if hosts.is_multihost():
    index = jax.process_index()
    if index:  # process 0 logs the progress of all
      logging.getLogger('modelstock_jax').setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
      handler.setFormatter(
        logging.Formatter(f'%(asctime)s [{index}] %(message)s')
      )
  _keep_programs()


def _keep_programs() -> None:
  """Let JAX keep compiled programs, if they are for accelerators.

  They lie in $XDG_CACHE_HOME/modelstock_jax/programs, unless
  JAX_COMPILATION_CACHE_DIR names a folder. What lies there is run, so a folder
  to which others can write is not used.
  """
  import jax

  from modelstock_jax.data import cache

  chosen = 'JAX_COMPILATION_CACHE_DIR' in os.environ
  if chosen or jax.default_backend() == 'cpu':
    return
  folder = cache.home() / 'programs'
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o022 or folder.stat().st_uid != os.getuid():
      raise PermissionError('other users can write to it')
    if not os.access(folder, os.W_OK):
      raise PermissionError('it cannot be written')
  except OSError as error:
    _log.warning(
      '%s: %s. Programs are compiled again at every start, unless '
      'JAX_COMPILATION_CACHE_DIR names a folder.',
      folder,
      error,
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
