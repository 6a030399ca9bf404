"""descend as one Triton kernel: rows under one parent have the same candidates but for their siblings."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.tiles import load_tile
from longspan.kernels.sparse.top_triton import LOWEST, halves, ordered_scores

ENTRIES = 512  # entries of lists that a program writes


def descend_triton(means, keys, above, families, keep: int, causal: bool, always=None) -> torch.Tensor:
    """See kernels.sparse.descend.descend."""
    means, keys, heads, more = unit_stride(means), unit_stride(keys), keys.shape[1], 0
    if always is not None:
        always, more = always.contiguous(), always.shape[1]
    chosen = families.chooses.new_empty(heads, len(families.chooses), keep + more)
    width, block_d = padded((above.shape[2] + causal) * families.block), padded(means.shape[2])
    if len(families.chooses):
        descend_kernel[(len(families.groups) * heads,)](
            means, keys, above, families.start, families.length, families.router, families.chooses, families.groups,
            families.group_parent, families.chooses if always is None else always, chosen,
            *means.stride()[:2], *keys.stride()[:2], *above.stride()[:2],
            len(families.chooses), heads, means.shape[2], block_d, families.block, padded(families.block),
            above.shape[2], width, keep, next_power_of_2(keep + more), more, causal,
            keys.dtype == torch.bfloat16,
            num_warps=4 if width * block_d <= 8192 else 8, num_stages=1,
        )  # fmt: skip
    return chosen


def blocks_below_triton(found, rows, blocks, causal: bool, always=None):
    """See kernels.sparse.descend.blocks_below."""
    found, (heads, _, most), width = unit_stride(found), found.shape, blocks.shape[1]
    more = 0 if always is None else always.shape[1]
    listed = found.new_empty(heads, len(rows), (most + causal) * width + more)
    count = listed.shape[1] * listed.shape[2]
    if listed.numel():
        blocks_below_kernel[(cdiv(count, ENTRIES), heads)](
            found, rows, blocks, blocks if always is None else always, listed, *found.stride()[:2], count,
            len(blocks) - 1, more, most, width, causal, ENTRIES,
        )  # fmt: skip
    return listed


@launched
@triton.jit(do_not_specialize=["stride_h", "stride_r", "count", "none", "more"])
def blocks_below_kernel(
    found_ptr, rows_ptr, blocks_ptr, always_ptr, listed_ptr, stride_h, stride_r, count, none, more,
    MOST: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE entries of the lists of one head; none: the last line of blocks; more: entries of each that always has."""
    BELOW: tl.constexpr = (MOST + CAUSAL) * WIDTH
    entry, head = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1).to(tl.int64)
    there, line, inside = entry < count, entry // (BELOW + more), entry % (BELOW + more)
    below, place = inside < BELOW, inside // WIDTH
    row = tl.load(rows_ptr + line, mask=there, other=0)
    found_ptr += head * stride_h
    found = tl.load(found_ptr + row * stride_r + place, mask=there & (place < MOST), other=-1)
    if CAUSAL:
        found = tl.where(place == MOST, row.to(tl.int32), found)
    found = tl.where(found < 0, none, found)
    listed = tl.load(blocks_ptr + found * WIDTH + inside % WIDTH, mask=there & below, other=-1)
    always = tl.load(always_ptr + (line * more + (inside - BELOW)), mask=there & (inside >= BELOW), other=-1)
    tl.store(listed_ptr + head * count + entry, tl.where(below, listed, always), mask=there)


@launched
@triton.jit(do_not_specialize=["above_stride_h", "above_stride_r", "num_rows"])
def descend_kernel(
    means_ptr, keys_ptr, above_ptr, start_ptr, length_ptr, router_ptr, chooses_ptr, groups_ptr, parent_ptr, always_ptr,
    chosen_ptr, means_stride_t, means_stride_h, keys_stride_t, keys_stride_h, above_stride_h, above_stride_r, num_rows,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ABOVE: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr, LISTED: tl.constexpr, MORE: tl.constexpr,
    CAUSAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Lists of the rows of one group and head."""
    group, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    parent = tl.load(parent_ptr + group)
    inside = tl.arange(0, ROWS)
    place = tl.load(groups_ptr + group * BLOCK + inside, mask=inside < BLOCK, other=-1)
    live = place >= 0
    row = tl.load(chooses_ptr + place, mask=live, other=0)
    router = tl.load(router_ptr + row, mask=live, other=0).to(tl.int64)
    q = load_tile(means_ptr + head * means_stride_h, router, means_stride_t, 0, live, D, BLOCK_D).to(tl.float32)

    index = tl.arange(0, WIDTH)
    slot, child = index // BLOCK, index % BLOCK
    above_ptr += head * above_stride_h + parent.to(tl.int64) * above_stride_r
    above = tl.load(above_ptr + slot, mask=slot < ABOVE, other=-1)
    if CAUSAL:
        above = tl.where(slot == ABOVE, parent, above)
    there = (above >= 0) & (child < tl.load(length_ptr + above, mask=above >= 0, other=0))
    child += tl.load(start_ptr + above, mask=there, other=0)
    k = load_tile(keys_ptr + head * keys_stride_h, child.to(tl.int64), keys_stride_t, 0, there, D, BLOCK_D)
    q_high, q_low = halves(q)
    k_high, k_low = (k, k) if EXACT else halves(k.to(tl.float32))
    candidate = there[None, :] & live[:, None]
    if CAUSAL:
        candidate = candidate & (child[None, :] < row[:, None])
    scores = tl.where(candidate, ordered_scores(q_high, q_low, k_high, k_low, EXACT), LOWEST)

    needed = tl.minimum(tl.sum(candidate.to(tl.int32), 1), KEEP)
    order = (scores.to(tl.int64) << 32) + (WIDTH - index)[None, :]  # of equal scores the lower number is higher
    rest, least = order, tl.max(order, 1)[:, None]
    for _ in range(1, KEEP):
        rest = tl.where(rest < least, rest, -(2**63))
        least = tl.max(rest, 1)[:, None]
    taken = candidate & (order >= least)
    chosen_ptr += head * num_rows * (KEEP + MORE)
    at = (place * (KEEP + MORE))[:, None]
    to = tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(chosen_ptr + (at + to), tl.broadcast_to(child[None, :], to.shape), mask=taken)
    entry = tl.arange(0, LISTED)[None, :]
    rest = live[:, None] & (entry >= needed[:, None]) & (entry < KEEP + MORE)
    last = tl.full([ROWS, LISTED], -1, tl.int32)
    if MORE:
        last = tl.load(always_ptr + place[:, None] * MORE + (entry - KEEP), mask=rest & (entry >= KEEP), other=-1)
    tl.store(chosen_ptr + (at + entry), last, mask=rest)
