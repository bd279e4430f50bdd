"""The commands of the documentation, and how the tests run them.

Every line of every ```sh block in README.md and docs/ is in one of two tables:
`RUN`, with the flags that are appended to make it short, or `NOT_RUN`, with the
reason. A command in neither is an error.
"""

import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

from experiments.geometry import analyses

ROOT = pathlib.Path(__file__).parents[2]
FENCE = re.compile(
  r'^(?P<indent> *)```(?P<kind>\w*)(?P<rest>[^\n]*)\n(?P<body>.*?)'
  r'^(?P=indent)```$',
  re.DOTALL | re.MULTILINE,
)
# What a shell block may not be called, so that none is overlooked.
OTHER_SHELLS = {'', 'bash', 'shell', 'console', 'zsh', 'shell-session'}


class Run(NamedTuple):
  """The way a command is run."""

  flags: str = ''  # appended
  before: str = ''  # run first, in the same folder
  # Where the foreign oracles are, for what needs TensorFlow or libtpu.
  oracle: bool = False
  # There as well, and where Scenic is.
  scenic: bool = False

  @property
  def here(self) -> bool:
    """True if what `make test-docs` installs is enough."""
    return not self.oracle and not self.scenic


# Two epochs of two steps.
DIGITS = (
  " --config.data.train='train[:100]' --config.train.epochs=2"
  ' --config.train.warmup_steps=1 --config.evaluate.every_epochs=1'
  " --config.evaluate.benchmarks=\"('digits','noise')\""
)
# What trains many models takes a CLIP that is narrow and flat, for digits.
TINY = (
  ' --config.anchor.weights=tiny.safetensors --config.model.embed_dim=8'
  ' --config.model.image.width=8 --config.model.image.depth=2'
  ' --config.model.image.heads=2 --config.model.text.width=8'
  ' --config.model.text.heads=2'
)
# One epoch of two steps, of a CLIP that is narrow and flat, on nine images.
IMAGENET = (
  ' --config.anchor.weights=clip --config.anchor.prompts=prompts.json'
  ' --config.model.embed_dim=16 --config.model.dtype=float32'
  ' --config.model.image.width=64 --config.model.image.depth=2'
  ' --config.model.image.heads=1 --config.model.text.width=64'
  ' --config.model.text.depth=1 --config.model.text.heads=1'
  ' --config.train.epochs=1 --config.train.batch_size=4'
  ' --config.data.train=train:without=2'
  ' --config.data.validation=train:held_out=2'
  ' --config.train.warmup_steps=1 --config.evaluate.batch_size=16'
)
# Two narrow blocks, which compile in seconds.
PLAN = (
  ' --config.model.embed_dim=128 --config.model.image.width=192'
  ' --config.model.image.depth=2 --config.model.image.heads=3'
  ' --config.model.image.image_size=112 --config.train.batch_size=64'
  ' --config.evaluate.batch_size=64'
)
TRAIN_B32 = (
  'modelstock train --config=configs/clip_vit_b32.py --workdir=runs/b32 '
  '--config.data.data_dir=data'
)
PLAN_L14 = 'modelstock plan --config=configs/clip_vit_l14.py --topology=v5e:2x4'
MERGE = 'modelstock merge --anchor pretrained'
INSPECT = 'modelstock inspect pretrained seed_0 seed_1'
SOUP = 'modelstock merge --method soup'
MERGE_SHARED = (
  f'{MERGE} --models seed_0 seed_1 --output shared --num_processes 2 '
  '--process_id'
)
MERGE_ADAPTERS = f'{MERGE} --models adapter_0 adapter_1 --output'
MERGE_ORBAX = (
  'modelstock merge --anchor orbax/pretrained '
  '--models orbax/seed_0 orbax/seed_1'
)

RUN = {
  # Digits.
  'modelstock train --config=digits --workdir=runs/mine '
  '--config.merge.every=5': Run(DIGITS),
  'modelstock train --config=digits --workdir=runs/mine': Run(DIGITS),
  'modelstock train --config=configs/digits.py --workdir=runs/geometry '
  '--config.merge.every=end': Run(DIGITS),
  'modelstock train --config=experiments/baselines/flyp.py '
  '--workdir=runs/flyp': Run(DIGITS),
  'modelstock evaluate --workdir=runs/mine '
  '--benchmarks=digits,noise,fonts': Run(),
  'modelstock evaluate --workdir=runs/flyp '
  '--config=experiments/baselines/flyp.py': Run(),
  'modelstock evaluate --checkpoint=merged --benchmarks=digits,noise': Run(),
  'python -m experiments.geometry --workdir=runs/geometry': Run(
    ' --benchmarks=digits,noise --only=consistency'
  ),
  'modelstock report --workdir=runs/mine': Run(),
  'python -m experiments.soups --config=experiments/soups/digits_grid.py '
  '--workdir=runs/grid': Run(
    DIGITS + TINY + " --config.grid.num_models=4 --config.grid.epochs='(1,2)'"
  ),
  'python -m experiments.geometry --workdir=runs/grid': Run(
    ' --benchmarks=digits,noise --only=consistency,scatter'
  ),
  'modelstock convert runs/mine merged --format=huggingface': Run(),
  'modelstock convert runs/mine exported --format=huggingface': Run(),
  'modelstock convert runs/mine to_share --format=huggingface --license=mit '
  '--push=user/name --dry-run': Run(),
  'modelstock convert runs/b32 for_open_clip --format=open_clip': Run(
    before=TRAIN_B32 + IMAGENET
  ),
  'modelstock convert runs/b32 for_scenic --format=scenic': Run(),
  'modelstock convert for_open_clip for_transformers '
  '--format=huggingface': Run(),
  'modelstock convert for_open_clip image_tower --format=huggingface '
  '--vision-only': Run(),
  'modelstock data check': Run(),
  'modelstock --print-completion bash > '
  '~/.local/share/bash-completion/completions/modelstock': Run(
    before='HOME=$PWD && mkdir -p ~/.local/share/bash-completion/completions'
  ),
  # ImageNet.
  'modelstock data prepare imagenet --data_dir=data': Run(
    before='rm -rf data/imagenet2012', oracle=True
  ),
  **{
    f'modelstock data prepare imagenet_{name} --data_dir=data': Run(oracle=True)
    for name in ('v2', 'r', 'sketch', 'a')
  },
  'modelstock data convert tfds/imagenet2012/5.1.0 data': Run(
    before='rm -rf data/imagenet2012', oracle=True
  ),
  'modelstock data check --data_dir=data': Run(),
  PLAN_L14: Run(PLAN, oracle=True),
  TRAIN_B32: Run(IMAGENET),
  'modelstock evaluate --workdir=runs/b32': Run(),
  'python -m experiments.geometry --workdir=runs/b32 --only=consistency': Run(),
  'modelstock report --workdir=runs/b32': Run(),
  'modelstock convert runs/b32 merged --format=huggingface': Run(),
  'modelstock evaluate --checkpoint=merged --data_dir=data '
  '--benchmarks=imagenet,imagenet_v2': Run(
    # In README.md `merged` is the model of the digits by then.
    before='rm -rf merged && '
    'modelstock convert runs/b32 merged --format=huggingface'
  ),
  # Pictures: one epoch of four steps.
  'modelstock init birds': Run(),
  'modelstock data import pictures --data_dir=prepared': Run(),
  'modelstock data check pictures --data_dir=prepared --all': Run(),
  'modelstock train --config=own_data --workdir=runs/pictures': Run(
    ' --config.anchor.weights=clip --config.model.dtype=float32'
    ' --config.train.epochs=1 --config.train.batch_size=8'
  ),
  'modelstock train --config=own_data --workdir=runs/in_place '
  '--config.data.dataset=folder:pictures': Run(
    ' --config.anchor.weights=clip --config.model.dtype=float32'
    ' --config.train.epochs=1 --config.train.batch_size=8'
  ),
  'modelstock evaluate --workdir=runs/pictures --corruptions': Run(),
  'modelstock report --workdir=runs/pictures': Run(),
  # Files.
  'modelstock merge --anchor zeroshot.pt --models model_1.pt model_2.pt '
  '--no-clip --output soup.safetensors': Run(),
  'modelstock evaluate --checkpoint=soup.safetensors --data_dir=data': Run(),
  'modelstock evaluate --checkpoint=model_1.pt --benchmarks=paper_b32 '
  '--data_dir=data': Run(),
  'modelstock convert soup.safetensors soup --format=huggingface': Run(),
  'modelstock convert epoch_3.pt from_open_clip --format=open_clip '
  '--activation=gelu': Run(),
  'modelstock merge --anchor clip --models runs/b32 runs/b32_again '
  '--output merged_runs.safetensors': Run(
    before='[ -d runs/b32 ] || '
    + TRAIN_B32
    + IMAGENET
    + '\n'
    + TRAIN_B32.replace('runs/b32', 'runs/b32_again')
    + IMAGENET
    + ' --config.seed=1'
  ),
  f'{MERGE} --models seed_0 seed_1 --output merged': Run(
    before='rm -rf merged'  # README.md names several things so
  ),
  f'{MERGE}.safetensors --models a.safetensors b.safetensors '
  '--output merged.safetensors': Run(),
  f'{MERGE} --models seed_0 seed_1 --output merged_qkv '
  "--layers '(.*)[.][qkv]_proj[.](.*)'": Run(),
  f'{MERGE_SHARED} 0': Run(f' & {MERGE_SHARED} 1 && wait $!'),
  f'{MERGE_ADAPTERS} merged_adapter': Run(),
  f'{MERGE_ADAPTERS} merged_rank_4 --rank 4': Run(),
  f'{MERGE_ADAPTERS} merged_weights --dense': Run(),
  f'{MERGE_ORBAX} --output orbax/merged': Run(),
  f'{MERGE_ORBAX} '
  "--output orbax/merged_layers --stacked 'params/encoder/blocks/.*=0'": Run(),
  f'{MERGE_ORBAX} '
  "--output encoder.safetensors --select 'params/encoder/.*'": Run(
    before='python restore_merged.py'
  ),
  'python -m json.tool merged/model_stock.json': Run(),
  **{
    command: Run()
    for command in (
      INSPECT,
      f'{INSPECT} --output look.json',
      f'{SOUP} --models seed_0 seed_1 --output soup --weights 0.7 0.3',
      f'{SOUP} --decay sqrt --models seed_0 seed_1 --output decayed',
      'modelstock merge --method lines --anchor pretrained '
      '--models seed_0 seed_1 --output scaled',
      'modelstock merge --method wise_ft --anchor pretrained --models seed_0 '
      '--output swept --alphas 0.3 0.5 0.7',
    )
  },
  'modelstock merge mergekit.yaml merged_by_recipe': Run(),
  # Scenic: one epoch of sixteen steps.
  'python -m modelstock_jax.scenic.main '
  '--config=configs/scenic_tiny_vit_digits.py '
  '--workdir=runs/tiny_vit': Run(
    ' --config.num_training_epochs=1', scenic=True
  ),
  # Examples and experiments.
  'python docs/examples/linen.py': Run(),
  'python docs/examples/train_nnx.py': Run(),
  'modelstock train --config=docs/examples/train_linen.py '
  '--workdir=runs/own': Run(' --config.train.epochs=1'),
  'modelstock evaluate --workdir=runs/own '
  '--config=docs/examples/train_linen.py': Run(),
  'python -m experiments.first_run --config=configs/clip_vit_b32.py '
  '--workdir=runs/first --config.data.data_dir=data': Run(
    IMAGENET + ' --rungs=one_epoch,merged_once --keep_going'
    ' || grep -q merged_once runs/first/first_run.json'
  ),
  'python -m experiments.table_comparison --workdir=runs/table --seeds=5': Run(
    DIGITS
    + TINY
    + " --seeds=2 --config.grid.num_models=4 --config.grid.epochs='(1,2)'"
  ),
  # Groups of four models: what the figures share is trained here.
  'python -m experiments.geometry.post_training --workdir=runs/figures': Run(
    DIGITS + TINY + ' --seeds=4'
  ),
  **{
    f'python -m experiments.geometry.study {part} --workdir=runs/figures': Run(
      DIGITS + TINY + ' --seeds=2'
    )
    for part in ('consistency', 'shell')
  },
}


def check_make(text: str) -> None:
  """The targets are there; what they do is what .ci/run does."""
  done = subprocess.run(
    ['make', '--dry-run', *shlex.split(text)[1:]],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def check_pip(text: str) -> None:
  """The extras are those of setup.py, the versions those of constraints.txt."""
  *_, what = shlex.split(text)
  pins = (ROOT / 'constraints.txt').read_text('utf-8').splitlines()
  if '==' in what:
    assert what in pins
    return
  if what.startswith('scenic @ '):  # the commit that is asked for elsewhere
    source = ROOT / 'modelstock_jax' / 'scenic' / '__init__.py'
    (commit,) = re.findall(r"COMMIT = '(\w+)'", source.read_text('utf-8'))
    repository = 'git+https://github.com/google-research/scenic'
    assert what == f'scenic @ {repository}@{commit}'
    return
  extras = re.fullmatch(r'\.(?:\[(.+)\])?', what)
  assert extras, what
  known = importlib.metadata.metadata('modelstock_jax').get_all(
    'Provides-Extra'
  )
  assert {*filter(None, (extras[1] or '').split(','))} <= {*(known or ())}


def check_gcloud(text: str) -> None:
  """Check that the hosts run a command that is run here."""
  (inner,) = re.findall(r"--command='cd modelstock_jax && (.+)'$", text)
  assert inner.replace('/mnt/', '') in RUN


def check_bucket(text: str) -> None:
  """Check that the same is run here with files."""
  assert (
    text.replace('gs://bucket/', '').replace('from_bucket', 'merged') in RUN
  )


def check_part(text: str) -> None:
  """Check that the part is one of those that are drawn elsewhere."""
  assert shlex.split(text)[3] in analyses.PARTS


NETWORK = 'takes the network'
OWN_TARGET = 'makes an environment; .ci/run calls it, or its parts'
# By the exact text: why it is not run, and what is checked of it.
NOT_RUN = {
  'make demo': (OWN_TARGET, check_make),
  'make docs': (OWN_TARGET, check_make),
  'make test': (OWN_TARGET, check_make),
  'make test-oracles': (OWN_TARGET, check_make),
  'make test-hosts': (OWN_TARGET, check_make),
  'pip install .': (NETWORK, check_pip),
  "pip install '.[train]'": (NETWORK, check_pip),
  "pip install '.[files]'": (NETWORK, check_pip),
  "pip install '.[train,tpu]'": (NETWORK, check_pip),
  "pip install '.[train,prepare]'": (NETWORK, check_pip),
  'pip install --no-deps open_clip_torch==3.3.0': (NETWORK, check_pip),
  "pip install '.[train,scenic]'": (NETWORK, check_pip),
  "pip install --no-deps 'scenic @ git+https://github.com/google-research/"
  "scenic@4a38d475ee89cb821078c0e2bf2065ee030e1535'": (NETWORK, check_pip),
  **{
    f'python -m experiments.geometry.study {part} --workdir=runs/figures': (
      'tests/experiments/test_geometry.py draws it',
      check_part,
    )
    for part in ('landscape', 'distance', 'scatter')
  },
  'modelstock merge --anchor gs://bucket/pretrained '
  '--models gs://bucket/seed_0 gs://bucket/seed_1 --output from_bucket': (
    'takes a bucket',
    check_bucket,
  ),
  'gcloud compute tpus tpu-vm ssh NAME --worker=all '
  "--command='cd modelstock_jax && modelstock train "
  '--config=configs/clip_vit_b32.py --workdir=/mnt/runs/b32 '
  "--config.data.data_dir=/mnt/data'": ('takes a pod', check_gcloud),
}


def pages() -> list[pathlib.Path]:
  """README.md and the pages of the site."""
  return [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def commands(text: str) -> list[str]:
  """The commands of a page's ```sh blocks, one for each line.

  Args:
    text: of the page.

  Returns:
    Commands without comments, continued lines joined.
  """
  actual = []
  for block in FENCE.finditer(text):
    if block['kind'] == 'sh':
      body = re.sub(r' *\\\n *', ' ', block['body'])
      lines = (re.sub(r'(^|\s)#\s.*$', '', line) for line in body.split('\n'))
      actual += [line.strip() for line in lines if line.strip()]
  return actual


def problems(text: str) -> list[str]:
  """Return what is not covered of a page."""
  actual = [
    f'{command}: is neither in RUN nor in NOT_RUN of {__name__}'
    for command in commands(text)
    if command not in RUN and command not in NOT_RUN
  ]
  for block in FENCE.finditer(text):
    kind = block['kind'] or block['rest'].strip()
    classes = {*re.findall(r'\.(\w+)', kind)}
    if kind in OTHER_SHELLS or classes & {'sh', *OTHER_SHELLS}:
      actual.append(f'A block of kind {kind!r}: call shell blocks sh')
  return actual


def titled(text: str) -> dict[str, str]:
  """The blocks of a page that show a file, by its name."""
  return {
    name[1]: block['body']
    for block in FENCE.finditer(text)
    if (name := re.search(r'title="([^"]+)"', block['rest']))
  }


def run(command: str, folder: pathlib.Path) -> None:
  """Runs a command as a reader would, in a shell, with its flags appended."""
  how = RUN[command]
  lines = [line for line in (how.before, command + how.flags) if line]
  done = subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', '\n'.join(lines)],
    cwd=folder,
    env={
      **os.environ,
      'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '1',
      'PYTHONWARNINGS': '',
    },
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, (
    f'{lines}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
  )


def furnish(folder: pathlib.Path) -> None:
  """Link what a copy of the repository has, where a page's commands are run."""
  for name in ('configs', 'docs', 'experiments'):
    shutil.copytree(
      ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  (folder / 'modelstock_jax').symlink_to(ROOT / 'modelstock_jax')
