"""Memory, FLOPs and traffic of a run, compiled ahead of time.

The compiler of libtpu requires no TPU: it compiles the programs of a run for a
description of one. The figures are read from the compiled programs.
"""

from collections.abc import Callable
import importlib.util
import math
import os
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from modelstock_jax.planning import collectives as collectives_lib
from modelstock_jax.planning import least
from modelstock_jax.training import auto
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import memory as memory_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import task as task_lib

IMAGENET_IMAGES = 1_281_167
# CPU time from a JPEG of 500 x 375 pixels to a crop of 224 that is trained on:
# experiments/benchmarks/input_pipeline.py, row train_batches.
READ_SECONDS = 2.7e-3

# Evaluation batches that wait for the devices at a time.
_WAITING = 5


_GIB = 2**30
_SQUARE = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBE = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  '8x8x16',
)


class Chip(NamedTuple):
  """A kind of TPU; all figures are of what JAX takes for one device."""

  hbm_bytes: int  # that programs may use
  peak_flops: float  # of bfloat16 products, in a second
  sizes: tuple[str, ...]  # in chips
  options: dict[str, Any] = {}  # noqa: RUF012, read only


# Memory: what libtpu 0.0.42 says is available when a program is too large; the
# data sheets (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) have 32, 16, 95 and
# 32 GB. Peaks are those of the data sheets. The two cores of a v4 or v5p work
# as one device, which is called a megacore.
_MEGACORE = {'chip_config_name': 'megacore'}
CHIPS = {
  'v4': Chip(int(30.75 * _GIB), 275e12, _CUBE, _MEGACORE),
  'v5e': Chip(int(15.75 * _GIB), 197e12, _SQUARE),
  'v5p': Chip(int(95.74 * _GIB), 459e12, _CUBE, _MEGACORE),
  'v6e': Chip(int(31.25 * _GIB), 918e12, _SQUARE),
}


def plan(
  config: config_lib.Config,
  topology: str,
  *,
  slices: int = 1,
  num_classes: int | None = None,
  get_task: Callable[..., task_lib.Task] | None = None,
  get_optimizer: Callable[..., task_lib.Optimizer] | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Compile a run ahead of time, without TPU hardware.

  Args:
    config: of the run. Neither its weights nor its data are read.
    topology: a chip and how many, 'v5e:4x4'.
    slices: how many of these, linked by the network of their hosts.
    num_classes: of the training data; None is that of the data set, or 1,000
      for ImageNet.
    get_task: see `clip_task.prepare`.
    get_optimizer: likewise.
    say: takes a line about each program; the compilation takes minutes.

  Returns:
    The plan, as JSON has it; all figures are of one device. `flops_per_step` is
    of the products of forward and backward pass: what is computed again does
    not count; where it is not known, images per second and the cores of a host
    that read them are 0. `suggestions` are flags that need less memory, where
    it does not fit. See `summarize`.

  Raises:
    ValueError: the topology is not known, the mesh does not divide it, or the
      number of classes is not known.
    ImportError: libtpu is not installed.
  """
  if num_classes is not None and num_classes < 1:
    raise ValueError(f'--num_classes={num_classes}: must be at least 1.')
  tpus = devices(topology, slices)
  kind, _, size = topology.partition(':')
  chip = CHIPS[kind]
  config = auto.choose(config, tpus, chip.hbm_bytes)
  train, num_models = config.train, config.merge.num_models
  placement = setup_lib.place(config, tpus)
  task = get_task(config) if get_task else clip_task.task(config, num_classes)
  optimizer = (get_optimizer or clip_task.optimizer)(config)
  calls, parameters = _calls(task, optimizer, placement, config)
  programs = {}
  for name, call in calls.items():
    say(f'Compiling the {name} for {len(tpus)} devices.')
    programs[name] = _compile(*call, placement.mesh)
  anchor = calls['merge'][1][0]
  programs['step']['least_bytes'] = least.step_bytes(
    config, placement, chip.hbm_bytes, anchor
  )
  # A device's part of its model, once to each of the others.
  others = placement.mesh.shape[sharding.STOCK] - 1
  programs['merge']['least_bytes'] = _nbytes(anchor) * others
  images = num_models * train.batch_size
  work = images * task.flops // len(tpus)
  seconds = work / chip.peak_flops  # at the least
  num_hosts = len({device.process_index for device in tpus})
  read = images * READ_SECONDS / num_hosts if 'image' in task.example else 0.0
  result = {
    'topology': topology,
    'slices': slices,
    'devices': len(tpus),
    'mesh': dict(placement.mesh.shape),
    'settings': auto.settings(config),
    'estimated_bytes': auto.needed_bytes(config, len(tpus)),
    'num_models': num_models,
    'batch_size': train.batch_size,
    'parameters': parameters,
    **summarize(programs, chip.hbm_bytes),
    'hbm_bytes': chip.hbm_bytes,
    'flops_per_step': work,
    'peak_flops': chip.peak_flops,
    'seconds_per_step_at_peak': seconds,
    'images_per_second_at_peak': images / seconds if seconds else 0.0,
    'reader_cores_per_host_at_peak': read / seconds if seconds else 0.0,
    'suggestions': [],
  }
  if not result['fits']:
    larger = chip.sizes[chip.sizes.index(size) + 1 :][:1]
    result['suggestions'] = [
      *memory_lib.suggest(config, len(tpus)),
      *(f'--topology={kind}:{size}' for size in larger),
    ]
  return result


def summarize(
  programs: dict[str, dict[str, Any]], hbm_bytes: int
) -> dict[str, Any]:
  """Return what programs need of a device that must hold the code of all.

  Args:
    programs: by name, each as `_compile` returns it.
    hbm_bytes: memory of the device.

  Returns:
    'fits', 'peak_bytes', and for each program a dict: its values, of which
    'peak_bytes' has all that the run holds meanwhile, the totals of its
    collectives, and the 'sent_bytes' of a device in all of them. Of one that
    does not compile, what is unknown is None.
  """
  code = sum(program.get('code_bytes', 0) for program in programs.values())
  tables = {name: _table(program, code) for name, program in programs.items()}
  peak = max(table['peak_bytes'] or 0 for table in tables.values())
  failed = any(program['failure'] for program in programs.values())
  fits = not failed and peak <= hbm_bytes
  return {'fits': fits, 'peak_bytes': peak, **tables}


def _table(program: dict[str, Any], code_bytes: int) -> dict[str, Any]:
  if program['failure']:
    return program | {
      'peak_bytes': memory_lib.needed_bytes(program['failure']),
      'cross_stock_bytes': None,
      'cross_slice_bytes': None,
    }
  moved = program['collectives']
  peak = program['peak_bytes'] + program['resident_bytes'] + code_bytes
  return program | {
    'peak_bytes': peak,
    'cross_stock_bytes': collectives_lib.crossing(moved, sharding.STOCK),
    'cross_slice_bytes': collectives_lib.crossing_slices(moved),
    'exact': all(each.exact for each in moved),
    'collectives': collectives_lib.totals(moved),
    'sent_bytes': sum(each.sent for each in moved),
  }


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Return devices to compile for; nothing can run on them.

  Args:
    topology: a chip and how many, 'v5e:4x4'.
    slices: how many of these.

  Raises:
    ValueError: it is not known; lists those that are.
    ImportError: libtpu is not installed.
  """
  name, _, size = topology.partition(':')
  if name not in CHIPS or size not in CHIPS[name].sizes:
    known = (f'{n}:{", ".join(chip.sizes)}' for n, chip in CHIPS.items())
    raise ValueError(
      f'--topology={topology}: is not known. These are:\n  '
      + '\n  '.join(known)
    )
  if slices < 1:
    raise ValueError(f'--slices={slices}: must be at least 1.')
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      "The TPU compiler is missing: pip install 'modelstock_jax[tpu]' (in a "
      "clone: pip install '.[tpu]'). It needs no TPU."
    )
  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
  options = dict(CHIPS[name].options)
  if size == '1x1':
    options['chips_per_host_bounds'] = (1, 1, 1)
  if slices > 1:
    options['num_slices'] = slices
  return list(
    topologies.get_topology_desc(topology, platform='tpu', **options).devices
  )


# libtpu assumes that this machine is the host of a TPU: it asks the cloud which
# one, warns that there is none, and allows one process at a time.
_QUIET = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def _calls(
  task: task_lib.Task,
  optimizer: task_lib.Optimizer,
  placement: sharding.Placement,
  config: config_lib.Config,
) -> tuple[dict[str, tuple[Any, Any, int]], int]:
  """Return the programs of a run, and the parameters of a model.

  A program comes with its arguments, and the bytes that the run holds meanwhile
  in addition.
  """
  train, merge = config.train, config.merge
  # The length of the schedule does not show in a plan.
  programs = setup_lib.compile_programs(
    config, task, optimizer, placement, IMAGENET_IMAGES
  )
  abstract = state_lib.abstract
  params, variables = jax.eval_shape(task.init, jax.random.key(0))
  seed = jax.ShapeDtypeStruct((), jnp.uint32)
  models = jax.ShapeDtypeStruct((merge.num_models,), jnp.int32)
  state = jax.eval_shape(programs.create, params, variables, seed, models)
  anchor = abstract(params, placement.params(params))
  consts = abstract(task.consts, placement.replicated)
  batch = _examples(task, (merge.num_models, train.batch_size), placement.batch)

  evaluate = evaluation.Evaluator(
    task, placement, batch_size=config.evaluate.batch_size
  )
  deployed = jax.eval_shape(task.deploy, params, task.consts)
  scored = abstract((deployed, variables), placement.replicated)
  examples = _examples(task, (evaluate.batch_size,), placement.examples)
  examples['mask'] = jax.ShapeDtypeStruct(
    (evaluate.batch_size,), jnp.bool_, sharding=placement.examples
  )

  # What the run holds in addition to a program's arguments: see `loop.fit`. The
  # next batch arrives while the devices work.
  always = _nbytes(batch)
  if merge.anchor == 'last_merge':  # the first anchor stays as well
    always += _nbytes(anchor)
  in_step = always + _nbytes(anchor)  # the last merge, laid out alike
  always += _nbytes(consts)  # in the step, they and the anchor are arguments
  in_merge = always + _nbytes((anchor, state.opt_state, state.variables))
  in_evaluation = in_merge + _nbytes((state.params, [examples] * _WAITING))
  if placement.fsdp_min_size:  # the scored params are gathered copies
    in_evaluation += _nbytes(anchor)
  step = (state, batch, anchor, consts, {})
  restart = programs.restart[merge.opt_state]
  return {
    'step': (programs.train, step, in_step),
    'merge': (programs.merge, (anchor, state.params), in_merge),
    'restart': (restart, (state, anchor), always + _nbytes(anchor)),
    'evaluation': (evaluate.sums, (*scored, examples), in_evaluation),
  }, sum(leaf.size for leaf in jax.tree.leaves(params))


def _examples(
  task: task_lib.Task, lead: tuple[int, ...], where: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of a batch of examples."""
  return {
    name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=where)
    for name, x in task.example.items()
  }


def _nbytes(tree: Any) -> int:
  """Return the bytes of arrays on one device, without padding."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _compile(
  program: Any, arguments: tuple[Any, ...], resident_bytes: int, mesh: Mesh
) -> dict[str, Any]:
  """Compile a program, and describe it by what one device does.

  Returns:
    'argument_bytes', 'temporary_bytes' and 'code_bytes' (of its instructions);
    'peak_bytes': the most it holds at a time, arguments and results included;
    'resident_bytes': what the run holds meanwhile, in addition to arguments;
    'flops' as XLA counts them, in loops perhaps of one turn only;
    'collectives': the data that it exchanges with other devices;
    'compile_seconds' on this machine. 'failure' is '', or the message of the
    compiler if the program does not fit, and then there is nothing else.
  """
  start = time.perf_counter()
  try:
    compiled = program.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    failure = memory_lib.exhausted(error)
    if failure is None:
      raise
    return {'failure': failure}
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  used = jax.tree.leaves(
    compiled.input_shardings[0], is_leaf=lambda where: where is None
  )
  unused = [
    leaf
    for leaf, where in zip(jax.tree.leaves(arguments), used, strict=True)
    if where is None
  ]
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_memory_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'resident_bytes': resident_bytes + _nbytes(unused),
    'flops': max(0.0, cost.get('flops', 0.0)),
    'collectives': collectives_lib.read(compiled.as_text(), mesh),
    'compile_seconds': seconds,
    'failure': '',
  }
