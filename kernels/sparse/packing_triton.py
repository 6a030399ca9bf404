"""packing as Triton kernels: a program copies a block for a rank and head, or adds up what all ranks return for one."""

from longspan.kernels.compiler import next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.shares import arguments
from longspan.kernels.sparse.tiles import add_share, load_tile, store_tile

ROWS = 64  # of a block at once


def pack_triton(several, packing, out, own) -> None:
    """See packing.pack."""
    first, second = (unit_stride(x) for x in several)
    if first.stride() != second.stride():
        first, second = first.contiguous(), second.contiguous()
    blocks, places, (_, heads, head_dim) = packing.blocks, packing.places, out.shape
    if places.numel() and out.numel() + own.numel():
        pack_kernel[(places.numel(), 2)](
            first, second, out, own, blocks.start, blocks.length, places, *first.stride()[:2], len(blocks),
            places.shape[1], packing.own, heads // 2, head_dim, padded(head_dim), blocks.size, _rows(blocks),
        )  # fmt: skip


def add_packed_triton(totals, packing, several, shares, own, fresh) -> None:
    """See packing.add_packed."""
    _add(totals, packing.blocks, packing.places, several, shares, own, packing.own, fresh)


def add_shares_triton(totals, blocks, shares) -> None:
    """Adds `shares` alone."""
    _add(totals, blocks, blocks.start.new_empty(0, 1, len(blocks)), totals, shares, None, -1, False)


def _add(totals, blocks, places, several, shares, own, rank, fresh):
    _, heads, head_dim = totals[0].shape
    assert all(x.is_contiguous() for x in (*totals, *several, *(own or ()))), "totals and buffers are contiguous"
    given, depth = arguments(shares, totals[0])
    if len(blocks):
        add_packed_kernel[(len(blocks) * heads, 2)](
            *totals, *several, *(own or several), blocks.start, blocks.length, places, *given, len(blocks),
            len(places), rank, heads, places.shape[1], head_dim, padded(head_dim), depth, blocks.size, _rows(blocks),
            not fresh,
        )  # fmt: skip


def _rows(blocks):
    return min(ROWS, next_power_of_2(blocks.size))


@launched
@triton.jit(do_not_specialize=["count", "lists", "own"])
def pack_kernel(
    x_ptr, second_ptr, out_ptr, own_ptr, start_ptr, length_ptr, places_ptr, stride_t, stride_h, count, lists, own,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of x for a rank and list: HEADS heads of its rows, from the list's own on where that is one, beside those
    of the second."""
    place = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    if place >= 0:
        block, listed = tl.program_id(0) % count, tl.program_id(0) // count % lists
        if tl.program_id(1) == 1:
            x_ptr = second_ptr
        if tl.program_id(0) // count // lists == own:
            out_ptr = own_ptr
        STRIDE: tl.constexpr = 2 * HEADS * D
        length = tl.load(length_ptr + block)
        x_ptr += tl.load(start_ptr + block).to(tl.int64) * stride_t + listed * stride_h
        out_ptr += place * STRIDE + tl.program_id(1) * (HEADS * D)
        for head in range(0, HEADS):
            for begin in tl.static_range(0, SIZE, ROWS):
                row = begin + tl.arange(0, ROWS)
                there = row < length
                tile = load_tile(x_ptr + head * stride_h, row, stride_t, 0, there, D, BLOCK_D)
                store_tile(out_ptr + head * D, row, STRIDE, 0, there, tile, D, BLOCK_D)


@launched
@triton.jit(do_not_specialize=["count", "ranks", "own"])
def add_packed_kernel(
    total_ptr, second_total_ptr, x_ptr, second_ptr, own_ptr, second_own_ptr, start_ptr, length_ptr, places_ptr,
    share_k, share_v, share_size, share_up, count, ranks, own,
    HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """The rows of a block and head that the ranks return, in their order, and shares in gradients of means; ONTO: onto
    what is there."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    if tl.program_id(1) == 1:
        total_ptr, x_ptr, own_ptr, share_k = second_total_ptr, second_ptr, second_own_ptr, share_v
    STRIDE: tl.constexpr = HEADS * D
    X_STRIDE: tl.constexpr = STRIDE if LISTS == 1 else D
    length = tl.load(length_ptr + block)
    total_ptr += tl.load(start_ptr + block).to(tl.int64) * STRIDE + head * D
    places_ptr += block
    if LISTS > 1:
        places_ptr += head * count
    else:
        x_ptr += head * D
        own_ptr += head * D
    for begin in tl.static_range(0, SIZE, ROWS):
        row = begin + tl.arange(0, ROWS)
        there = row < length
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if ONTO:
            total = load_tile(total_ptr, row, STRIDE, 0, there, D, BLOCK_D).to(tl.float32)
        for rank in range(0, ranks):
            place = tl.load(places_ptr + rank * LISTS * count).to(tl.int64)
            if place >= 0:
                at = x_ptr
                if rank == own:
                    at = own_ptr
                total += load_tile(at + place * X_STRIDE, row, X_STRIDE, 0, there, D, BLOCK_D).to(tl.float32)
        if DEPTH:
            total = add_share(total, share_k, head * D, block, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
        store_tile(total_ptr, row, STRIDE, 0, there, total, D, BLOCK_D)
