"""Packaging: `pip install .` brings the merge, extras bring the rest."""

import os
import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def version() -> str:
  """The version, from the one place that states it."""
  text = (ROOT / 'modelstock_jax' / '__init__.py').read_text(encoding='utf-8')
  match = re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE)
  assert match is not None
  return match[1]


# Where the repository is, as the release workflow knows it.
HOME = os.environ.get('PROJECT_URL')


def readme() -> str:
  """The README, whose links to files lead to the repository if it is known."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  files = f']({HOME}/blob/v{version()}/'
  return re.sub(r'\]\((?!https://|#)', files, text) if HOME else text


# Lower bounds are those of constraints-oldest.txt, which the tests pass with;
# constraints.txt holds the newest known-good versions.
TRAIN = [
  'absl-py>=1.4.0',
  'array_record>=0.8.1',
  'etils>=1.9.1',
  'flax>=0.12.1',
  'grain>=0.2.15',
  'huggingface_hub>=0.20.0',
  'importlib_resources>=5.12.0',  # imported, not asked for, by tfds
  'jinja2>=3.1.6',
  'matplotlib>=3.9.0',
  'ml_collections>=1.0.0',
  'optax>=0.2.5',
  'orbax-checkpoint>=0.11.25',
  'pillow>=9.5.0',
  'pyarrow>=17.0.0',  # data sets of Hugging Face; tfds brings it as well
  'pydantic>=2.10.6',
  'pyyaml>=6.0.1',
  'safetensors>=0.4.3',
  'simplejpeg>=1.8.1',
  'tabulate>=0.10.0',  # preserve_whitespace
  'tensorboardX>=2.6.2.2',
  'tensorflow-datasets>=4.9.10',  # 4.9.9 breaks with protobuf 7
  'tokenizers>=0.19.1',
  'tqdm>=4.60.0',
]
# What Google's Scenic imports. Scenic itself is not on PyPI, where another
# project has its name: see modelstock_jax/scenic/__init__.py.
SCENIC = [
  'clu',
  'immutabledict',
  'tensorboard',  # of clu's metric writers
  'tensorflow-cpu',
]
TEST = [
  'dm-haiku',
  'equinox',
  'hypothesis',
  'pytest',
  'pytest-xdist',
  'scikit-learn>=1.5.0',
  'shtab',
]

setuptools.setup(
  name='modelstock_jax',
  version=version(),
  description='Model Stock in JAX: train two, merge on device, by the angle.',
  long_description=readme(),
  long_description_content_type='text/markdown',
  project_urls={'Source': HOME} if HOME else {},
  license_expression='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  packages=[
    *setuptools.find_packages(include=['modelstock_jax', 'modelstock_jax.*']),
    'modelstock_jax.configs',
  ],
  package_dir={'modelstock_jax.configs': 'configs'},
  package_data={
    'modelstock_jax': [
      'py.typed',
      '**/*.toml',
      'data/prepared/**',
      'report/templates/*',
      '**/*.safetensors',
    ]
  },
  # 0.8.1 is the first whose distributed.initialize takes all three time-outs:
  # initialization (always), heartbeat (0.7.0), shutdown (0.8.1).
  install_requires=['jax>=0.8.1', 'numpy>=2.0.0'],
  extras_require={
    'train': TRAIN,
    # modelstock merge
    'files': [
      'matplotlib>=3.9.0',
      'pyyaml>=6.0.1',
      'safetensors>=0.4.3',
      'tensorstore>=0.1.81',
      'tqdm>=4.60.0',
    ],
    # The digits of experiments/digits, in a clone, are scikit-learn's.
    'prepare': ['scikit-learn>=1.5.0', 'tensorflow-cpu'],
    'completion': ['shtab'],  # modelstock --print-completion
    'wandb': ['wandb'],  # modelstock train --log=wandb
    'scenic': SCENIC,
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
    'test': TEST,
    'lint': ['pyrefly', 'ruff'],
    'docs': [
      'ipykernel',
      'latex2mathml',
      'mkdocs-material>=9.7.5',  # keeps mkdocs below 2
      'mkdocstrings[python]>=1',
      'nbclient',
      'ruff',  # lays out the signatures
    ],
    # And, with --no-deps, mergekit, clip-anytorch and open_clip_torch, of each
    # of which a file or two are used; peft with its accelerate; datasets
    # and webdataset, and moto with its server of S3, with what they import.
    'oracle': [
      *SCENIC,
      'jax[tpu]',  # its compiler; there need be no TPU
      'torch',
      'transformers>=5',
      'wandb',
    ],
  },
  entry_points={
    'console_scripts': ['modelstock = modelstock_jax.cli.main:main']
  },
)
