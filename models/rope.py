"""Rotary position embedding for positions of millions.

Angles are formed in fp64: in fp32 they are 0.08 rad wrong at position 2M. Cosines and sines are rounded once, to fp32
(fp64 models keep fp64), computed once per forward and shared by all softmax layers.
Shape letters: T local tokens, H heads, K head width. Dimension i is paired with i + K/2.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from longspan.kernels import rotation as kernel


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles, each [T, 1, K/2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_angles(
    positions: torch.Tensor,
    head_size: int,
    *,
    base: float,
    scaling: float,
    dtype: torch.dtype,
    kind: str = "ntk",
    trained: int = 0,
) -> Rotary:
    """Angles position * base**(-2i/K) for i < K/2, as cosines and sines in `dtype`.

    positions: int64 [T], positions within the document. scaling > 1 slows dimensions down for contexts that many times
    longer than before, in the way of `kind`, one of FREQUENCIES; trained: tokens of context before, of llama3 and yarn.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    frequencies, length = base**-exponents, 1.0
    if scaling != 1:
        frequencies, length = FREQUENCIES[kind](frequencies, base, scaling, trained)
    angles = positions.to(torch.float64)[:, None, None] * frequencies
    return Rotary((angles.cos() * length).to(dtype), (angles.sin() * length).to(dtype))


def ntk(frequencies, base, scaling, trained):
    """base' = base * scaling**(K/(K-2)): the slowest dimension turns `scaling` times more slowly, the fastest as
    before."""
    slowness = torch.linspace(0, 1, len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return frequencies * scaling**-slowness, 1.0


def llama3(frequencies, base, scaling, trained):
    """Llama 3.1: slowed whole below one turn in `trained` tokens, not at all above four, linearly between."""
    kept = ((trained * frequencies / (2 * math.pi) - 1) / 3).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling), 1.0


def yarn(frequencies, base, scaling, trained):
    """YaRN (arXiv 2309.00071) as its public code has it: slowed whole below one turn in `trained` tokens, not at all
    above 32, between linearly in the dimension's index; queries and keys grow by 1 + ln(scaling) / 10."""
    count = len(frequencies)
    fast, slow = (count * math.log(trained / (2 * math.pi * turns)) / math.log(base) for turns in (32, 1))
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * count - 1)
    indices = torch.arange(count).to(frequencies)
    kept = 1 - ((indices - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling), 1 + math.log(scaling) / 10


# model.rope_type: what gives, from frequencies [K/2] of `base`, those for `scaling` times the context of `trained`
# tokens, and the length that rotated vectors are multiplied by
FREQUENCIES = {"ntk": ntk, "llama3": llama3, "yarn": yarn}


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
