"""Rotation of heads, with a norm before, as one Triton kernel each way.

A tile holds heads of a few tokens, in two halves, so that cosines and sines are read once per token.
"""

from functools import cache

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import unit_stride
from longspan.kernels.norm_triton import PROGRAMS
from longspan.kernels.sum_rows_triton import sum_rows_triton

TILE = 2048  # pairs of numbers
NORM_TILE = 1024  # of the backward with a norm, which holds the sums for its weight as well


def rotate_triton(x, cos, sin, weight, eps):
    """See kernels.rotation.rotate_naive. bf16, fp16 or fp32; angles in fp32."""
    x = unit_stride(x)
    out = x.new_empty(x.shape)
    _rotate(x, cos, sin, weight, eps, out, back=False)
    return out


def rotate_backward_triton(d_out, cos, sin, x, weight, eps):
    """See kernels.rotation.rotate_backward_naive. bf16, fp16 or fp32; angles in fp32."""
    d_out = unit_stride(d_out)
    d_x = d_out.new_empty(d_out.shape)
    if weight is None:
        _rotate(d_out, cos, sin, None, eps, d_x, back=True)
        return [d_x]
    x = unit_stride(x)
    options, tokens, head_blocks = _tile(*x.shape[1:], NORM_TILE)
    num_tiles = cdiv(len(x), tokens) * head_blocks
    programs = min(PROGRAMS, cdiv(num_tiles, 4))
    sums = x.new_empty(programs, x.shape[2], dtype=torch.float32)
    if programs:
        norm_rotate_backward_kernel[(programs,)](
            d_out, x, cos.contiguous(), sin.contiguous(), weight, d_x, sums, *d_out.stride()[:2], *x.stride()[:2],
            len(x), num_tiles, programs, eps, **options,
        )  # fmt: skip
    return [d_x, sum_rows_triton(sums, weight.dtype)]


def _rotate(x, cos, sin, weight, eps, out, *, back):
    options, tokens, head_blocks = _tile(*x.shape[1:], TILE)
    if len(x):
        rotate_kernel[(cdiv(len(x), tokens) * head_blocks,)](
            x, cos.contiguous(), sin.contiguous(), weight, out, *x.stride()[:2], len(x), eps, BACK=back, **options
        )


@cache
def _tile(heads, width, size):
    """(options of a launch, tokens of a tile, tiles beside one another)"""
    block_half = next_power_of_2(width // 2)
    block_heads = min(next_power_of_2(heads), max(1, size // block_half))
    block_tokens = max(1, size // (block_half * block_heads))
    options = dict(HEADS=heads, HALF=width // 2, TOKENS=block_tokens, BLOCK_H=block_heads, BLOCK=block_half)
    return options, block_tokens, cdiv(heads, block_heads)


@triton.jit
def place(tile, num_tokens, HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """(token, head, pair, mask) of a tile, each to be broadcast to [TOKENS, BLOCK_H, BLOCK]."""
    head_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tile // head_blocks * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    head = (tile % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    pair = tl.arange(0, BLOCK)[None, None, :]
    return token.to(tl.int64), head, pair, (token < num_tokens) & (head < HEADS) & (pair < HALF)


@triton.jit
def load_pair(ptr, at, mask, HALF: tl.constexpr):
    """(first, second) in fp32."""
    first = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pair(ptr, at, mask, first, second, HALF: tl.constexpr):
    tl.store(ptr + at, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + at + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos_ptr, sin_ptr, token, pair, num_tokens, HALF: tl.constexpr):
    mask = (token < num_tokens) & (pair < HALF)
    cos = tl.load(cos_ptr + token * HALF + pair, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + token * HALF + pair, mask=mask, other=0.0)


@triton.jit
def inverse_root(first, second, eps, HALF: tl.constexpr):
    return tl.rsqrt(tl.sum(first * first + second * second, 2) / (2 * HALF) + eps)[:, :, None]


@launched
@triton.jit(do_not_specialize=["num_tokens", "eps"])
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, token_stride, head_stride, num_tokens, eps, BACK: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile, turned, or turned back. weight_ptr is None without a norm."""
    token, head, pair, mask = place(tl.program_id(0), num_tokens, HEADS, HALF, TOKENS, BLOCK_H, BLOCK)
    first, second = load_pair(x_ptr, token * token_stride + head * head_stride + pair, mask, HALF)
    if weight_ptr is not None:
        scale = inverse_root(first, second, eps, HALF)
        first_weight, second_weight = load_pair(weight_ptr, pair, pair < HALF, HALF)
        first, second = first * scale * first_weight, second * scale * second_weight
    cos, sin = load_angles(cos_ptr, sin_ptr, token, pair, num_tokens, HALF)
    if BACK:
        sin = -sin
    at = (token * HEADS + head) * (2 * HALF) + pair
    store_pair(out_ptr, at, mask, first * cos - second * sin, second * cos + first * sin, HALF)


@launched
@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_programs", "eps"])
def norm_rotate_backward_kernel(
    d_out_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, d_x_ptr, sums_ptr,
    d_out_token_stride, d_out_head_stride, token_stride, head_stride, num_tokens, num_tiles, num_programs, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile; the sums over their heads and tokens of d_weight -> row of sums."""
    first_total = tl.zeros([TOKENS, BLOCK_H, BLOCK], dtype=tl.float32)
    second_total = tl.zeros([TOKENS, BLOCK_H, BLOCK], dtype=tl.float32)
    column = tl.arange(0, BLOCK)
    first_weight, second_weight = load_pair(weight_ptr, column[None, None, :], column[None, None, :] < HALF, HALF)
    for tile in range(tl.program_id(0), num_tiles, num_programs):
        token, head, pair, mask = place(tile, num_tokens, HEADS, HALF, TOKENS, BLOCK_H, BLOCK)
        first, second = load_pair(x_ptr, token * token_stride + head * head_stride + pair, mask, HALF)
        at = token * d_out_token_stride + head * d_out_head_stride + pair
        first_turned, second_turned = load_pair(d_out_ptr, at, mask, HALF)
        cos, sin = load_angles(cos_ptr, sin_ptr, token, pair, num_tokens, HALF)
        first_grad, second_grad = first_turned * cos + second_turned * sin, second_turned * cos - first_turned * sin
        scale = inverse_root(first, second, eps, HALF)
        first, second = first * scale, second * scale
        first_total += first_grad * first
        second_total += second_grad * second
        first_grad, second_grad = first_grad * first_weight, second_grad * second_weight
        share = (tl.sum(first_grad * first + second_grad * second, 2) / (2 * HALF))[:, :, None]
        first_grad, second_grad = (first_grad - first * share) * scale, (second_grad - second * share) * scale
        store_pair(d_x_ptr, (token * HEADS + head) * (2 * HALF) + pair, mask, first_grad, second_grad, HALF)
    at = sums_ptr + tl.program_id(0) * 2 * HALF + column
    tl.store(at, tl.sum(tl.sum(first_total, 0), 0), mask=column < HALF)
    tl.store(at + HALF, tl.sum(tl.sum(second_total, 0), 0), mask=column < HALF)
