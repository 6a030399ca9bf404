"""Morton order (quad-tree order) of the pixels of a square image with a power of two on a side.

Every run of 4^n pixels that starts at a multiple of 4^n is a square, so blocks of tokens are patches of the image, on
any number of levels. The bits of a place in this order are those of column and row in turn, the column's lowest first;
so the place alone says where a pixel is, whatever the size of the image.
"""

import numpy as np

# (shift, mask) that bring every second bit of 64 together, halving the gaps each time.
_STEPS = ((1, 0x3333333333333333), (2, 0x0F0F0F0F0F0F0F0F), (4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF),
          (16, 0x00000000FFFFFFFF))  # fmt: skip


def coordinates(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, int64, of places in Morton order, int64 of the same shape, each >= 0."""
    return _every_second_bit(places >> 1), _every_second_bit(places)


def _every_second_bit(x):
    x = x & 0x5555555555555555
    for shift, mask in _STEPS:
        x = (x | (x >> shift)) & mask
    return x
