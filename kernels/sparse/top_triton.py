"""top as one Triton kernel: scores are made again in every pass over the keys, and never stored.

Scores are compared as integers of the same order. For every row the kernel knows that the score sought, the most-th
highest, lies in [low, high], and how many lie above `high`. A sample of the keys gives a narrower window to look in; a
pass over all keys counts the scores in each of BINS parts of the window, and one of the parts (or what is below or
above) becomes the new [low, high]. Once that holds no more than BAND scores, or a single value, the last pass writes
the numbers of all scores above `low` in order; those in the band are kept, and what is too many of them is taken out.
"""

import torch

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.tiles import load_tile, store_tile

MANY, FEW = (64, 64, 4), (16, 64, 4)  # rows and keys of a tile of scores, warps
FEW_LISTS = 1 << 14  # with fewer, tiles of many rows cannot fill a GPU
SPLIT_ROWS = 64
BAND = 64
BINS = tl.constexpr(32)
LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


def top_triton(means, keys, router, ranges, first: int, recent: int, always) -> torch.Tensor:
    """See kernels.sparse.top.top; gives a view with a larger stride."""
    means, keys = unit_stride(means), split_halves(keys)
    heads, head_dim, rows = means.shape[1], means.shape[2], len(ranges)
    more = 0 if always is None else always.shape[1]
    width, block_d = ranges.kept + max(BAND, more), padded(head_dim)
    chosen, band = router.new_empty(heads, rows, width), router.new_empty(heads, rows, BAND, 2)
    if rows:
        tile, at_once, warps = FEW if rows * heads < FEW_LISTS else MANY
        top_kernel[(cdiv(rows, tile) * heads,)](
            means, keys, router, ranges.first, ranges.stop, ranges.most, router if always is None else always,
            band, chosen, *means.stride()[:2], keys.shape[1], rows, width, first, recent, more,
            heads, head_dim, block_d, tile, at_once, BAND, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return chosen[..., : ranges.kept + more]


def split_halves(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> bf16 [2, T, H, D] whose sum it is, to 2^-17."""
    x, out, count = unit_stride(x), x.new_empty(2, *x.shape, dtype=torch.bfloat16), x.shape[0] * x.shape[1]
    split_kernel[(cdiv(count, SPLIT_ROWS),)](
        x, out, *x.stride()[:2], count, *x.shape[1:], padded(x.shape[2]), SPLIT_ROWS
    )
    return out


@launched
@triton.jit(do_not_specialize=["count"])
def split_kernel(
    x_ptr, out_ptr, stride_t, stride_h, count,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head_at = row % HEADS * stride_h
    high, low = halves(load_tile(x_ptr, row // HEADS, stride_t, head_at, row < count, D, BLOCK_D).to(tl.float32))
    store_tile(out_ptr, row, D, 0, row < count, high, D, BLOCK_D)
    store_tile(out_ptr + count.to(tl.int64) * D, row, D, 0, row < count, low, D, BLOCK_D)


@triton.jit
def halves(x):
    """fp32 as the sum of two bf16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def ordered_scores(q_high, q_low, k_high, k_low, EXACT: tl.constexpr = False):
    """Products of means [rows, D] and keys [keys, D], both in halves, as int32 of the same order, above LOWEST. EXACT:
    k_low is zero."""
    scores = tl.dot(q_low, tl.trans(k_high))
    if not EXACT:
        scores = tl.dot(q_high, tl.trans(k_low), scores)
    return ordered(tl.dot(q_high, tl.trans(k_high), scores))


@triton.jit
def ordered(scores):
    """fp32 as int32 of the same order, above LOWEST."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + 1)


@triton.jit
def ranked(scores, rank, STEPS: tl.constexpr, AXIS: tl.constexpr = 1):
    """The rank-th highest along an axis of int32 scores, last 32 - STEPS bits cut; LOWEST if there are fewer."""
    ROWS: tl.constexpr = scores.shape[1 - AXIS]
    found = tl.full([ROWS], LOWEST, tl.int32)
    for step in range(0, STEPS):
        higher = found + (tl.full([ROWS], 1, tl.int32) << (31 - step))
        enough = tl.sum((scores >= tl.expand_dims(higher, AXIS)).to(tl.int32), AXIS) >= rank
        found = tl.where(enough, higher, found)
    return found


@triton.jit
def load_choosers(
    means_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, row, rows, head, stride_t, stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of rows that choose: which are there, from which key to which, how many at most; their means in halves, zero
    where a row chooses none."""
    valid = row < rows
    first = tl.load(first_ptr + row, mask=valid, other=0)
    stop = tl.load(stop_ptr + row, mask=valid, other=0)
    most = tl.load(most_ptr + row, mask=valid, other=0)
    router = tl.load(router_ptr + row, mask=most > 0, other=0).to(tl.int64)
    means = load_tile(means_ptr + head * stride_h, router, stride_t, 0, most > 0, D, BLOCK_D).to(tl.float32)
    q_high, q_low = halves(means)
    return valid, first, stop, most, q_high, q_low


@triton.jit
def _scores_at(
    q_high, q_low, keys_ptr, low_at, begin, offset, end, first, stop, forced_first, forced_recent,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of keys begin + offset, HIGHEST where forced and LOWEST out of range."""
    keys_ptr += tl.full([], begin, tl.int64) * HEADS * D
    column = begin + offset
    k_high = load_tile(keys_ptr, offset, HEADS * D, 0, column < end, D, BLOCK_D)
    k_low = load_tile(keys_ptr + low_at, offset, HEADS * D, 0, column < end, D, BLOCK_D)
    scores, column = ordered_scores(q_high, q_low, k_high, k_low), column[None, :]
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
def _expected(scores, most, reach):
    """A window for the score sought: those of a sample at three standard deviations of their rank on each side."""
    number = tl.sum((scores > LOWEST).to(tl.int32), 1).to(tl.float32)
    rank = number * most.to(tl.float32) / tl.maximum(reach, 1).to(tl.float32)
    slack = 3.0 * tl.sqrt(rank) + 1.0
    window = ranked(scores, tl.maximum(tl.minimum(rank + slack, number), 1.0).to(tl.int32), 16)
    window = tl.maximum(window, LOWEST + 1)
    until = ranked(scores, tl.maximum(rank - slack, 1.0).to(tl.int32), 16)
    return window, tl.where((until > HIGHEST - (1 << 21)) | (number < 1.0), HIGHEST, until + (1 << 20))


@triton.jit
def _width_of_parts(low, high):
    """shift with (high - low) >> shift < BINS, as unsigned."""
    width = (high - low).to(tl.uint32, bitcast=True)
    exponent = (width.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # may be one too high, never too low
    return tl.maximum(exponent - 4, 0)


@triton.jit
def _narrowed(counts, beyond, window, shift, most, low, high, above, reach):
    """From `_count` of all scores: (low, high, above, reach) of the part of the window that holds the score sought, or
    of what is beyond or below the window; which of the two."""
    # Scores in or above each part: the highest part with enough of them holds the one sought.
    from_part = beyond[:, None] + tl.sum(counts, 1)[:, None] - (tl.cumsum(counts, 1) - counts)
    enough = tl.sum((from_part >= most[:, None]).to(tl.int32), 1)
    part = tl.arange(0, BINS)[None, :]
    inside = tl.sum(tl.where(part == enough[:, None] - 1, from_part, 0), 1)
    higher = tl.where(enough == BINS, beyond, tl.sum(tl.where(part == enough[:, None], from_part, 0), 1))
    over, under = beyond >= most, enough == 0
    # A part may reach beyond `high`, above which all is counted already.
    offset = ((enough << shift) - 1).to(tl.uint32, bitcast=True)
    cut = offset > (high - window).to(tl.uint32, bitcast=True)
    new_low = tl.where(over, window + (BINS << shift), tl.where(under, low, window + ((enough - 1) << shift)))
    new_high = tl.where(over | cut, high, window + ((enough << shift) - 1))
    new_high = tl.where(over == under, new_high, tl.where(under, window - 1, high))
    lowest_part = tl.sum(tl.where(part == 0, from_part, 0), 1)
    new_above = tl.where(over | cut, above, higher)
    new_above = tl.where(under & (over == 0), lowest_part, new_above)
    return new_low, new_high, new_above, tl.where(over, beyond, tl.where(under, reach, inside)), over, under


@triton.jit
def _take_out(chosen_ptr, band_ptr, list_at, band_at, needed, banded, ROWS: tl.constexpr, BAND: tl.constexpr):
    """Overwrites with -1 all of the band but the `needed` best."""
    number = tl.arange(0, BAND)[None, :]
    noted = number < banded[:, None]
    scores = tl.load(band_ptr + (band_at[:, None] + number * 2), mask=noted, other=LOWEST)
    to = tl.load(band_ptr + (band_at[:, None] + number * 2 + 1), mask=noted, other=0)
    least = ranked(scores, needed, 32)
    better, equal = scores > least[:, None], noted & (scores == least[:, None])
    left = needed - tl.sum(better.to(tl.int32), 1)
    worse = noted & (scores < least[:, None]) | (equal & (tl.cumsum(equal.to(tl.int32), 1) > left[:, None]))
    to = tl.where(worse & (banded <= BAND)[:, None], to, -1)  # a longer band is of equal scores, and has been cut
    tl.store(chosen_ptr + (list_at[:, None] + to), tl.full([ROWS, BAND], -1, tl.int32), mask=to >= 0)


@triton.jit
def _close_gaps(chosen_ptr, list_at, written, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Moves what is not -1 of the first `written` entries of each list to its front; how many there are."""
    kept = tl.zeros([ROWS], tl.int32)
    for at in range(0, tl.max(written), STEP):
        here = at + tl.arange(0, STEP)[None, :]
        listed = tl.load(chosen_ptr + (list_at[:, None] + here), mask=here < written[:, None], other=-1)
        stays = listed >= 0
        to = tl.where(stays, kept[:, None] + tl.cumsum(stays.to(tl.int32), 1) - 1, -1)
        tl.debug_barrier()
        tl.store(chosen_ptr + (list_at[:, None] + to), listed, mask=to >= 0)
        kept += tl.sum(stays.to(tl.int32), 1)
        tl.debug_barrier()
    return kept


@triton.jit
def list_rest(chosen_ptr, always_ptr, list_at, row, valid, kept, more, width, STEP: tl.constexpr):
    """After the first `kept` entries of each list what is always taken, `more` of every row, and then -1."""
    for at in range(0, width, STEP):
        here = at + tl.arange(0, STEP)[None, :]
        ordinal = here - kept[:, None]
        rest = valid[:, None] & (ordinal >= 0)
        always = tl.load(always_ptr + row[:, None] * more + ordinal, mask=rest & (ordinal < more), other=-1)
        tl.store(chosen_ptr + (list_at[:, None] + here), always, mask=rest & (here < width))


@launched
@triton.jit(do_not_specialize=["num_keys", "rows", "width", "forced_first", "forced_recent", "more"])
def top_kernel(
    means_ptr, keys_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, always_ptr, band_ptr, chosen_ptr,
    means_stride_t, means_stride_h, num_keys, rows, width, forced_first, forced_recent, more,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Lists of ROWS rows of one head."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row = tile * ROWS + tl.arange(0, ROWS)
    valid, first, stop, most, q_high, q_low = load_choosers(
        means_ptr, router_ptr, first_ptr, stop_ptr, most_ptr, row, rows, head, means_stride_t, means_stride_h,
        D, BLOCK_D,
    )  # fmt: skip
    keys_ptr += head * D
    low_at = num_keys.to(tl.int64) * HEADS * D
    begin = tl.min(tl.where(most > 0, first, HIGHEST))
    end = tl.max(tl.where(most > 0, stop, 0))
    place = tl.arange(0, KEYS)

    reach = stop - first  # scores from `low` on
    low, high = tl.full([ROWS], LOWEST + 1, tl.int32), tl.full([ROWS], HIGHEST, tl.int32)
    above = tl.zeros([ROWS], tl.int32)
    open_rows = (most > 0) & (reach > BAND)
    if tl.max(open_rows.to(tl.int32)) > 0:
        step = tl.maximum((end - begin).to(tl.float32) / KEYS, 1.0)
        scores = _scores_at(
            q_high, q_low, keys_ptr, low_at, begin, (place.to(tl.float32) * step).to(tl.int64), end, first, stop,
            forced_first, forced_recent, HEADS, D, BLOCK_D,
        )  # fmt: skip
        window, until = _expected(scores, most, reach)
        turn = 0
        while tl.max(open_rows.to(tl.int32)) > 0:
            shift = _width_of_parts(window, until)
            counts, beyond = tl.zeros([ROWS, BINS], tl.int32), tl.zeros([ROWS], tl.int32)
            for at in range(begin, end, KEYS):
                scores = _scores_at(
                    q_high, q_low, keys_ptr, low_at, at, place, end, first, stop,
                    forced_first, forced_recent, HEADS, D, BLOCK_D,
                )  # fmt: skip
                some, more_beyond = _count(scores, window, shift, ROWS)
                counts += some
                beyond += more_beyond
            new_low, new_high, new_above, new_reach, over, under = _narrowed(
                counts, beyond, window, shift, most, low, high, above, reach
            )
            low, high = tl.where(open_rows, new_low, low), tl.where(open_rows, new_high, high)
            above, reach = tl.where(open_rows, new_above, above), tl.where(open_rows, new_reach, reach)
            open_rows = open_rows & (reach - above > BAND) & (low < high)
            # Where the first window missed it is most likely close by.
            near = tl.minimum((high - low).to(tl.uint32, bitcast=True), 1 << 23).to(tl.int32)
            window = tl.where(under & (over == 0) & (turn == 0), high - near, low)
            until = tl.where(over & (turn == 0), low + near, high)
            turn += 1

    needed = most - above  # of the band
    limit = tl.where(reach - above > BAND, needed, BAND)  # of a band of equal scores the first are taken
    inside = tl.arange(0, ROWS)
    chosen_ptr += (head.to(tl.int64) * rows + tile * ROWS) * width
    band_ptr += (head.to(tl.int64) * rows + tile * ROWS) * BAND * 2
    list_at, band_at, live = inside * width, inside * BAND * 2, (most > 0)[:, None]
    sure, banded = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for at in range(begin, end, KEYS):
        scores = _scores_at(
            q_high, q_low, keys_ptr, low_at, at, place, end, first, stop, forced_first, forced_recent,
            HEADS, D, BLOCK_D,
        )  # fmt: skip
        higher = (scores > high[:, None]).to(tl.int32)
        in_band = (scores >= low[:, None]).to(tl.int32) - higher
        so_far = tl.cumsum(higher + (in_band << 16), 1)  # two counts side by side
        ordinal = banded[:, None] + (so_far >> 16)  # in the band, from 1
        to = sure[:, None] + (so_far & 0xFFFF) + tl.minimum(ordinal, limit[:, None]) - 1
        taken = ((higher > 0) | ((in_band > 0) & (ordinal <= limit[:, None]))) & live & (to < width)
        tl.store(chosen_ptr + (list_at[:, None] + to), tl.broadcast_to((at + place)[None, :], to.shape), mask=taken)
        noted = (in_band > 0) & (ordinal <= BAND) & live
        band_to = band_at[:, None] + (ordinal - 1) * 2
        tl.store(band_ptr + band_to, scores, mask=noted)
        tl.store(band_ptr + band_to + 1, to, mask=noted)
        sure += tl.sum(higher, 1)
        banded += tl.sum(in_band, 1)
    tl.debug_barrier()
    written = tl.where(most > 0, sure + tl.minimum(banded, limit), 0)
    banded = tl.where(most > 0, banded, 0)
    _take_out(chosen_ptr, band_ptr, list_at, band_at, needed, banded, ROWS, BAND)
    tl.debug_barrier()
    kept = _close_gaps(chosen_ptr, list_at, written, ROWS, 32)
    list_rest(chosen_ptr, always_ptr, list_at, row, valid, kept, more, width, KEYS)
