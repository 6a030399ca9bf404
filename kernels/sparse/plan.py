"""Which blocks of keys each block of queries attends to: lists by query block and by key block, made on the device.

Everything sparse becomes such a plan: top-k of pooled scores, windows, coarse keys with weights, fetched blocks.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from longspan.kernels.sparse.rules import Boxes, Picks

CHUNK = 64  # query blocks of a key block's list that one program takes; columns that all rows choose are split


@dataclass(frozen=True)
class Blocks:
    """Rows of a packed buffer in blocks: int32 [N] first row, number of rows (1 to `size`), position of the first row
    in its document, positions from row to row, and document. A block lies in one document; every row is in exactly one
    block."""

    size: int
    start: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor
    document: torch.Tensor

    def __len__(self) -> int:
        return self.start.shape[0]

    @classmethod
    def of(cls, offsets, size: int) -> "Blocks":
        """Documents offsets[i]:offsets[i+1] cut from their start; the last block of each may be short."""
        starts, lengths, positions, documents = [], [], [], []
        for document, (first, stop) in enumerate(pairwise(offsets)):
            at = np.arange(first, stop, size)
            starts.append(at)
            lengths.append(np.minimum(size, stop - at))
            positions.append(at - first)
            documents.append(np.full(len(at), document))
        steps = [np.ones(len(at)) for at in starts]
        columns = (np.concatenate(column or [[]]) for column in (starts, lengths, positions, steps, documents))
        return cls(size, *(torch.from_numpy(column.astype(np.int32)) for column in columns))

    def map(self, move) -> "Blocks":
        """The same with every tensor passed through `move`."""
        return replace(self, **{name: move(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})


@dataclass(frozen=True)
class BlockPlan:
    """M query blocks, T key blocks, lists for Hs heads (1, or a divisor or multiple of the key heads that divides the
    query heads); int32 tensors on the device of the attention.

    row_ptr [Hs, M+1], row_idx [Hs, C]: the key blocks of query block i are row_idx[h, row_ptr[h, i]:row_ptr[h, i+1]],
    ascending. col_ptr [Hs, T+1], col_idx [Hs, C]: the query blocks of each key block, ascending. C is a capacity; what
    lies past the last list is undefined. item_ptr [Hs, T+1], item_col [Hs, I]: programs of the gradients of keys, one
    for every CHUNK query blocks of a list; the column of each, T past the last.
    log_weight: floats [T], added to the scaled scores of a key block's rows, or None. causal: keys at later positions
    of their document than the query are not seen; a coarse key has the position from which on it is seen. rule: what
    single queries see of listed blocks, or None for all; keys have step 1 then.
    """

    queries: Blocks
    keys: Blocks
    row_ptr: torch.Tensor
    row_idx: torch.Tensor
    col_ptr: torch.Tensor
    col_idx: torch.Tensor
    item_ptr: torch.Tensor
    item_col: torch.Tensor
    causal: bool
    log_weight: torch.Tensor | None = None
    rule: Picks | Boxes | None = None

    @property
    def heads(self) -> int:
        return self.row_ptr.shape[0]

    @classmethod
    def of(cls, queries: Blocks, keys: Blocks, chosen, *, causal: bool, log_weight=None, listed=None) -> "BlockPlan":
        """chosen: integers [Hs, M, K], the key blocks of every query block in any order, none twice, -1 for nothing.
        listed: most key blocks that a head's lists name, if known: memory for gradients follows it. Nothing waits for
        the device."""
        heads, num_rows, most = chosen.shape
        num_cols, device = len(keys), chosen.device
        capacity = num_rows * most
        columns = torch.where(chosen < 0, num_cols, chosen).int().sort(-1).values
        counts = (columns < num_cols).sum(-1)
        row_ptr = _pointers(counts)
        slots = row_ptr[:, :-1, None] + torch.arange(most, device=device)
        slots = torch.where(columns < num_cols, slots, capacity).flatten(1)
        row_idx = _scattered(columns.flatten(1), slots, num_cols, capacity)
        rows = torch.arange(num_rows, dtype=torch.int32, device=device).repeat_interleave(most).expand(heads, -1)
        row_of = _scattered(rows, slots, 0, capacity)
        by_column, order = row_idx.sort(dim=-1, stable=True)  # rows ascend within a column
        edges = torch.arange(num_cols + 1, dtype=torch.int32, device=device).expand(heads, -1).contiguous()
        col_ptr = torch.searchsorted(by_column, edges)
        item_ptr = _pointers((col_ptr.diff(dim=-1) + (CHUNK - 1)).div(CHUNK, rounding_mode="floor"))
        most_items = min(num_cols if listed is None else listed, capacity) + capacity // CHUNK
        items = torch.arange(most_items, device=device).expand(heads, -1).contiguous()
        item_col = torch.searchsorted(item_ptr, items, right=True) - 1
        return cls(
            queries, keys, row_ptr.int(), row_idx, col_ptr.int(), row_of.gather(1, order), item_ptr.int(),
            item_col.int(), causal, log_weight,
        )  # fmt: skip


def _pointers(counts):
    return torch.nn.functional.pad(counts.cumsum(-1), (1, 0))


def _scattered(values, slots, rest, capacity):
    """[Hs, capacity]: values at their slots, `rest` elsewhere; slot `capacity` takes what is dropped."""
    table = torch.full((values.shape[0], capacity + 1), rest, dtype=torch.int32, device=values.device)
    return table.scatter_(1, slots, values)[:, :capacity].contiguous()
