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
  found = importlib.util.find_spec('scenic')
  if found is None:
    raise ImportError(
      "modelstock_jax.scenic needs Google's Scenic, which is not installed "
      f"(the 'scenic' of PyPI is another project). Install it with{_INSTALL}"
    )
  # Looked up, not imported: importing another project could fail in any way.
  places = found.submodule_search_locations
  look_up = importlib.machinery.PathFinder.find_spec
  if look_up('scenic.train_lib', places) is None:
    other = 'The package named scenic that is installed'
    if look_up('scenic.syntax', places) is not None:
      other = "Berkeley's Scenic is installed (PyPI's 'scenic'), which"
    raise ImportError(
      f"modelstock_jax.scenic needs Google's Scenic. {other} is another "
      'project of that name: remove it with `pip uninstall scenic`, or use '
      f'another environment, and install{_INSTALL}'
    )
  absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
  if absent:
    raise ImportError(
      f'Scenic is installed, but not what it imports: {", ".join(absent)}. '
      "Install them with\n  pip install 'modelstock_jax[train,scenic]'"
    )


check()
