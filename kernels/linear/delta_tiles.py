"""What the delta-rule kernels share: one call's tensors and sizes, tiles of tokens, decays inside a chunk.

Scratch tensors hold one tile per (chunk, head), [num_chunks, H, rows, columns], padded with zeros to powers of two and
to whole chunks, so that they are read without masks. Token tensors are [T, H, D].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.splits import LEFT_OUT_LOG2, Splits, padded

CHUNK = 64
LEFT_OUT = tl.constexpr(LEFT_OUT_LOG2 * math.log(2))
SMALLEST_BETA = 2.0**-20  # of the Hopper kernels, which divide by it; lost in the rounding of 16-bit numbers
SEARCHED = tl.constexpr(32)  # chunks whose decays are read at once


class Prepared(NamedTuple):
    """What `delta_prepare` makes: T and P, both [tiles, C, C]; rows [tiles, 2, C, 4], fp32 (`load_row`)."""

    inverse: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Call:
    """q, k: [T, H, K]; v: [T, H, V], one dtype, unit stride in the last dimension; log_decay: None, [H], [T, H] or
    [T, H, K]; beta: [T, H].

    With a decay per key channel the sweeps take another call, made by `kda_prepare.swept`, whose q and k have decayed
    from the start of their chunk (q also scaled: `scale` is 1), and which has `write`, k decayed to the end of the
    chunk, with the strides of k, and `total`, log decays of whole chunks, fp32 [tiles, padded K]."""

    splits: Splits
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor
    scale: float
    write: torch.Tensor | None = None
    total: torch.Tensor | None = None

    @property
    def num_tiles(self) -> int:
        return self.splits.num_chunks * self.heads

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """K and V, padded."""
        return padded(self.k.shape[2]), padded(self.v.shape[2])

    @property
    def chunks(self):
        return self.splits.chunk_first, self.splits.chunk_length

    @property
    def decay_strides(self):
        """Of tokens and heads in log_decay."""
        g = self.log_decay
        return (0, 0) if g is None else (0, g.stride(0)) if g.ndim == 1 else g.stride()[:2]

    @property
    def constants(self) -> dict:
        """Compile-time arguments that all kernels have."""
        block_k, block_v = self.widths
        precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"
        return dict(
            K=self.k.shape[2], V=self.v.shape[2], BLOCK_K=block_k, BLOCK_V=block_v, CHUNK=CHUNK,
            GATE=self.log_decay is not None, PRECISION=precision,
        )  # fmt: skip

    def columns(self, table, limit):
        """Columns per program and launch options from {element size: {padded K: (columns, warps, stages, registers)}},
        where registers may be left to the compiler; not more columns than `limit`. Rows of (element size, "channel") go
        before with a decay per key channel."""
        columns, warps, stages, *registers = config(
            table, self.q.element_size(), self.widths[0], self.write is not None
        )
        fitting = min(columns, limit)
        return fitting, launch_options(max(4, warps * fitting // columns), stages, *registers)

    def room_for_prepared(self) -> Prepared:
        square = CHUNK, CHUNK
        return Prepared(self.scratch(*square), self.scratch(*square), self.scratch(2, CHUNK, 4, dtype=torch.float32))

    def scratch(self, *shape, dtype=None):
        return self.q.new_empty(self.splits.num_chunks, self.heads, *shape, dtype=dtype or self.q.dtype)


def config(table, size, width, per_channel):
    """The row of such a table."""
    special = table.get((size, "channel"), {}) if per_channel else {}
    return special.get(width) or table[size][width]


def launch_options(warps, stages, registers=None) -> dict:
    return dict(num_warps=warps, num_stages=stages, maxnreg=registers)


@triton.jit
def load_tokens(ptr, stride, length, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """[CHUNK, columns] of the tokens from `ptr` on; zero after `length` tokens and, unless ALL, WIDTH columns."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[:, None]
    if not ALL:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + token[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_tokens_transposed(ptr, stride, length, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """The same as [columns, CHUNK]."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[None, :]
    if not ALL:
        mask = mask & (column < WIDTH)[:, None]
    return tl.load(ptr + token[None, :] * stride + column[:, None], mask=mask, other=0.0)


@triton.jit
def store_tokens(ptr, stride, length, column, value, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Stores [CHUNK, columns]."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(ptr + token[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(rows_ptr, tile, ROW: tl.constexpr, CHUNK: tl.constexpr):
    """One number per token of a chunk. 0: beta, 1: exp(G), 2: beta exp(G), 4: exp(G_C - G), 5: G rounded to fp32, 6:
    what the rounding left. Without a gate only beta is there. Rows 0 to 3 of a token lie side by side, and 4 to 7."""
    return tl.load(rows_ptr + (tile * 2 + ROW // 4) * (4 * CHUNK) + tl.arange(0, CHUNK) * 4 + ROW % 4)


@triton.jit
def load_rows(rows_ptr, tile, FIRST: tl.constexpr, CHUNK: tl.constexpr):
    """Three rows from FIRST, 0 or 4, on. In one load: smaller ones would be repeated for every layout in which they are
    used, and all of these copied ahead, with an address each in registers."""
    at = tl.arange(0, CHUNK)[:, None] * 4 + tl.arange(0, 4)[None, :]
    rows = tl.load(rows_ptr + (tile * 2 + FIRST // 4) * (4 * CHUNK) + at)
    even, odd = tl.split(tl.reshape(rows, [CHUNK, 2, 2]))
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit
def load_total_decay(rows_ptr, tile, CHUNK: tl.constexpr):
    """exp(G_C)."""
    return tl.load(rows_ptr + tile * (8 * CHUNK) + (4 * CHUNK - 3))


@triton.jit
def load_channel_decays(total_ptr, tile, key, BLOCK_K: tl.constexpr):
    """exp(G_C) of every key channel."""
    return tl.exp(tl.load(total_ptr + tile * BLOCK_K + key))


@triton.jit
def load_decay_between(rows_ptr, tile, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr):
    """Lambda: exp(G_i - G_j) for i >= j, else 0; i counts rows, columns if TRANSPOSED. EXACT: where a G of thousands,
    whose rounding error is 1e-4, would be felt."""
    token = tl.arange(0, CHUNK)
    g = load_row(rows_ptr, tile, 5, CHUNK)
    log = g[:, None] - g[None, :]
    if EXACT:
        rest = load_row(rows_ptr, tile, 6, CHUNK)
        log += rest[:, None] - rest[None, :]
    if TRANSPOSED:
        log = tl.where(token[:, None] <= token[None, :], -log, float("-inf"))
    else:
        log = tl.where(token[:, None] >= token[None, :], log, float("-inf"))
    return tl.exp(log)


@triton.jit
def count_remembered(rows_ptr, tile, step, chunks, CHUNK: tl.constexpr):
    """Of `chunks` chunks, that of `tile` and others `step` tiles apart each: how many can be passed, in this order,
    before the decay through all that were passed is below LEFT_OUT. As |I - beta k k^T| <= 1, nothing that is beyond
    the next one can be felt before the first. NaN is not forgotten."""
    number = tl.arange(0, SEARCHED)
    passed, remembered, log_decay = 0, 0, 0.0
    while (passed < chunks) & (passed == remembered):
        left = chunks - passed
        at = rows_ptr + (tile + (passed + number) * step) * (8 * CHUNK) + 8 * CHUNK - 3
        through = log_decay + tl.cumsum(tl.load(at, mask=number < left, other=0.0), 0)
        remembered += tl.sum(((number < left) & ~(through < LEFT_OUT)).to(tl.int32), 0)
        log_decay = tl.min(through, 0)
        passed += tl.minimum(left, SEARCHED)
    return remembered
