"""`python -m modelstock_jax`: the same as `modelstock`."""

import sys

from modelstock_jax.cli import main

if __name__ == '__main__':
  sys.exit(main.main())
