"""Blocks of rows side by side in a buffer, as other ranks asked for them, and what comes back for them."""

from dataclasses import dataclass

import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.plan import Blocks


@dataclass(frozen=True)
class Packing:
    """places: int32 [ranks, lists, len(blocks)], the row of the buffer where a block begins for a rank and list, -1
    where it is not in it. With one list a row of the buffer has all heads; else there is a list for every head, and a
    row has that head."""

    blocks: Blocks
    places: torch.Tensor

    @classmethod
    def of(cls, blocks: Blocks, flags: torch.Tensor) -> "Packing":
        """flags: [ranks, lists, len(blocks)], 1 for what is in the buffer; in their order, without waiting for the
        device."""
        rows = (flags * blocks.length).flatten()
        places = rows.cumsum(0, dtype=torch.int32) - rows
        return cls(blocks, torch.where(flags > 0, places.view(flags.shape), -1).int())

    def heads_of(self, x: torch.Tensor) -> int:
        """Heads in a row of a buffer of rows of x [T, H, D]."""
        return x.shape[1] if self.places.shape[1] == 1 else 1


def pack(several, packing: Packing, num_rows: int) -> list[torch.Tensor]:
    """Two tensors [T, H, D], alike -> [num_rows, H or 1, D] each, the rows of the buffer."""
    out = [x.new_empty(num_rows, packing.heads_of(x), x.shape[2]) for x in several]
    if forms.takes(several[0]):
        from longspan.kernels.sparse.packing_triton import pack_triton

        pack_triton(several, packing, out)
        return out
    for rank in range(len(packing.places)):
        rows, heads, to = _rows(packing, rank)
        for x, y in zip(several, out):
            y[to] = x[rows] if y.shape[1] == x.shape[1] else x[rows, heads][:, None]
    return out


def add_packed(totals, packing: Packing, several, shares=None) -> None:
    """Adds rows of buffers to two contiguous tensors [T, H, D], in place: those of one rank after the other, and
    `shares` of the rows in gradients of means (Shares of packing.blocks), or None."""
    if forms.takes(totals[0]):
        from longspan.kernels.sparse.packing_triton import add_packed_triton

        add_packed_triton(totals, packing, several, shares)
        return
    for rank in range(len(packing.places)):
        rows, heads, to = _rows(packing, rank)
        for total, x in zip(totals, several):
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
