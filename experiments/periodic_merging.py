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
import json
import pathlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
from scipy import stats

from experiments.digits import pretrain
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'digits.py'
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6)
SEEDS = {'choose': range(100, 110), 'test': range(10, 20)}

Params = Any


class Rule(NamedTuple):
  """When models are merged, and how."""

  every: int | None  # epochs; None is once, at the end
  anchor: str = 'pretrained'  # or 'last_merge'
  own: bool = False  # the angle between the models' own displacements
  opt_state: str = 'keep'  # or 'reset'
  merges: bool = True  # False: moments are reset, and nothing else


RULES = {
  'end': Rule(None),
  'epoch': Rule(1),
  'every 5': Rule(5),
  'every 10': Rule(10),
  'moving 5': Rule(5, 'last_merge'),
  'own 1': Rule(1, own=True),
  'own 3': Rule(3, own=True),
  'own 5': Rule(5, own=True),
  'own 10': Rule(10, own=True),
  'own 15': Rule(15, own=True),
  'epoch, reset': Rule(1, opt_state='reset'),
  'every 5, reset': Rule(5, opt_state='reset'),
  'own 1, reset': Rule(1, own=True, opt_state='reset'),
  'own 5, reset': Rule(5, own=True, opt_state='reset'),
  'end, reset': Rule(1, opt_state='reset', merges=False),
}


@jax.jit
def stock(anchor: Params, stack: Params, strength: jax.Array) -> Params:
  """The merge, of weights `[N, ...]`."""
  return merging.model_stock(
    anchor, stack, stacked=True, layers=clip.clip_layers, strength=strength
  ).params


@jax.jit
def mean(stack: Params) -> Params:
  """The plain average."""
  return jax.tree.map(lambda x: jnp.mean(x, axis=0), stack)


@jax.jit
def add(own: Params, stack: Params, start: Params) -> Params:
  """Own displacements after a period that began at `start`."""
  return jax.tree.map(lambda u, w, s: u + (w - s[None]), own, stack, start)


@jax.jit
def shifted(anchor: Params, own: Params) -> Params:
  """The models as they would be had each gone its own way."""
  return jax.tree.map(lambda w0, u: w0[None] + u, anchor, own)


def fresh(setup: setup_lib.Setup) -> Any:
  """Optimizers that have taken no step."""
  return create(setup, 0).opt_state


def create(setup: setup_lib.Setup, seed: int) -> state_lib.State:
  """Two models at the anchor."""
  arguments = (np.uint32(seed), np.arange(2, dtype=np.int32))
  arguments = jax.device_put(arguments, setup.placement.replicated)
  return setup.programs.create(setup.anchor, setup.variables, *arguments)


def train(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, rule: Rule
) -> tuple[Params, Params, Params]:
  """Trains two models by a rule.

  Returns:
    The anchor of the last merge, what it merges, and the models themselves.
  """
  anchor, programs = setup.anchor, setup.programs
  state = create(setup, config.seed)
  own = jax.tree.map(jnp.zeros_like, state.params)
  start = anchor
  batches = setup_lib.read_batches(
    setup.sources,
    setup.placement,
    config.data,
    batch_size=config.train.batch_size,
    seed=config.seed,
    models=range(2),
  )
  try:
    for step in range(1, setup.total_steps + 1):
      batch = sharding.to_global(next(batches), setup.placement.batch)
      state, _ = programs.train(state, batch, setup.anchor, setup.consts, {})
      epoch, rest = divmod(step, setup.steps_per_epoch)
      last = step == setup.total_steps
      merging_now = rule.every and not rest and epoch % rule.every == 0
      if last or not merging_now:
        continue
      if not rule.merges:
        state = state._replace(opt_state=fresh(setup))
        continue
      if rule.own:
        own = add(own, state.params, start)
        start = mean(state.params)
      else:
        start = stock(anchor, state.params, np.float32(1))
        if rule.anchor == 'last_merge':
          anchor = start
      state = programs.restart(state, start)
      if rule.opt_state == 'reset':
        state = state._replace(opt_state=fresh(setup))
  finally:
    batches.close()
  stack = state.params
  if rule.own:
    stack = shifted(anchor, add(own, stack, start))
  return anchor, stack, state.params


def candidates(
  anchor: Params, found: tuple[Params, Params, Params], name: str
) -> dict[str, Params]:
  """The models of a run by name: one for each strength, and its neighbours."""
  last_anchor, stack, models = found
  result = {
    f'{name}, strength {s:g}': stock(last_anchor, stack, np.float32(s))
    for s in STRENGTHS
  }
  if name == 'end':
    result['single'] = merging.unstack(models)[0]
    average = mean(models)
    result['average'] = average
    for alpha in STRENGTHS[1:]:
      result[f'average, alpha {alpha:g}'] = merging.wise_ft(
        anchor, average, alpha=alpha
      )
  return result


def anchors(workdir: pathlib.Path, number: int) -> dict[str, str]:
  """The anchor that ships, and others that are pretrained here if need be."""
  found = {'shipped': 'mini_clip'}
  for seed in range(1, number):
    path = workdir / f'anchor_{seed}.safetensors'
    if not path.exists():
      print(f'Pretraining an anchor with seed {seed} ...', flush=True)
      config = config_lib.load(CONFIG, [f'--config.pretrain.seed={seed}'])
      pretrain.pretrain(config, path)
    found[f'pretrained with seed {seed}'] = str(path)
  return found


def measure(
  benchmarks: list[data.Benchmark],
  rules: dict[str, Rule],
  weights: dict[str, str],
  seeds: range,
  overrides: list[str],
  path: pathlib.Path,
) -> list[dict[str, Any]]:
  """Accuracy of all candidates; what is in the file is not done again."""
  rows = json.loads(path.read_text('utf-8')) if path.exists() else []
  done = {(row['anchor'], row['seed'], row['rule']) for row in rows}
  for anchor, file in weights.items():
    config = config_lib.load(
      CONFIG, [*overrides, f'--config.anchor.weights={file}']
    )
    setup = clip_task.prepare(config)
    for seed in seeds:
      of_seed = config_lib.override(config, [f'--config.seed={seed}'])
      models = {
        (rule, name): params
        for rule in rules
        if (anchor, seed, rule) not in done
        for name, params in candidates(
          setup.anchor, train(of_seed, setup, rules[rule]), rule
        ).items()
      }
      scores = [
        [score.accuracy for score in setup.evaluate(list(models.values()), b)]
        for b in benchmarks
      ]
      for (rule, name), accuracy in zip(
        models, np.array(scores).T.tolist(), strict=True
      ):
        rows.append(
          dict(
            anchor=anchor,
            seed=seed,
            rule=rule,
            name=name,
            accuracy=dict(
              zip([b.name for b in benchmarks], accuracy, strict=True)
            ),
          )
        )
      write_lib.write_text(path, json.dumps(rows, indent=1))
      print(f'{anchor}, seed {seed}: done', flush=True)
  return rows


class Figures(NamedTuple):
  """Accuracies of one candidate in percent, `[A, S]`: A anchors, S seeds."""

  id: np.ndarray
  shifts: np.ndarray


def collect(rows: list[dict[str, Any]]) -> dict[str, Figures]:
  """The rows of a file by candidate."""
  names = list(dict.fromkeys(row['name'] for row in rows))
  weights = list(dict.fromkeys(row['anchor'] for row in rows))
  seeds = sorted({row['seed'] for row in rows})
  found = {}
  for name in names:
    values = np.full((2, len(weights), len(seeds)), np.nan)
    for row in rows:
      if row['name'] == name:
        first, *others = row['accuracy'].values()
        at = weights.index(row['anchor']), seeds.index(row['seed'])
        values[(0, *at)] = 100 * first
        values[(1, *at)] = 100 * np.mean(others)
    found[name] = Figures(*values)
  return found


def choose(figures: dict[str, Figures]) -> tuple[str, str]:
  """The periodic rule and the strength of `end` that do best."""

  def best(fits: Callable[[str], bool]) -> str:
    value = {
      name: float(np.mean([f.id.mean(), f.shifts.mean()]))
      for name, f in figures.items()
      if ', strength' in name and fits(name)
    }
    return max(value, key=lambda name: value[name])

  return (
    best(lambda name: not name.startswith('end')),
    best(lambda name: name.startswith('end, strength')),
  )


def interval(differences: np.ndarray) -> str:
  """Mean and 95 % confidence interval (Student's t) of paired differences."""
  values = differences.ravel()
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f'{values.mean():+.2f} ± {half:.2f}'


def table(figures: dict[str, Figures], against: str, order: list[str]) -> str:
  """Means, and differences paired over anchors and seeds."""
  base = figures[against]
  number, seeds = base.id.shape
  lines = [
    f'| {number} anchors x {seeds} seeds | ID | shifts '
    f'| against `{against}`: ID | shifts |',
    '|:--|--:|--:|--:|--:|',
  ]
  for name in order:
    found = figures[name]
    lines.append(
      f'| {name} | {found.id.mean():.2f} | {found.shifts.mean():.2f} '
      f'| {interval(found.id - base.id)} '
      f'| {interval(found.shifts - base.shifts)} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Chooses on validation, or tests what was chosen."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('phase', choices=('choose', 'test'))
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--anchors', type=int, default=2)
  args, overrides = parser.parse_known_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  weights = anchors(args.workdir, args.anchors)
  shifts = [spec for spec in data.BENCHMARKS.values() if spec.shift]
  on_validation = [
    spec._replace(split='validation')
    for spec in [data.find_benchmark('digits'), *shifts]
  ]
  validation = args.workdir / 'choose.json'
  if args.phase == 'choose':
    rows = measure(
      on_validation, RULES, weights, SEEDS['choose'], overrides, validation
    )
    figures = collect(rows)
    rule, end = choose(figures)
    print(f'\nChosen: {rule}; of one merge at the end: {end}.\n')
    print(table(figures, 'end, strength 1', list(figures)))
    return
  if not validation.exists():
    parser.error(f'{validation} is not there: choose first.')
  chosen = choose(collect(json.loads(validation.read_text('utf-8'))))
  config = config_lib.load(CONFIG, overrides)
  benchmarks = [data.find_benchmark(n) for n in config.evaluate.benchmarks]
  rule = chosen[0].rpartition(', strength')[0]
  names = ['end', 'epoch', 'own 15', 'end, reset', 'epoch, reset', rule]
  rows = measure(
    benchmarks,
    {name: RULES[name] for name in dict.fromkeys(names)},
    weights,
    SEEDS['test'],
    overrides,
    args.workdir / 'test.json',
  )
  figures = collect(rows)
  order = ['single', 'average', *(f'{name}, strength 1' for name in names)]
  order += chosen
  order = list(dict.fromkeys(order))
  print(table(figures, 'end, strength 1', order), '\n')
  print(table(figures, 'single', order), '\n')
  print(table(figures, 'end, reset, strength 1', order), '\n')
  for index, name in enumerate(weights):
    own = {
      k: Figures(f.id[index : index + 1], f.shifts[index : index + 1])
      for k, f in figures.items()
    }
    print(f'{name}:\n{table(own, "end, strength 1", order)}\n')


if __name__ == '__main__':
  main()
