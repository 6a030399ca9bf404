"""What lists name of other ranks' keys: flags that ranks show one another, and what follows from them on the device.

Pieces of keys are numbered over all ranks: owner * width + place on the owner (attention.block_tables). Nothing here
waits for the device: what arrives has room for all that could be named.
"""

import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.plan import Blocks


def ask(blocks, of_block, ranks: int, width: int, *, listed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(wanted, shown). blocks: int32 [lists, M, n], blocks of keys, -1 for none; of_block: int64 [blocks, most], the
    pieces of each, -1 for none. wanted: int32 [lists, M, n * most], pieces, -1 for none. shown: uint8 in multiples of
    16, what the other ranks have to know: int32 [ranks], entries of every owner (0 unless `listed`), and flags [lists,
    ranks, width], 1 for what is named."""
    lists = len(blocks)
    head, count = 4 * ranks, lists * ranks * width
    shown = torch.zeros(-(-(head + count) // 16) * 16, dtype=torch.uint8, device=blocks.device)
    if forms.takes(blocks):
        from longspan.kernels.sparse.asking_triton import ask_triton

        return ask_triton(blocks, of_block, shown, ranks, width, listed), shown
    wanted = of_block.int()[blocks.clamp(min=0)].masked_fill_((blocks < 0)[..., None], -1).flatten(-2)
    flags = torch.zeros(lists, ranks * width + 1, dtype=torch.uint8, device=blocks.device)
    flags.scatter_(1, (wanted + 1).long().flatten(1), 1)  # what is none has the first
    shown[head : head + count] = flags[:, 1:].flatten()
    if listed:
        owner = torch.where(wanted < 0, ranks, wanted // width).flatten()
        shown[:head].view(torch.int32).copy_((owner == torch.arange(ranks, device=owner.device)[:, None]).sum(1))
    return wanted, shown


def count(shown, lengths, lists: int) -> torch.Tensor:
    """int64 [who, owner, 2 * lists + 1]: of every list the rows it names and its pieces, and entries of all lists.
    shown: uint8 [ranks, n], of all; lengths: int32 [ranks * width], rows of every piece."""
    ranks = len(shown)
    if forms.takes(shown):
        from longspan.kernels.sparse.asking_triton import count_triton

        return count_triton(shown, lengths, lists)
    flags = flags_of(shown, lists, len(lengths) // ranks).transpose(1, 2).long()  # [who, owner, list, piece]
    rows, listed = (flags * lengths.view(ranks, 1, -1)).sum(3), shown[:, : 4 * ranks].contiguous().view(torch.int32)
    return torch.cat([rows, flags.sum(3), listed[..., None]], 2)


def place(shown, counts, keys, lists: int, rank: int, own: bool, groups: int = 1, window: int = 0):
    """(table, arriving, places) of `rank`. Pieces lie in the buffer of what arrives by group of lists, owner after
    owner, list after list; with `own` this rank's of all lists come first, else they are not in it.

    table: int32 [lists, ranks * width], the number of every piece in the buffer, -1 where it is not; without `own` that
    of local pieces is their place here and others follow len(arriving). arriving: Blocks, what lies behind those that
    are named is undefined. places: int32 [ranks, lists, local pieces], the row of a local piece among those that go to
    a rank, by group of lists and rank after rank, of `rank` among its own; -1 where it is not. counts: see `count`;
    keys: Pieces; groups: of equally many lists. window: where it is not 0, rows of other ranks lie in
    [ranks - 1, lists, window], each where it is here.
    """
    ranks, width, local = len(shown), keys.width, len(keys.local)
    columns = keys.lengths, keys.positions, keys.steps
    room = -(-lists * (ranks if own else ranks - 1) * width // 4) * 4  # columns at multiples of 16 bytes
    offset = 0 if own else room
    if forms.takes(shown):
        from longspan.kernels.sparse.asking_triton import place_triton

        given = (keys.starts, *columns), lists, width, local, rank, own, groups, room, offset, window
        table, arriving, places = place_triton(shown, counts, *given)
        return table, _blocks(keys.size, arriving), places
    flags, device, size = flags_of(shown, lists, width), shown.device, lists // groups
    mine = [(rank, n) for n in range(lists)]
    others = [
        (peer, n)
        for first in range(0, lists, size)
        for peer in range(ranks)
        for n in range(first, first + size)
        if peer != rank
    ]
    segments = mine * own + others
    peer, listed = torch.tensor(segments, device=device).view(-1, 2).T
    named = flags[rank, listed, peer].flatten()
    piece = (peer[:, None] * width + torch.arange(width, device=device)).flatten()
    number, rows = named.cumsum(0) - 1, named * keys.lengths[piece]
    start = rows.cumsum(0, dtype=torch.int32) - rows
    arriving = start.new_zeros(4, room + 1)
    slot = torch.where(named > 0, number, room)  # the last takes what is not named
    arriving.scatter_(1, slot.expand(4, -1), torch.stack([start, *(x[piece] for x in columns)]))
    table = start.new_full((lists, ranks, width), -1)
    table[listed, peer] = torch.where(named > 0, number + offset, -1).int().view(-1, width)
    if not own:
        table[:, rank] = torch.arange(width, dtype=torch.int32, device=device)
    places = start.new_full((ranks, lists, local), -1)
    for segments in (others, mine * own):  # each in a buffer of its own
        peer, listed = torch.tensor(segments, dtype=torch.int64, device=device).view(-1, 2).T
        given = flags[peer, listed, rank, :local]
        rows = given * keys.lengths[rank * width : rank * width + local]
        start = rows.flatten().cumsum(0, dtype=torch.int32).view(rows.shape) - rows
        if window:
            slot = torch.where(peer < rank, peer, peer - 1) * lists + listed
            slot = torch.where(
                peer == rank, start.T, (slot * window + keys.starts[rank * width : rank * width + local, None])
            )
            start = slot.T
        places[peer, listed] = torch.where(given > 0, start, -1).int()
    return table.flatten(1), _blocks(keys.size, arriving[:, :-1]), places


def rename(wanted, table) -> torch.Tensor:
    """int32 like `wanted` [lists, M, n]: what `table` [lists, pieces] has for each piece, -1 for none."""
    if forms.takes(wanted):
        from longspan.kernels.sparse.asking_triton import rename_triton

        return rename_triton(wanted, table)
    padded = torch.nn.functional.pad(table, (1, 0), value=-1)
    return padded.gather(1, (wanted + 1).long().flatten(1)).view_as(wanted)


def flags_of(shown, lists: int, width: int) -> torch.Tensor:
    """[who, list, owner, piece] of what ranks show."""
    ranks = len(shown)
    return shown[:, 4 * ranks : 4 * ranks + lists * ranks * width].view(ranks, lists, ranks, width)


def _blocks(size, columns):
    start, length, position, step = columns
    return Blocks(size, start, length, position, step, length)
