"""Images made from a seed: a shaded background with waves, and shapes in front of one another.

A scene is a function of the place, so that every rank makes its own pixels alone, and the same scene exists in every
size. It has structure from single pixels (edges) to the whole image (shading, waves, shapes that hide others).
"""

import numpy as np

from longspan.launcher.random_bits import uniform

WAVES, SHAPES = 3, 8


def scene(rows: np.ndarray, columns: np.ndarray, size: int, *key: int) -> np.ndarray:
    """fp32 [T, 3] in [-1, 1]: pixels at rows and columns, int [T], of the scene of `key`, `size` pixels on a side."""
    numbers = uniform((2 + WAVES + SHAPES, 8), *key).astype(np.float32)
    place = np.stack([rows, columns], 1).astype(np.float32)
    place = (place + 0.5) / size - 0.5  # [T, 2], the same part of the scene in every size
    (*dark, turn, _, _, _, _), (*bright, _, _, _, _, _) = numbers[:2]
    along = 0.5 + place @ _direction(turn)
    image = np.outer(1 - along, dark) + np.outer(along, bright)
    for *colour, turn, frequency, phase, strength, _ in numbers[2 : 2 + WAVES]:
        wave = np.sin(2 * np.pi * (place @ _direction(turn) * (1 + 15 * frequency**2) + phase))
        image += np.outer(wave, 0.2 * strength * (np.array(colour) - 0.5))
    shapes = int(SHAPES * (0.5 + 0.5 * numbers[0, 4]))
    for *colour, row, column, height, width, kind in numbers[2 + WAVES :][:shapes]:
        offset = np.abs(place - (0.5 - np.array([row, column]))) / (0.05 + 0.25 * np.array([height, width]))
        ellipse, rectangle = np.sqrt((offset**2).sum(1)), offset.max(1)
        radius = ellipse if kind < 0.5 else rectangle
        inside = np.clip((1 - radius) * size * (0.05 + 0.25 * min(height, width)) + 0.5, 0, 1)[:, None]  # soft: a pixel
        image = (1 - inside) * image + inside * np.array(colour)
    return (2 * np.clip(image, 0, 1) - 1).astype(np.float32)


def _direction(turn):
    return np.array([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)], np.float32)
