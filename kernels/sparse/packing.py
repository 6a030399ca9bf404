"""Blocks of rows side by side in a buffer, as other ranks asked for them, and what comes back for them."""

from dataclasses import dataclass

import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.plan import Blocks

READ_PAST = 128  # rows at most that kernels for Hopper read behind a block, and multiply by weights of 0: numbers


@dataclass(frozen=True)
class Packing:
    """places: int32 [ranks, lists, len(blocks)], the row of the buffer where a block begins for a rank and list, -1
    where it is not in it. With one list a row of the buffer has all heads; else there is a list for every head, and a
    row has that head. own: the rank whose rows lie in a buffer of their own, or -1."""

    blocks: Blocks
    places: torch.Tensor
    own: int = -1

    def heads_of(self, x: torch.Tensor) -> int:
        """Heads in a row of a buffer of rows of x [T, H, D]."""
        return x.shape[1] if self.places.shape[1] == 1 else 1


def pack(several, packing: Packing, num_rows: int, own=None) -> torch.Tensor:
    """Two tensors [T, H, D], alike -> [num_rows, 2 * (H or 1), D], the rows of the buffer, one beside the other; those
    of rank packing.own are written to the first rows of `own`, of the same width."""
    first = several[0]
    out = first.new_empty(num_rows, 2 * packing.heads_of(first), first.shape[2])
    if forms.takes(first):
        from longspan.kernels.sparse.packing_triton import pack_triton

        pack_triton(several, packing, out, out if own is None else own)
        return out
    for rank in range(len(packing.places)):
        rows, heads, to = _rows(packing, rank)
        for x, y in zip(several, (own if rank == packing.own else out).chunk(2, 1)):
            y[to] = x[rows] if y.shape[1] == x.shape[1] else x[rows, heads][:, None]
    return out


def add_packed(totals, packing: Packing, several, shares=None, own=None, fresh=False) -> None:
    """Adds rows of buffers [rows, H or 1, D] to two contiguous tensors [T, H, D], in place: those of one rank after the
    other, and `shares` of the rows in gradients of means (Shares of packing.blocks), or None. own: the buffers of
    packing.own. fresh: the tensors hold nothing yet."""
    if forms.takes(totals[0]):
        from longspan.kernels.sparse.packing_triton import add_packed_triton

        add_packed_triton(totals, packing, several, shares, own, fresh)
        return
    if fresh:
        totals[0].zero_(), totals[1].zero_()
    for rank in range(len(packing.places)):
        rows, heads, to = _rows(packing, rank)
        for total, x in zip(totals, own if rank == packing.own else several):
            if x.shape[1] == total.shape[1]:
                total[rows] += x[to]
            else:
                total[rows, heads] += x[to, 0]
    if shares is not None:
        shares.add(*totals, packing.blocks)


def add_shares(totals, blocks: Blocks, shares) -> None:
    """The same of `shares` alone."""
    if forms.takes(totals[0]):
        from longspan.kernels.sparse.packing_triton import add_shares_triton

        add_shares_triton(totals, blocks, shares)
    else:
        shares.add(*totals, blocks)


def _rows(packing, rank):
    """(rows, heads, rows of the buffer) of what is in it for a rank. Waits for the device."""
    head, block = (packing.places[rank] >= 0).nonzero().unbind(1)
    length = packing.blocks.length[block].long()
    entry = torch.repeat_interleave(torch.arange(len(block), device=block.device), length)
    inside = torch.arange(len(entry), device=block.device) - (length.cumsum(0) - length)[entry]
    head, block = head[entry], block[entry]
    return packing.blocks.start[block] + inside, head, packing.places[rank, head, block] + inside
