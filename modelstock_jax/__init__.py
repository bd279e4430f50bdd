"""Model Stock in JAX: `import modelstock_jax as ms` gives the merge.

Training, networks, data and the command line are sub-packages, imported by
name; what is here needs nothing but jax.
"""

from typing import TYPE_CHECKING
from typing import Any

from modelstock_jax import merging

if TYPE_CHECKING:
  from modelstock_jax.merging import *  # noqa: F403

__version__ = '0.1.0'

__all__ = merging.__all__


def __getattr__(name: str) -> Any:
  # On first use, so that `modelstock --help` does not wait for jax.
  if name in __all__:
    return getattr(merging, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*globals(), *__all__]
