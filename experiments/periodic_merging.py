"""Does merging during training pay? Rules chosen on validation, then tested.

Merging again and again against the pretrained anchor drives every ratio to 1:
what the models have in common by then dwarfs where they differ. The rules
compared here differ in when they merge, in what the models start again from,
and in which angle the last merge goes by:

  end        one merge, after the last epoch
  epoch, K   Model Stock against the pretrained anchor every (K-th) epoch
  moving K   the same against the last merge, every K-th epoch
  own K      models start again from their mean every K-th epoch; the last merge
             goes from the pretrained anchor by the angle between the models'
             own displacements, u_i = sum over periods of what model i moved.
             Their mean is that of the models; what each has drawn of noise
             since the start is still in them
  ..., reset the same, and at each merge Adam's moments begin again at zero;
             `end, reset` is the control: moments begin again after every epoch,
             without a merge

`choose` reads validation images only: accuracy on the validation digits (ID)
and the mean of seven shifts of them. How to choose was fixed beforehand: of all
periodic rules and strengths of the last merge, the one with the highest mean of
ID and shifts over anchors and seeds; and for `end` its best strength, likewise.
`test` evaluates these on the test benchmarks, with seeds that took no part.

  python -m experiments.periodic_merging choose --workdir=runs/periodic
  python -m experiments.periodic_merging test --workdir=runs/periodic
"""

import argparse
from collections.abc import Callable
import functools
import json
import pathlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from experiments import scores
from experiments.digits import pretrain
from experiments.digits import sweep
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.formats import write
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'digits.py'
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6)
SEEDS = {'choose': range(100, 110), 'test': range(10, 20)}

Params = Any
# 'anchor', 'seed', and 'percent': for each candidate [ID, mean of shifts].
Entry = dict[str, Any]


class Rule(NamedTuple):
  """When models are merged, and how."""

  every: int | None  # epochs; None is once, at the end
  anchor: str = 'pretrained'  # or 'last_merge'
  by_own: bool = False  # the angle between the models' own displacements
  resets: bool = False  # Adam's moments
  merges: bool = True  # False: moments are reset, and nothing else


RULES = {
  'end': Rule(None),
  'epoch': Rule(1),
  'every 5': Rule(5),
  'every 10': Rule(10),
  'moving 5': Rule(5, anchor='last_merge'),
  'own 1': Rule(1, by_own=True),
  'own 3': Rule(3, by_own=True),
  'own 5': Rule(5, by_own=True),
  'own 10': Rule(10, by_own=True),
  'own 15': Rule(15, by_own=True),
  'epoch, reset': Rule(1, resets=True),
  'every 5, reset': Rule(5, resets=True),
  'own 1, reset': Rule(1, by_own=True, resets=True),
  'own 5, reset': Rule(5, by_own=True, resets=True),
  'end, reset': Rule(1, resets=True, merges=False),
}


@jax.jit
def stock(anchor: Params, stack: Params, strength: jax.Array) -> Params:
  """Merge weights `[N, ...]`."""
  return merging.model_stock(
    anchor, stack, stacked=True, layers=clip.clip_layers, strength=strength
  ).params


@jax.jit
def mean(stack: Params) -> Params:
  """Return the plain average of weights `[N, ...]`."""
  return jax.tree.map(lambda x: jnp.mean(x, axis=0), stack)


@jax.jit
def shift(stack: Params, ends: Params, starts: Params) -> Params:
  """Add to weights `[N, ...]` what models have moved, from one start."""
  return jax.tree.map(lambda u, w, s: u + (w - s[None]), stack, ends, starts)


def train(
  config: config_lib.Config, setup: setup_lib.Setup, rule: Rule
) -> tuple[Params, Params, Params]:
  """Train two models by a rule.

  Returns:
    The anchor of the last merge, the weights that it merges, and the models
    themselves.
  """
  anchor, programs = setup.anchor, setup.programs
  arguments = np.uint32(config.seed), np.arange(2, dtype=np.int32)
  arguments = jax.device_put(arguments, setup.placement.replicated)
  create = functools.partial(
    programs.create, setup.anchor, setup.variables, *arguments
  )
  state = create()
  moved = jax.tree.map(jnp.zeros_like, state.params)
  start = anchor
  batches = setup_lib.read_batches(
    setup.sources,
    setup.placement,
    config.data,
    batch_size=config.train.batch_size,
    seed=config.seed,
    models=range(2),
  )
  for step in range(1, setup.total_steps + 1):
    batch = sharding.to_global(next(batches), setup.placement.batch)
    state, _ = programs.train(state, batch, setup.anchor, setup.consts, {})
    epoch, rest = divmod(step, setup.steps_per_epoch)
    if rest or not rule.every or epoch % rule.every:
      continue
    if step == setup.total_steps:
      break
    if rule.merges:
      if rule.by_own:
        moved = shift(moved, state.params, start)
        start = mean(state.params)
      else:
        start = stock(anchor, state.params, np.float32(1))
        anchor = start if rule.anchor == 'last_merge' else anchor
      state = programs.restart(state, start)
    if rule.resets:
      state = state._replace(opt_state=create().opt_state)
  batches.close()
  stack = state.params
  if rule.by_own:  # the models as they would be had each gone its own way
    moved = shift(moved, stack, start)
    stack = jax.tree.map(lambda w0, u: w0[None] + u, anchor, moved)
  return anchor, stack, state.params


def candidates(
  config: config_lib.Config, setup: setup_lib.Setup, name: str
) -> dict[str, Params]:
  """Train by a rule; return a merge for each strength, and its neighbours."""
  anchor, stack, models = train(config, setup, RULES[name])
  result = {
    f'{name}, strength {s:g}': stock(anchor, stack, np.float32(s))
    for s in STRENGTHS
  }
  if name == 'end':
    result['single'] = merging.unstack(models)[0]
    result['average'] = average = mean(models)
    for alpha in STRENGTHS[1:]:
      shrunk = merging.wise_ft(setup.anchor, average, alpha=alpha)
      result[f'average, alpha {alpha:g}'] = shrunk
  return result


def measure(
  phase: str,
  rules: list[str],
  benchmarks: list[data.Benchmark],
  args: argparse.Namespace,
  overrides: list[str],
) -> list[Entry]:
  """Measure the candidates of all rules; finished entries are only read.

  Args:
    phase: 'choose' or 'test'.
    rules: names of `RULES`.
    benchmarks: the one in distribution, and the shifts.
    args: of the command line.
    overrides: of the config.

  Returns:
    An entry for each anchor and seed, kept in PHASE.json.
  """
  path = args.workdir / f'{phase}.json'
  entries = json.loads(path.read_text('utf-8')) if path.exists() else []
  done = {(entry['anchor'], entry['seed']) for entry in entries}
  for number in range(args.anchors):
    anchor, weights = 'shipped', 'mini_clip'
    if number:
      anchor = f'pretrained with seed {number}'
      weights = args.workdir / f'anchor_{number}.safetensors'
      if not weights.exists():
        print(f'Pretraining an anchor with seed {number} ...', flush=True)
        flag = f'--config.pretrain.seed={number}'
        pretrain.pretrain(config_lib.load(CONFIG, [flag]), weights)
    flag = f'--config.anchor.weights={weights}'
    config = config_lib.load(CONFIG, [*overrides, flag])
    setup = clip_task.prepare(config)
    for seed in SEEDS[phase]:
      if (anchor, seed) in done:
        continue
      of_seed = config_lib.override(config, [f'--config.seed={seed}'])
      models: dict[str, Params] = {}
      for rule in rules:
        models |= candidates(of_seed, setup, rule)
      percent = scores.accuracies(setup, list(models.values()), benchmarks)
      by_name = dict(zip(models, percent.T.tolist(), strict=True))
      entries.append({'anchor': anchor, 'seed': seed, 'percent': by_name})
      write.write_text(path, json.dumps(entries, indent=1))
      print(f'{anchor}, seed {seed}: done', flush=True)
  return entries


def choose(entries: list[Entry]) -> tuple[str, str]:
  """Return the periodic rule and the strength of `end` that do best."""

  def best(fits: Callable[[str], bool]) -> str:
    names = [n for n in entries[0]['percent'] if ', strength' in n and fits(n)]
    return max(names, key=lambda n: np.mean([e['percent'][n] for e in entries]))

  return (
    best(lambda name: not name.startswith('end')),
    best(lambda name: name.startswith('end, strength')),
  )


def table(entries: list[Entry], against: str, names: list[str]) -> str:
  """Return means, and differences paired over anchors and seeds."""
  number = len({entry['anchor'] for entry in entries})
  lines = [
    f'| {number} anchors x {len(entries) // number} seeds | ID | shifts '
    f'| against `{against}`: ID | shifts |',
    '|:--|--:|--:|--:|--:|',
  ]
  for name in names:
    values, base = (
      np.array([entry['percent'][x] for entry in entries])
      for x in (name, against)
    )
    cells = [f'{mean:.2f}' for mean in values.mean(axis=0)]
    cells += [
      scores.interval(differences, sign='+', digits=2)
      for differences in (values - base).T
    ]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Choose on validation, or test the chosen rules."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('phase', choices=SEEDS)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--anchors', type=int, default=2)
  args, overrides = parser.parse_known_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  digits = data.find_benchmark('digits')._replace(split='validation')
  on_validation = [digits, *sweep.SHIFTED]
  if args.phase == 'choose':
    entries = measure('choose', list(RULES), on_validation, args, overrides)
    rule, end = choose(entries)
    print(f'\nChosen: {rule}; of one merge at the end: {end}.\n')
    print(table(entries, 'end, strength 1', list(entries[0]['percent'])))
    return
  validation = args.workdir / 'choose.json'
  if not validation.exists():
    parser.error(f'{validation}: there is no such file; run `choose` first.')
  chosen = choose(json.loads(validation.read_text('utf-8')))
  rule = chosen[0].rpartition(', strength')[0]
  rules = ['end', 'epoch', 'own 15', 'end, reset', 'epoch, reset', rule]
  rules = list(dict.fromkeys(rules))
  benchmarks = [data.find_benchmark(name) for name in ('digits', *data.SHIFTS)]
  entries = measure('test', rules, benchmarks, args, overrides)
  names = ['single', 'average', *(f'{name}, strength 1' for name in rules)]
  names = list(dict.fromkeys([*names, *chosen]))
  for against in ('end, strength 1', 'single', 'end, reset, strength 1'):
    print(table(entries, against, names), '\n')
  for anchor in dict.fromkeys(entry['anchor'] for entry in entries):
    of_anchor = [entry for entry in entries if entry['anchor'] == anchor]
    print(f'{anchor}:\n{table(of_anchor, "end, strength 1", names)}\n')


if __name__ == '__main__':
  main()
