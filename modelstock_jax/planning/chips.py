"""TPUs: their memory, their peak, and how many of them can be asked for."""

from typing import Any
from typing import NamedTuple

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
