"""packing as Triton kernels: a program copies a block for a rank and head, or adds up what all ranks return for one."""

from longspan.kernels.compiler import next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.shares import arguments
from longspan.kernels.sparse.tiles import add_share, load_tile, store_tile

ROWS = 64  # of a block at once


def pack_triton(several, packing, out) -> None:
    """See packing.pack."""
    first, second = (unit_stride(x) for x in several)
    if first.stride() != second.stride():
        first, second = first.contiguous(), second.contiguous()
    blocks, places, (_, heads, head_dim) = packing.blocks, packing.places, out[0].shape
    if places.numel() and out[0].numel():
        pack_kernel[(places.numel(), 2)](
            first, second, *out, blocks.start, blocks.length, places, *first.stride()[:2], len(blocks),
            places.shape[1], heads, head_dim, padded(head_dim), blocks.size, _rows(blocks),
        )  # fmt: skip


def add_packed_triton(totals, packing, several, shares) -> None:
    """See packing.add_packed."""
    _add(totals, packing.blocks, packing.places, several, shares)


def add_shares_triton(totals, blocks, shares) -> None:
    """Adds `shares` alone."""
    _add(totals, blocks, blocks.start.new_empty(0, 1, len(blocks)), totals, shares)


def _add(totals, blocks, places, several, shares):
    _, heads, head_dim = totals[0].shape
    assert all(x.is_contiguous() for x in (*totals, *several)), "totals and buffers are contiguous"
    given, depth = arguments(shares, totals[0])
    if len(blocks):
        add_packed_kernel[(len(blocks) * heads, 2)](
            *totals, *several, blocks.start, blocks.length, places, *given, len(blocks), len(places),
            heads, places.shape[1], head_dim, padded(head_dim), depth, blocks.size, _rows(blocks),
        )  # fmt: skip


def _rows(blocks):
    return min(ROWS, next_power_of_2(blocks.size))


@launched
@triton.jit(do_not_specialize=["count", "lists"])
def pack_kernel(
    x_ptr, second_ptr, out_ptr, second_out_ptr, start_ptr, length_ptr, places_ptr, stride_t, stride_h, count, lists,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of x for a rank and list: HEADS heads of its rows, from the list's own on where that is one."""
    place = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    if place >= 0:
        block, listed = tl.program_id(0) % count, tl.program_id(0) // count % lists
        if tl.program_id(1) == 1:
            x_ptr, out_ptr = second_ptr, second_out_ptr
        length = tl.load(length_ptr + block)
        x_ptr += tl.load(start_ptr + block).to(tl.int64) * stride_t + listed * stride_h
        out_ptr += place * HEADS * D
        for head in range(0, HEADS):
            for begin in tl.static_range(0, SIZE, ROWS):
                row = begin + tl.arange(0, ROWS)
                there = row < length
                tile = load_tile(x_ptr + head * stride_h, row, stride_t, 0, there, D, BLOCK_D)
                store_tile(out_ptr + head * D, row, HEADS * D, 0, there, tile, D, BLOCK_D)


@launched
@triton.jit(do_not_specialize=["count", "ranks"])
def add_packed_kernel(
    total_ptr, second_total_ptr, x_ptr, second_ptr, start_ptr, length_ptr, places_ptr, share_k, share_v, share_size,
    share_up, count, ranks,
    HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Onto the rows of a block and head what the ranks return, in their order, and shares in gradients of means."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    if tl.program_id(1) == 1:
        total_ptr, x_ptr, share_k = second_total_ptr, second_ptr, share_v
    STRIDE: tl.constexpr = HEADS * D
    X_STRIDE: tl.constexpr = STRIDE if LISTS == 1 else D
    length = tl.load(length_ptr + block)
    total_ptr += tl.load(start_ptr + block).to(tl.int64) * STRIDE + head * D
    places_ptr += block
    if LISTS > 1:
        places_ptr += head * count
    else:
        x_ptr += head * D
    for begin in tl.static_range(0, SIZE, ROWS):
        row = begin + tl.arange(0, ROWS)
        there = row < length
        total = load_tile(total_ptr, row, STRIDE, 0, there, D, BLOCK_D).to(tl.float32)
        for rank in range(0, ranks):
            place = tl.load(places_ptr + rank * LISTS * count).to(tl.int64)
            if place >= 0:
                total += load_tile(x_ptr + place * X_STRIDE, row, X_STRIDE, 0, there, D, BLOCK_D).to(tl.float32)
        if DEPTH:
            total = add_share(total, share_k, head * D, block, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
        store_tile(total_ptr, row, STRIDE, 0, there, total, D, BLOCK_D)
