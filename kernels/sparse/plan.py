"""Which blocks of keys each block of queries attends to: lists by query block and by key block, made on the device.

Everything sparse becomes such a plan: top-k of pooled scores, windows, coarse keys with weights, fetched blocks.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.rules import Boxes, Picks

# Query blocks of a key block's list that one program takes, unless a plan says otherwise. More where lists are longer
# than that on average: parts of gradients, in fp32, would be as many as lists have chunks.
CHUNK, LONG_CHUNK = 64, 512


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

    @cached_property
    def _ends(self) -> dict:
        return {}

    def ends(self, heads: int, each: int) -> torch.Tensor:
        """int32 [heads, len + 1]: where lists of blocks begin and end that have so many entries each; made once."""
        found = self._ends.get((heads, each))
        if found is None:
            ends = torch.arange(len(self) + 1, dtype=torch.int32, device=self.start.device) * each
            found = self._ends[heads, each] = ends.expand(heads, -1).contiguous()
        return found

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
class Columns:
    """The query blocks of each key block, and what computes gradients of keys; see BlockPlan."""

    col_ptr: torch.Tensor
    col_idx: torch.Tensor
    item_ptr: torch.Tensor
    item_col: torch.Tensor


@dataclass(frozen=True)
class BlockPlan:
    """M query blocks, T key blocks, lists for Hs heads (1, or a divisor or multiple of the key heads that divides the
    query heads); int32 tensors on the device of the attention.

    row_ptr [Hs, M+1], row_idx [Hs, C]: the key blocks of query block i are row_idx[h, row_ptr[h, i]:row_ptr[h, i+1]],
    in the order they were given in. col_ptr [Hs, T+1], col_idx [Hs, C]: the query blocks of each key block, ascending.
    C is a capacity; what lies outside of the lists is undefined. item_ptr [Hs, T+1], item_col [Hs, I]: programs of the
    gradients of keys, one for every `chunk` query blocks of a list, so that a column which all rows choose is split;
    the column of each, T past the last; most_items: I.
    What goes by key blocks is made when it is first asked for: a forward pass alone does without.
    log_weight: floats [T], added to the scaled scores of a key block's rows, or None. causal: keys at later positions
    of their document than the query are not seen; a coarse key has the position from which on it is seen. rule: what
    single queries see of listed blocks, or None for all; keys have step 1 then. by_key: plans over the same tensors, of
    the same queries, that together list the same pairs and make the gradients of keys in place of this one, each in
    blocks that suit it; what goes by key blocks leaves out entries of row_idx from T on, which are another plan's.
    apart: whether a key block is named by one list at most.
    """

    queries: Blocks
    keys: Blocks
    row_ptr: torch.Tensor
    row_idx: torch.Tensor
    most_items: int
    causal: bool
    log_weight: torch.Tensor | None = None
    rule: Picks | Boxes | None = None
    chunk: int = CHUNK
    by_key: tuple["BlockPlan", ...] = ()
    apart: bool = False

    @property
    def heads(self) -> int:
        return self.row_ptr.shape[0]

    @property
    def col_ptr(self) -> torch.Tensor:
        return self.columns.col_ptr

    @property
    def col_idx(self) -> torch.Tensor:
        return self.columns.col_idx

    @property
    def item_ptr(self) -> torch.Tensor:
        return self.columns.item_ptr

    @property
    def item_col(self) -> torch.Tensor:
        return self.columns.item_col

    @cached_property
    def columns(self) -> Columns:
        given = self.row_ptr, self.row_idx, len(self.keys), self.chunk, self.most_items
        if forms.takes(self.row_idx):
            from longspan.kernels.sparse.lists_triton import columns_triton

            return Columns(*columns_triton(*given))
        return Columns(*_columns(*given))

    @classmethod
    def of(
        cls, queries: Blocks, keys: Blocks, chosen, *, causal: bool, log_weight=None, rule=None, ascending=False,
        chunk=None, full=False, apart=False,
    ) -> "BlockPlan":  # fmt: skip
        """chosen: integers [Hs, M, K], the key blocks of every query block in any order, none twice, -1 for nothing;
        `ascending` says that the rest of each row is in order, or that its order does not matter, which saves a sort;
        `full` that there is no -1 either: then the lists are `chosen`. Nothing waits for the device."""
        if full:
            heads, _, most = chosen.shape
            row_ptr, row_idx = queries.ends(heads, most), chosen.int().flatten(1)
        else:
            if not ascending:
                chosen = torch.where(chosen < 0, len(keys), chosen).int().sort(-1).values
            row_ptr, row_idx = _rows_of(chosen, len(keys), 1)
        chunk = chunk or _chunk_of(keys, row_idx)
        most = _most_items(len(keys), row_idx.shape[1], chunk)
        return cls(queries, keys, row_ptr, row_idx, most, causal, log_weight, rule, chunk, apart=apart)

    @classmethod
    def split(cls, queries: Blocks, keys, chosen, width: int, *, causal: bool, rule=None) -> list["BlockPlan"]:
        """A plan for each of `keys`, Blocks of different buffers: chosen int32 [Hs, M, K] names block n of buffer b as
        b * width + n, -1 for nothing. The lists keep its order and lie in one tensor. Nothing waits for the device."""
        row_ptr, row_idx = _rows_of(chosen, width, len(keys))
        rows, plans = chosen.shape[1], []
        for number, blocks in enumerate(keys):
            ends = row_ptr[:, number * rows : (number + 1) * rows + 1].contiguous()
            chunk = _chunk_of(blocks, row_idx)
            most = _most_items(len(blocks), row_idx.shape[1], chunk)
            plans.append(cls(queries, blocks, ends, row_idx, most, causal, None, rule, chunk))
        return plans

    def over(self, keys: Blocks, listed: int) -> "BlockPlan":
        """The same over other blocks, of which lists of a head name at most `listed`: memory for gradients follows
        it."""
        chunk = _chunk_of(keys, self.row_idx)
        return replace(self, keys=keys, chunk=chunk, most_items=_most_items(listed, self.row_idx.shape[1], chunk))

    def beside(self, other: "BlockPlan", keys: Blocks, entries: int, chunk: int) -> "BlockPlan":
        """The same with gradients of keys by `other` and, of `keys`, the first of its blocks, which a head's lists name
        at most `entries` times, by its own lists."""
        most = _most_items(len(keys), entries, chunk)
        return replace(self, by_key=(other, replace(self, keys=keys, chunk=chunk, most_items=most)))

    def compact(self, key_heads: int) -> bool:
        """Whether only key blocks with more than `chunk` entries have parts of gradients, see backward.part_of: where
        no two lists of a key head make those of one block, and that takes less memory."""
        return (self.apart or self.heads <= key_heads) and self._most_of_split < self.most_items

    def most_parts(self, key_heads: int) -> int:
        """Room for parts of gradients of a list."""
        return self._most_of_split if self.compact(key_heads) else self.most_items

    @property
    def _most_of_split(self):
        return 2 * self.row_idx.shape[1] // self.chunk + 1

    def map(self, move) -> "BlockPlan":
        """The same with every tensor passed through `move`, without a rule; lists by key block as well if there are."""
        moved = {name: move(getattr(self, name)) for name in ("row_ptr", "row_idx")}
        weight = None if self.log_weight is None else move(self.log_weight)
        plan = replace(self, queries=self.queries.map(move), keys=self.keys.map(move), log_weight=weight, **moved)
        if "columns" in vars(self):
            vars(plan)["columns"] = Columns(*(move(x) for x in vars(self.columns).values()))
        return plan


def _chunk_of(keys, row_idx):
    return CHUNK if row_idx.shape[1] <= CHUNK * len(keys) else max(CHUNK, LONG_CHUNK)


def _most_items(listed, entries, chunk):
    return min(listed, entries) + entries // chunk


def _rows_of(chosen, width, parts):
    """(row_ptr [Hs, parts * M + 1], row_idx [Hs, M * K]): of each part one row after the other, what is in
    part * width + 0:width, counted from part * width."""
    if forms.takes(chosen):
        from longspan.kernels.sparse.lists_triton import rows_triton

        return rows_triton(chosen, width, parts)
    return _rows(chosen, width, parts)


def _rows(chosen, width, parts):
    heads, rows, most = chosen.shape
    there = torch.stack([(chosen >= n * width) & (chosen < (n + 1) * width) for n in range(parts)], 1).flatten(1, 2)
    row_ptr = torch.nn.functional.pad(there.sum(-1).cumsum(-1), (1, 0))
    slots = torch.where(there, row_ptr[:, :-1, None] + there.cumsum(-1) - 1, rows * most)
    table = torch.zeros(heads, rows * most + 1, dtype=torch.int32, device=chosen.device)
    for part in slots.unflatten(1, (parts, rows)).unbind(1):
        table.scatter_(1, part.flatten(1), (chosen % max(width, 1)).int().flatten(1))  # the last takes what is left out
    return row_ptr.int(), table[:, :-1].contiguous()


def _columns(row_ptr, row_idx, num_cols, chunk, most_items):
    """(col_ptr, col_idx, item_ptr, item_col)."""
    heads, device = len(row_ptr), row_ptr.device
    entry = torch.arange(row_idx.shape[1], dtype=torch.int32, device=device).expand(heads, -1).contiguous()
    listed = (entry >= row_ptr[:, :1]) & (entry < row_ptr[:, -1:])
    by_column, order = torch.where(listed, row_idx, num_cols).sort(stable=True, dim=-1)
    row_of = torch.searchsorted(row_ptr, entry, right=True) - 1  # ascends within a column
    edges = torch.arange(num_cols + 1, dtype=torch.int32, device=device).expand(heads, -1).contiguous()
    col_ptr = torch.searchsorted(by_column, edges)
    items = (col_ptr.diff(dim=-1) + (chunk - 1)).div(chunk, rounding_mode="floor")
    item_ptr = torch.nn.functional.pad(items.cumsum(-1), (1, 0))
    item = torch.arange(most_items, device=device).expand(heads, -1).contiguous()
    item_col = torch.searchsorted(item_ptr, item, right=True) - 1
    return tuple(x.int() for x in (col_ptr, row_of.gather(1, order), item_ptr, item_col))
