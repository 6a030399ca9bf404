"""asking as Triton kernels: flags and counts, and places by sums over what comes before."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

TILE = 1024  # entries or pieces at once


def ask_triton(blocks, of_block, shown, ranks, width, listed) -> torch.Tensor:
    """`wanted` of asking.ask, which also makes `shown`, all zero."""
    blocks, (lists, rows, most), turns = blocks.contiguous(), blocks.shape, of_block.shape[1]
    wanted, entries = blocks.new_empty(lists, rows, most * turns), rows * most * turns
    if entries:
        ask_kernel[(cdiv(entries, TILE) * lists,)](
            blocks, of_block, wanted, shown.view(torch.int32), shown, entries, turns, width, ranks, lists, TILE, listed
        )  # fmt: skip
    return wanted


def count_triton(shown, lengths, lists) -> torch.Tensor:
    """See asking.count."""
    ranks, size = shown.shape
    counts = torch.empty(ranks, ranks, 2 * lists + 1, dtype=torch.int64, device=shown.device)
    count_kernel[(ranks * ranks * lists,)](
        shown, shown.view(torch.int32), lengths, counts, size, ranks, lists, len(lengths) // ranks, TILE
    )  # fmt: skip
    return counts


def place_triton(shown, counts, columns, lists, width, local, rank, own, groups, room, offset, window):
    """See asking.place; columns: of every piece its first row, and others; room: of what arrives, offset: of its
    numbers."""
    ranks, size = shown.shape
    arriving, table = columns[0].new_empty(4, room), columns[0].new_empty(lists, ranks * width)
    places = columns[0].new_empty(ranks, lists, local)
    locate_kernel[(2 * ranks * lists,)](
        shown, counts, *columns, arriving, table, places, size, ranks, lists, lists // groups, width,
        local, rank, room, offset, window, own, next_power_of_2(ranks * lists), TILE,
    )  # fmt: skip
    return table, arriving, places


def rename_triton(wanted, table) -> torch.Tensor:
    """See asking.rename."""
    columns, lists = torch.empty_like(wanted), len(wanted)
    entries = wanted[0].numel()
    if entries:
        rename_kernel[(cdiv(entries, TILE) * lists,)](wanted, table, columns, entries, table.shape[1], lists, TILE)
    return columns


@launched
@triton.jit(do_not_specialize=["entries", "turns", "width", "ranks", "lists"])
def ask_kernel(
    blocks_ptr, of_block_ptr, wanted_ptr, listed_ptr, shown_ptr, entries, turns, width, ranks, lists,
    TILE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The pieces of TILE entries of a list, their flags, and how many are of every rank."""
    listed, entry = tl.program_id(0) % lists, tl.program_id(0) // lists * TILE + tl.arange(0, TILE)
    valid = entry < entries
    block = tl.load(blocks_ptr + listed.to(tl.int64) * (entries // turns) + entry // turns, mask=valid, other=-1)
    piece = tl.load(of_block_ptr + block.to(tl.int64) * turns + entry % turns, mask=block >= 0, other=-1).to(tl.int32)
    tl.store(wanted_ptr + listed.to(tl.int64) * entries + entry, piece, mask=valid)
    flag = shown_ptr + 4 * ranks + listed.to(tl.int64) * ranks * width + piece
    tl.store(flag, tl.full([TILE], 1, tl.uint8), mask=piece >= 0)
    if LISTED:
        for rank in range(0, ranks):
            mine = (piece >= rank * width) & (piece < (rank + 1) * width)
            tl.atomic_add(listed_ptr + rank, tl.sum(mine.to(tl.int32)), sem="relaxed")


@launched
@triton.jit(do_not_specialize=["size", "ranks", "lists", "width"])
def count_kernel(
    shown_ptr, listed_ptr, lengths_ptr, counts_ptr, size, ranks, lists, width, TILE: tl.constexpr
):  # fmt: skip
    """Rows and pieces that one list of one rank names of another's."""
    listed, pair = tl.program_id(0) % lists, tl.program_id(0) // lists
    who, owner = pair // ranks, pair % ranks
    shown_ptr += who.to(tl.int64) * size + 4 * ranks + (listed * ranks + owner).to(tl.int64) * width
    lengths_ptr += owner * width
    rows, pieces = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    for begin in range(0, width, TILE):
        piece = begin + tl.arange(0, TILE)
        named = tl.load(shown_ptr + piece, mask=piece < width, other=0).to(tl.int32)
        rows += named * tl.load(lengths_ptr + piece, mask=piece < width, other=0)
        pieces += named
    counts_ptr += pair.to(tl.int64) * (2 * lists + 1)
    tl.store(counts_ptr + listed, tl.sum(rows).to(tl.int64))
    tl.store(counts_ptr + lists + listed, tl.sum(pieces).to(tl.int64))
    if listed == 0:
        tl.store(counts_ptr + 2 * lists, tl.load(listed_ptr + who * (size // 4) + owner).to(tl.int64))


@launched
@triton.jit(do_not_specialize=["size", "ranks", "lists", "group", "width", "local", "rank", "room", "offset", "window"])
def locate_kernel(
    shown_ptr, counts_ptr, starts_ptr, lengths_ptr, positions_ptr, steps_ptr, arriving_ptr, table_ptr, places_ptr,
    size, ranks, lists, group, width, local, rank, room, offset, window,
    OWN: tl.constexpr, SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One list and one other rank: what arrives of it, or what goes to it. group: lists that travel together."""
    goes, segment = tl.program_id(0) // (ranks * lists), tl.program_id(0) % (ranks * lists)
    peer, listed = segment // lists, segment % lists
    every = tl.arange(0, SEGMENTS)
    whose, which = every // lists, every % lists
    before = (whose < peer) | ((whose == peer) & (which < listed))  # what is of others
    before = (which // group < listed // group) | ((which // group == listed // group) & before)
    mine = (whose == rank) & (which < listed)  # what is of this rank comes first, if at all
    if goes == 1:
        before = tl.where(peer == rank, mine, before & (whose != rank))
    else:
        before = tl.where(peer == rank, mine, (before & (whose != rank)) | ((whose == rank) & OWN))
    before = before & (every < ranks * lists)
    pair = tl.where(goes == 1, whose * ranks + rank, rank * ranks + whose).to(tl.int64)
    at = counts_ptr + pair * (2 * lists + 1) + which
    row = tl.sum(tl.load(at, mask=before, other=0)).to(tl.int32)
    number = tl.sum(tl.load(at + lists, mask=before, other=0)).to(tl.int32)
    moves = (peer != rank) | OWN
    who, owner = tl.where(goes == 1, peer, rank), tl.where(goes == 1, rank, peer)
    shown_ptr += who.to(tl.int64) * size + 4 * ranks + (listed * ranks + owner).to(tl.int64) * width
    first = owner * width
    for begin in range(0, width, TILE):
        piece = begin + tl.arange(0, TILE)
        there = piece < width
        named = tl.load(shown_ptr + piece, mask=there, other=0).to(tl.int32)
        length = tl.load(lengths_ptr + first + piece, mask=there, other=0)
        rows = named * length
        start = row + tl.cumsum(rows, 0) - rows
        travels = (named > 0) & moves
        if goes == 1:
            if (window > 0) & (peer != rank):  # in the slot of that rank
                slot = (peer - (peer > rank).to(tl.int32)) * lists + listed
                start = slot * window + tl.load(starts_ptr + first + piece, mask=there, other=0)
            to = places_ptr + segment.to(tl.int64) * local + piece
            tl.store(to, tl.where(travels, start, -1), mask=piece < local)
        else:
            slot = number + tl.cumsum(named, 0) - named
            column = tl.where(travels, slot + offset, -1)
            column = tl.where(moves, column, piece)
            tl.store(table_ptr + (listed * ranks + peer).to(tl.int64) * width + piece, column, mask=there)
            tl.store(arriving_ptr + slot, start, mask=travels)
            tl.store(arriving_ptr + room + slot, length, mask=travels)
            position = tl.load(positions_ptr + first + piece, mask=there, other=0)
            tl.store(arriving_ptr + 2 * room + slot, position, mask=travels)
            tl.store(arriving_ptr + 3 * room + slot, tl.load(steps_ptr + first + piece, mask=there), mask=travels)
            number += tl.sum(named)
        row += tl.sum(rows)


@launched
@triton.jit(do_not_specialize=["entries", "pieces", "lists"])
def rename_kernel(wanted_ptr, table_ptr, columns_ptr, entries, pieces, lists, TILE: tl.constexpr):
    """TILE entries of a list."""
    listed, entry = (tl.program_id(0) % lists).to(tl.int64), tl.program_id(0) // lists * TILE + tl.arange(0, TILE)
    at, valid = listed * entries + entry, entry < entries
    piece = tl.load(wanted_ptr + at, mask=valid, other=-1)
    tl.store(columns_ptr + at, tl.load(table_ptr + listed * pieces + piece, mask=piece >= 0, other=-1), mask=valid)
