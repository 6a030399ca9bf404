"""Rotary position embedding for positions of millions.

Angles are formed in fp64: in fp32 they are 0.08 rad wrong at position 2M. Cosines and sines are rounded once, to fp32
(fp64 models keep fp64), computed once per forward and shared by all softmax layers.
Shape letters: T local tokens, H heads, K head width. Dimension i is paired with i + K/2.
"""

from typing import NamedTuple

import torch
from torch import nn

from longspan.kernels import rotation as kernel


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles, each [T, 1, K/2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_angles(
    positions: torch.Tensor, head_size: int, *, base: float, scaling: float, dtype: torch.dtype
) -> Rotary:
    """Angles position * base'**(-2i/K) for i < K/2, as cosines and sines in `dtype`.

    positions: int64 [T], positions within the document. scaling > 1 is the NTK-aware stretch for longer contexts,
    base' = base * scaling**(K/(K-2)): the slowest dimension turns `scaling` times more slowly, the fastest as before.
    """
    if scaling != 1:
        base = base * scaling ** (head_size / (head_size - 2))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    angles = positions.to(torch.float64)[:, None, None] * base**-exponents
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def image_angles(rows: torch.Tensor, columns: torch.Tensor, head_size: int, **options) -> Rotary:
    """Axial angles of pixels (arXiv 2403.13298): a half of the pairs turns by row, the other by column.

    rows, columns: int64 [T]; head_size: a multiple of 4; options: those of `rotary_angles`, for half a head each.
    """
    halves = [rotary_angles(positions, head_size // 2, **options) for positions in (rows, columns)]
    return Rotary(*(torch.cat(parts, -1) for parts in zip(*halves)))


def rotate(x_THK: torch.Tensor, rotary: Rotary, norm: nn.Module | None = None) -> torch.Tensor:
    """Turns every head of every token by its angles, behind `norm`, an RMSNorm over heads, where there is one.

    The dtype of x is kept, arithmetic in the dtype of the angles.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return kernel.rotate(x_THK, rotary.cos, rotary.sin, weight, eps)
