"""Random numbers that depend on a key alone, any of them by itself.

They come from raw bits of a counter-based generator, which stay the same across numpy versions.
"""

import numpy as np


def uniform(shape: tuple[int, ...], *key: int, first: int = 0) -> np.ndarray:
    """fp64 above 0 and up to 1, shape [..., 4 n], whose rows are numbered from `first` on if each has 4 numbers."""
    generator = np.random.Philox(np.random.SeedSequence(key))
    generator.advance(first)  # a step of the counter makes four words of 64 bits
    bits = generator.random_raw(int(np.prod(shape))) >> np.uint64(11)
    return ((bits + 0.5) * 2.0**-53).reshape(shape)


def normal(count: int, *key: int, first: int = 0) -> np.ndarray:
    """fp64 [count, 4]: rows `first` and on of an endless table of standard normal numbers (Box and Muller)."""
    radius, angle = np.split(uniform((count, 4), *key, first=first), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)
