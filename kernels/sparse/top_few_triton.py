"""top where rows choose from few keys, as one Triton kernel: scores are made once, and kept.

With all scores of a row at hand, the most-th highest is found bit by bit; of scores that equal it the first are taken.
"""

import torch

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.tiles import load_tile
from longspan.kernels.sparse.top import TOGETHER
from longspan.kernels.sparse.top_triton import HIGHEST, LOWEST, halves, list_rest, load_choosers, ordered, ranked

WIDTHS = 256, 512, 1024, 2048  # keys that the rows of a tile reach, at most
WARP_SCORES, WARP_KEYS = 1 << 11, 16  # scores that a warp holds, and keys that it multiplies at once
KEY_NUMBERS = 1 << 15  # most numbers of these keys
SCORES = 1 << 24  # most that are kept: 64 MB


def takes(ranges, heads: int) -> bool:
    """Whether there are few keys, for few enough rows."""
    return ranges.widest <= WIDTHS[-1] and ranges.widest * len(ranges) * heads <= SCORES


def top_few_triton(means, keys, router, ranges, first: int, recent: int, always):
    """See kernels.sparse.top.top."""
    means, keys = unit_stride(means), unit_stride(keys)
    heads, head_dim, rows = means.shape[1], means.shape[2], len(ranges)
    more = 0 if always is None else always.shape[1]
    chosen = router.new_empty(heads, rows, ranges.kept + more)
    if not chosen.numel():
        return chosen
    width = next(width for width in WIDTHS if ranges.widest <= width)
    tiles, warps = cdiv(rows, TOGETHER) * heads, max(4, width * TOGETHER // WARP_SCORES)
    block_d = padded(head_dim)
    scores = router.new_empty(tiles, width, TOGETHER)
    top_few_kernel[(tiles,)](
        means, keys, router, ranges.first, ranges.stop, ranges.most, router if always is None else always, scores,
        chosen, *means.stride()[:2], *keys.stride()[:2], rows, chosen.shape[2], first, recent, more,
        heads, head_dim, block_d, TOGETHER, width, min(warps * WARP_KEYS, KEY_NUMBERS // block_d),
        keys.dtype == torch.bfloat16,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return chosen


@launched
@triton.jit(do_not_specialize=["rows", "width", "forced_first", "forced_recent", "more"])
def top_few_kernel(
    means_ptr, keys_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, always_ptr, scores_ptr, chosen_ptr,
    means_stride_t, means_stride_h, keys_stride_t, keys_stride_h, rows, width, forced_first, forced_recent, more,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Lists of ROWS rows of one head. Scores lie as [keys, rows]: what is added up over keys is in few threads then."""
    tile, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    valid, first, stop, most, q_high, q_low = load_choosers(
        means_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, row, rows, head, means_stride_t, means_stride_h,
        D, BLOCK_D,
    )  # fmt: skip
    end = tl.max(tl.where(most > 0, stop, 0))
    begin = tl.minimum(tl.min(tl.where(most > 0, first, HIGHEST)), end)  # of a tile that chooses nothing too
    keys_ptr += head * keys_stride_h
    scores_ptr += tl.program_id(0).to(tl.int64) * WIDTH * ROWS
    beside = tl.arange(0, ROWS)[None, :]
    for at in range(0, WIDTH, KEYS):
        place = at + tl.arange(0, KEYS)
        column = begin + place
        k = load_tile(keys_ptr, column.to(tl.int64), keys_stride_t, 0, column < end, D, BLOCK_D)
        k_high, k_low = (k, k) if EXACT else halves(k.to(tl.float32))
        scores = tl.dot(k_high, tl.trans(q_low))
        if not EXACT:
            scores = tl.dot(k_low, tl.trans(q_high), scores)
        scores, column = ordered(tl.dot(k_high, tl.trans(q_high), scores)), column[:, None]
        forced = (column < first[None, :] + forced_first) | (column >= stop[None, :] - forced_recent)
        there = (column >= first[None, :]) & (column < stop[None, :])
        scores = tl.where(there, tl.where(forced, HIGHEST, scores), LOWEST)
        tl.store(scores_ptr + (place[:, None] * ROWS + beside), scores)
    tl.debug_barrier()
    held = tl.load(scores_ptr + (tl.arange(0, WIDTH)[:, None] * ROWS + beside))
    least = ranked(held, most, 32, 0)
    left, kept = most - tl.sum((held > least[None, :]).to(tl.int32), 0), tl.zeros([ROWS], tl.int32)
    chosen_ptr += (head * rows + tile * ROWS) * width
    list_at = tl.arange(0, ROWS) * width
    for at in range(0, WIDTH, KEYS):
        number = at + tl.arange(0, KEYS)[:, None]
        some = tl.load(scores_ptr + (number * ROWS + beside))
        above, equal = (some > least[None, :]).to(tl.int32), (some == least[None, :]).to(tl.int32)
        so_far = tl.cumsum(above + (equal << 16), 0)  # two counts side by side
        ordinal = so_far >> 16  # among the equal ones, from 1
        taken = ((above > 0) | ((equal > 0) & (ordinal <= left[None, :]))) & (most > 0)[None, :]
        to = list_at[None, :] + kept[None, :] + (so_far & 0xFFFF) + tl.minimum(ordinal, left[None, :]) - 1
        tl.store(chosen_ptr + to, tl.broadcast_to(begin + number, to.shape), mask=taken)
        equals = tl.minimum(tl.sum(equal, 0), left)
        kept += tl.sum(above, 0) + equals
        left -= equals
    list_rest(chosen_ptr, always_ptr, list_at, row, valid, most, more, width, KEYS)
