"""Two devices for the commands that compile: eight take longer."""

import jax
import pytest


@pytest.fixture(scope='module')
def two_devices():
  """The first two devices, as all that there are."""
  devices = jax.devices()[:2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: devices)
    yield
