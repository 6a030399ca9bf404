"""Images made from a seed: a shaded background with waves, and shapes in front of one another.

A scene is a function of the place, so that every rank makes its own pixels alone, and the same scene exists in every
size. It has structure from single pixels (edges) to the whole image (shading, waves, shapes that hide others).
"""

import numpy as np

from longspan.launcher.random_bits import uniform

WAVES, SHAPES = 3, 8


def scene(rows: np.ndarray, columns: np.ndarray, size: int, *key: int) -> np.ndarray:
    """fp32 [T, 3] in [-1, 1]: pixels at rows and columns, int [T], of the scene of `key`, `size` pixels on a side."""
    numbers = uniform((2 + WAVES + SHAPES, 8), *key)
    # From -0.5 to 0.5, the same part of the scene in every size; element by element, so that each pixel is by itself.
    row, column = ((np.asarray(x, np.float64) + 0.5) / size - 0.5 for x in (rows, columns))

    def along(turn):
        return row * np.cos(2 * np.pi * turn) + column * np.sin(2 * np.pi * turn)

    (*dark, turn, many, _, _, _), (*bright, _, _, _, _, _) = numbers[:2]
    image = np.outer(0.5 - along(turn), dark) + np.outer(0.5 + along(turn), bright)
    for *colour, turn, frequency, phase, strength, _ in numbers[2 : 2 + WAVES]:
        wave = np.sin(2 * np.pi * (along(turn) * (1 + 15 * frequency**2) + phase))
        image += np.outer(wave, 0.2 * strength * (np.array(colour) - 0.5))
    for *colour, down, right, height, width, kind in numbers[2 + WAVES :][: int(SHAPES * (0.5 + 0.5 * many))]:
        height, width = 0.05 + 0.25 * height, 0.05 + 0.25 * width
        y, x = np.abs(row + down - 0.5) / height, np.abs(column + right - 0.5) / width
        radius = np.sqrt(y * y + x * x) if kind < 0.5 else np.maximum(y, x)
        inside = np.clip((1 - radius) * size * min(height, width) + 0.5, 0, 1)[:, None]  # the edge is a pixel wide
        image = (1 - inside) * image + inside * np.array(colour)
    return (2 * np.clip(image, 0, 1) - 1).astype(np.float32)
