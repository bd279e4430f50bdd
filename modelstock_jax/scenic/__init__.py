"""Model Stock as a project of Google's Scenic: imported only on request.

Importing it needs Scenic, which is not on PyPI; where it is absent, or
another package has its name, the ImportError says what to install.
"""

import importlib.machinery
import importlib.util

# What this was tested with; Scenic has no releases.
COMMIT = '4a38d475ee89cb821078c0e2bf2065ee030e1535'
# Of Scenic's own requirements, those that the modules used here import.
NEEDS = ('clu', 'immutabledict', 'tensorboard', 'tensorflow')

_INSTALL = f"""
  pip install 'modelstock_jax[train,scenic]'
  pip install --no-deps 'scenic @ \
git+https://github.com/google-research/scenic@{COMMIT}'
or put a checkout of that commit on PYTHONPATH in place of the second line \
(without --no-deps it would replace optax)."""


def check() -> None:
  """Check that Google's Scenic can be imported.

  Raises:
    ImportError: Scenic is absent, is another project's, or lacks packages
      that it imports.
  """
  spec = importlib.util.find_spec('scenic')
  # Looked up, not imported: importing another project could fail in any way.
  places = spec.submodule_search_locations if spec else None
  look_up = importlib.machinery.PathFinder.find_spec
  if places is None or look_up('scenic.train_lib', places) is None:
    other = 'which is not installed'
    if spec:
      other = (
        'but the package named scenic that is installed is another project '
        "(PyPI's is Berkeley's Scenic): remove it with `pip uninstall scenic`"
      )
    raise ImportError(
      f"modelstock_jax.scenic needs Google's Scenic, {other}. Install it with"
      f'{_INSTALL}'
    )
  absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
  if absent:
    raise ImportError(
      f'Scenic is installed, but not what it imports: {", ".join(absent)}. '
      "Install them with\n  pip install 'modelstock_jax[train,scenic]'"
    )


check()
