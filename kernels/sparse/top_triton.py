"""top as one Triton kernel: scores are made again in every pass over the keys, and never stored.

Scores are compared as integers of the same order. For every row the kernel knows that the score sought, the most-th
highest, lies in [low, high], and how many lie above `high`. A sample of the keys gives a narrower window to look in; a
pass over all keys counts the scores in each of BINS parts of the window, and one of the parts (or what is below or
above) becomes the new [low, high]. Once that holds no more than BAND scores, or a single value, the last pass writes
the numbers of all scores above `low` in order; those in the band are kept, and what is too many of them is taken out.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.tiles import load_tile

ROWS, KEYS = 64, 128  # of a tile of scores
BAND = 64
BINS = tl.constexpr(32)
LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


def top_triton(means, keys, router, ranges, first: int, recent: int, always) -> torch.Tensor:
    """See kernels.sparse.top.top; gives a view with a larger stride."""
    means, keys = unit_stride(means), unit_stride(keys)
    heads, head_dim, rows = keys.shape[1], keys.shape[2], len(ranges)
    more = 0 if always is None else always.shape[1]
    width, block_d = ranges.kept + max(BAND, more), padded(head_dim)
    chosen, band = router.new_empty(heads, rows, width), router.new_empty(heads, rows, BAND, 2)
    if rows:
        top_kernel[(triton.cdiv(rows, ROWS) * heads,)](
            means, keys, router, ranges.first, ranges.stop, ranges.most, router if always is None else always,
            band, chosen, *means.stride()[:2], *keys.stride()[:2], rows, width, first, recent, more,
            heads, head_dim, block_d, ROWS, KEYS if block_d <= 128 else KEYS // 2, BAND, num_warps=8, num_stages=2,
        )  # fmt: skip
    return chosen[..., : ranges.kept + more]


@triton.jit
def halves(x):
    """fp32 as the sum of two bf16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def ordered_scores(q_high, q_low, k):
    """Products of means [rows, D], in halves, and keys [keys, D] as int32 of the same order, above LOWEST."""
    k_high, k_low = halves(k)
    scores = tl.dot(q_low, tl.trans(k_high))
    scores = tl.dot(q_high, tl.trans(k_low), scores)
    scores = tl.dot(q_high, tl.trans(k_high), scores)
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + 1)


@triton.jit
def ranked(scores, rank, STEPS: tl.constexpr):
    """The rank-th highest of int32 scores [rows, n], per row, its last 32 - STEPS bits cut; LOWEST if there are fewer."""
    found = tl.full([scores.shape[0]], LOWEST, tl.int32)
    for step in range(0, STEPS):
        higher = found + (tl.full([scores.shape[0]], 1, tl.int32) << (31 - step))
        found = tl.where(tl.sum((scores >= higher[:, None]).to(tl.int32), 1) >= rank, higher, found)
    return found


@triton.jit
def _scores_at(
    q_high, q_low, keys_ptr, stride_t, column, end, first, stop, forced_first, forced_recent,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, HIGHEST where forced and LOWEST out of range."""
    k = load_tile(keys_ptr, column.to(tl.int64), stride_t, 0, column < end, D, BLOCK_D).to(tl.float32)
    scores, column = ordered_scores(q_high, q_low, k), column[None, :]
    forced = (column < first[:, None] + forced_first) | (column >= stop[:, None] - forced_recent)
    there = (column >= first[:, None]) & (column < stop[:, None])
    return tl.where(there, tl.where(forced, HIGHEST, scores), LOWEST)


@triton.jit
def _count(scores, window, shift, ROWS: tl.constexpr):
    """(int32 [rows, BINS], [rows]): scores in each of the 2^shift wide parts from `window` on, and beyond them."""
    part = (scores - window[:, None]).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32, bitcast=True)[:, None]
    reached = scores >= window[:, None]
    part = tl.where(reached, tl.minimum(part, BINS).to(tl.int32), BINS + 4)
    beyond = tl.sum((part == BINS).to(tl.int32), 1)
    one = tl.full([1, 1], 1, tl.int32) << ((part & 3) * 8)  # four counters of 8 bits side by side
    index = tl.arange(0, BINS)[None, :]
    counts = tl.zeros([ROWS, BINS], tl.int32)
    for group in tl.static_range(BINS // 4):
        packed = tl.sum(tl.where(part >> 2 == group, one, 0), 1)
        counts += tl.where(index >> 2 == group, (packed[:, None] >> ((index & 3) * 8)) & 255, 0)
    return counts, beyond


@triton.jit
def _width_of_parts(low, high):
    """shift with (high - low) >> shift < BINS, as unsigned."""
    width = (high - low).to(tl.uint32, bitcast=True)
    exponent = (width.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # may be one too high, never too low
    return tl.maximum(exponent - 4, 0)


@triton.jit(do_not_specialize=["rows", "width", "forced_first", "forced_recent", "more"])
def top_kernel(
    means_ptr, keys_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, always_ptr, band_ptr, chosen_ptr,
    means_stride_t, means_stride_h, keys_stride_t, keys_stride_h, rows, width, forced_first, forced_recent, more,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Lists of ROWS rows of one head."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    first = tl.load(first_ptr + row, mask=valid, other=0)
    stop = tl.load(stop_ptr + row, mask=valid, other=0)
    most = tl.load(most_ptr + row, mask=valid, other=0)
    router = tl.load(router_ptr + row, mask=most > 0, other=0).to(tl.int64)
    q = load_tile(means_ptr + head * means_stride_h, router, means_stride_t, 0, most > 0, D, BLOCK_D).to(tl.float32)
    q_high, q_low = halves(q)
    keys_ptr += head * keys_stride_h
    begin = tl.min(tl.where(most > 0, first, HIGHEST))
    end = tl.max(tl.where(most > 0, stop, 0))
    place = tl.arange(0, KEYS)

    reach = stop - first  # scores from `low` on
    low, high = tl.full([ROWS], LOWEST + 1, tl.int32), tl.full([ROWS], HIGHEST, tl.int32)
    above = tl.zeros([ROWS], tl.int32)
    open_rows = (most > 0) & (reach > BAND)
    if tl.max(open_rows.to(tl.int32)) > 0:
        # Where the score sought is expected: a sample's scores at three standard deviations of their rank on each side.
        step = tl.maximum((end - begin).to(tl.float32) / KEYS, 1.0)
        column = begin + (place.to(tl.float32) * step).to(tl.int32)
        scores = _scores_at(
            q_high, q_low, keys_ptr, keys_stride_t, column, end, first, stop, forced_first, forced_recent, D, BLOCK_D
        )  # fmt: skip
        number = tl.sum((scores > LOWEST).to(tl.int32), 1).to(tl.float32)
        rank = number * most.to(tl.float32) / tl.maximum(reach, 1).to(tl.float32)
        slack = 3.0 * tl.sqrt(rank) + 1.0
        window = ranked(scores, tl.maximum(tl.minimum(rank + slack, number), 1.0).to(tl.int32), 16)
        window = tl.maximum(window, LOWEST + 1)
        until = ranked(scores, tl.maximum(rank - slack, 1.0).to(tl.int32), 16)
        until = tl.where((until > HIGHEST - (1 << 21)) | (number < 1.0), HIGHEST, until + (1 << 20))
        while tl.max(open_rows.to(tl.int32)) > 0:
            shift = _width_of_parts(window, until)
            counts, beyond = tl.zeros([ROWS, BINS], tl.int32), tl.zeros([ROWS], tl.int32)
            for at in range(begin, end, KEYS):
                scores = _scores_at(
                    q_high, q_low, keys_ptr, keys_stride_t, at + place, end, first, stop,
                    forced_first, forced_recent, D, BLOCK_D,
                )  # fmt: skip
                some, more_beyond = _count(scores, window, shift, ROWS)
                counts += some
                beyond += more_beyond
            # Scores in or above each part: the highest part with enough of them holds the one sought.
            from_part = beyond[:, None] + tl.sum(counts, 1)[:, None] - (tl.cumsum(counts, 1) - counts)
            enough = tl.sum((from_part >= most[:, None]).to(tl.int32), 1)
            part = tl.arange(0, BINS)[None, :]
            inside = tl.sum(tl.where(part == enough[:, None] - 1, from_part, 0), 1)
            higher = tl.where(enough == BINS, beyond, tl.sum(tl.where(part == enough[:, None], from_part, 0), 1))
            over, under = beyond >= most, enough == 0  # it lies beyond the window, below it, or in a part
            # A part may reach beyond `high`, above which all is counted already.
            offset, span = ((enough << shift) - 1).to(tl.uint32, bitcast=True), (high - window).to(tl.uint32, bitcast=True)
            cut = offset > span
            new_low = tl.where(over, window + (BINS << shift), tl.where(under, low, window + ((enough - 1) << shift)))
            new_high = tl.where(over | cut, high, window + ((enough << shift) - 1))
            new_high = tl.where(over == under, new_high, tl.where(under, window - 1, high))
            lowest_part = tl.sum(tl.where(part == 0, from_part, 0), 1)
            new_above = tl.where(over | cut, above, higher)
            new_above = tl.where(under & (over == 0), lowest_part, new_above)
            new_reach = tl.where(over, beyond, tl.where(under, reach, inside))
            low, high = tl.where(open_rows, new_low, low), tl.where(open_rows, new_high, high)
            above, reach = tl.where(open_rows, new_above, above), tl.where(open_rows, new_reach, reach)
            open_rows = open_rows & (reach - above > BAND) & (low < high)
            window, until = low, high

    needed = most - above  # of the band
    limit = tl.where(reach - above > BAND, needed, BAND)  # of a band of equal scores the first are taken
    written, banded = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    list_at = (head.to(tl.int64) * rows + row) * width
    band_at = (head.to(tl.int64) * rows + row) * BAND * 2
    for at in range(begin, end, KEYS):
        scores = _scores_at(
            q_high, q_low, keys_ptr, keys_stride_t, at + place, end, first, stop, forced_first, forced_recent,
            D, BLOCK_D,
        )  # fmt: skip
        in_band = (scores >= low[:, None]) & (scores <= high[:, None]) & (most > 0)[:, None]
        ordinal = banded[:, None] + tl.cumsum(in_band.to(tl.int32), 1) - 1
        in_band = in_band & (ordinal < limit[:, None])
        taken = in_band | ((scores > high[:, None]) & (most > 0)[:, None])
        to = written[:, None] + tl.cumsum(taken.to(tl.int32), 1) - 1
        tl.store(chosen_ptr + list_at[:, None] + to, tl.broadcast_to((at + place)[None, :], to.shape), mask=taken & (to < width))
        noted = in_band & (ordinal < BAND)
        tl.store(band_ptr + band_at[:, None] + ordinal * 2, scores, mask=noted)
        tl.store(band_ptr + band_at[:, None] + ordinal * 2 + 1, to, mask=noted)
        banded += tl.sum(in_band.to(tl.int32), 1)
        written += tl.sum(taken.to(tl.int32), 1)
    tl.debug_barrier()

    # The best of the band stay.
    number = tl.arange(0, BAND)[None, :]
    noted = number < tl.minimum(banded, BAND)[:, None]
    scores = tl.load(band_ptr + band_at[:, None] + number * 2, mask=noted, other=LOWEST)
    to = tl.load(band_ptr + band_at[:, None] + number * 2 + 1, mask=noted, other=0)
    least = ranked(scores, needed, 32)[:, None]
    better, equal = scores > least, noted & (scores == least)
    left = needed - tl.sum(better.to(tl.int32), 1)
    stays = better | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None])) | (banded > BAND)[:, None]
    tl.store(chosen_ptr + list_at[:, None] + to, tl.full([ROWS, BAND], -1, tl.int32), mask=noted & (stays == 0))
    tl.debug_barrier()

    # Close the gaps; then what is always listed, and -1.
    kept = tl.zeros([ROWS], tl.int32)
    for at in range(0, tl.max(written), KEYS):
        here = at + place
        listed = tl.load(chosen_ptr + list_at[:, None] + here[None, :], mask=here[None, :] < written[:, None], other=-1)
        stays = listed >= 0
        to = kept[:, None] + tl.cumsum(stays.to(tl.int32), 1) - 1
        tl.debug_barrier()
        tl.store(chosen_ptr + list_at[:, None] + to, listed, mask=stays)
        kept += tl.sum(stays.to(tl.int32), 1)
        tl.debug_barrier()
    for at in range(0, width, KEYS):
        here = at + place
        ordinal = here[None, :] - kept[:, None]
        always = tl.load(
            always_ptr + row[:, None] * more + ordinal,
            mask=valid[:, None] & (ordinal >= 0) & (ordinal < more), other=-1,
        )  # fmt: skip
        rest = valid[:, None] & (ordinal >= 0) & (here < width)[None, :]
        tl.store(chosen_ptr + list_at[:, None] + here[None, :], always, mask=rest)
