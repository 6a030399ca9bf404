"""Sparse attention: keys that are asked for, and lists of blocks."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from longspan.attention.expected_requests import expected_requests
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.hierarchy_tables import tile_rows
from longspan.attention.outline.context import Outline
from longspan.attention.outline.linear_branch import Branch
from longspan.attention.outline.stand_in import Call, StandIn
from longspan.attention.selections import TopBlocks
from longspan.attention.shared_requests import is_cut, room_for, window_sizes
from longspan.attention.sparse_estimate import Estimate
from longspan.kernels.sparse import kept_of
from longspan.kernels.wide import wide_dtype


def outlined_sparse(outline: Outline, q, k, v, selection, linear, causal):
    """linear: a LinearBranch, or None."""
    if linear is None:
        return StandIn.apply(_Sparse(outline, selection, causal), q, k, v)
    own = linear.weight, linear.bias, linear.q, linear.k
    branch = Branch(outline, selection, causal, linear.over == "rest")
    return StandIn.apply(_Sparse(outline, selection, causal, branch), q, k, v, *own)


@dataclass(frozen=True)
class _Sparse:
    """Keys of other ranks that are asked for, and all means, come once and stay for the backward pass; a recomputed
    layer lays this rank's that are chosen beside them once more."""

    outline: Outline
    selection: Any
    causal: bool
    branch: Branch | None = None

    def travels(self, q, k, v, *own):
        self._note(q, k, backward=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        asked, _, _ = self._asked_and_given(q, k)
        arrived = [x.new_empty(asked, *x.shape[1:]) for x in (k, v)] if self.outline.world_size > 1 else []
        if arrived and self._coarse_rows():
            arrived.append(self._means(k))
        entry = self.branch.entry(*own, k, v) if self.branch else None
        return out, lse, self._lists(q, k), arrived, entry

    def output(self, kept, q, k, v, *own):
        out, lse, lists, arrived, _ = kept
        means = arrived[2:] or ([self._means(k)] if self._coarse_rows() else [])
        states = self.branch.states(*own, q, k, v) if self.branch else ()
        if arrived:
            rows, room = self._buffers(q, k)[0], self._room(q, k)
            held = [x.new_empty(room or rows, *x.shape[1:]) for x in (k, v)]
            arrived = [x.new_empty(rows, *x.shape[1:]) for x in (k, v)] if is_cut(rows, room) else held
        return torch.empty_like(out) if self.branch else out, (*means, *states, out, lse, *arrived)

    def _means(self, k):
        """Of keys and values, side by side."""
        return k.new_empty(sum(self._coarse_rows()), 2 * k.shape[1], k.shape[2])

    def hold(self, d_out, q, k, v, *own):
        self._note(q, k, backward=True)
        # dq is made in fp32; when it is done come the states from which the branch's dk and dv follow.
        numbers = max(q.numel(), self.branch.late(own[3], k, v) if self.branch else 0)
        held = [q.new_empty(numbers, dtype=wide_dtype(q.dtype)), *self._lists(q, k)]  # the same again by key blocks
        # What is sent back, and what comes back.
        arrived, given = self._buffers(q, k)
        returned = () if self._window(k) else (given,)  # else into the window
        held += [x.new_empty(rows, *x.shape[1:]) for rows in (arrived, *returned) for x in (k, v)]
        return held + (self.branch.hold(*own, q, k, v) if self.branch else [])

    def _note(self, q, k, backward):
        asked, _, by_request = self._asked_and_given(q, k)
        sizes = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
        asked = asked if by_request else None
        self.outline.record(Call("sparse", self.selection, backward, *sizes, asked, self._window(k)))

    def _window(self, k):
        """Bytes of what this rank shares with others."""
        outline = self.outline
        if not outline.peer_blocks:
            return 0
        given = outline.num_tokens_local, outline.world_size, *k.shape[1:], k.itemsize
        return sum(window_sizes(outline.parallel.sparse, *given) or ())

    def _room(self, q, k):
        """Rows of the buffer for all that lists could name of keys that come through shared memory, until it is known
        how many do; 0 without."""
        if not self._window(k):
            return 0
        size = self.selection.block if isinstance(self.selection, Hierarchical) else self.selection.key_block
        return room_for(self.outline.num_tokens - self._apart * self.outline.num_tokens_local, self._entries(), size)

    @property
    def _apart(self):
        """Whether local blocks do not lie with those that arrive."""
        return self.branch is not None and self.branch.rest

    def _buffers(self, q, k):
        """Rows of what arrives, and of what others get. By request this rank's own that are chosen lie in front, unless
        they are a part of their own: under a mask all, which their own queries see, else about as many as of another
        rank."""
        asked, given, by_request = self._asked_and_given(q, k)
        own = self.outline.num_tokens_local if self.causal else -(-asked // max(1, self.outline.world_size - 1))
        return asked + (by_request and not self._apart) * own, given

    def _asked_and_given(self, q, k):
        """Tokens whose keys this rank gets of others, and others of it, for every key head, of the rank that holds
        most, and whether by request. All of them in a ring, and of selections that are not known."""
        outline = self.outline
        if outline.world_size == 1:
            return 0, 0, False
        others, strategy = outline.num_tokens - outline.num_tokens_local, outline.parallel.sparse
        if strategy == "ring" or not isinstance(self.selection, (Hierarchical, TopBlocks)):
            return others, others, strategy != "ring"
        layout = outline.layout
        tokens, listed = expected_requests(self.selection, layout, self.causal, alike=True)
        if strategy == "auto" and not self._window(k):
            lists = k.shape[1]
            way = Estimate(q.shape[1], lists, k.shape[2], k.itemsize, outline.parallel.topology)
            selection, sizes = self.selection, layout.tokens_per_rank
            block = selection.block**2 if self._coarse_rows() else selection.query_block * selection.key_block
            if way.ring_is_faster(tokens * lists, listed * lists, sizes, lists, block):
                return others, others, False
        rank = (2 * tokens.sum(1) + tokens.sum(0)).argmax()
        return ceil(tokens[rank].sum() - 1e-6), ceil(tokens[:, rank].sum() - 1e-6), True

    def _coarse_rows(self):
        """Rows of every level of means."""
        if not isinstance(self.selection, Hierarchical):
            return []
        block, levels = self.selection.block, range(1, self.selection.levels + 1)
        return [sum(-(-length // block**level) for length in self.outline.lengths) for level in levels]

    def _lists(self, q, k):
        """Int32 tables of this rank's plans: lists have the same room for every block. Over ranks there is
        where each block that arrives lies here, and where this rank's went."""
        outline, heads, shapes = self.outline, k.shape[1], []
        sizes, keys = self._list_sizes()
        for size, width in sizes:
            rows = outline.blocks(size)
            shapes += [(heads, rows * width), (heads, rows + 1)]
        if outline.world_size > 1:
            whole = outline.world_size * heads * outline.blocks(keys)
            shapes += [(4, whole + 1), (whole,)]  # room for all blocks that could arrive, and for others
        return [k.new_empty(shape, dtype=torch.int32) for shape in shapes]

    def _entries(self):
        """Of a list of fine blocks."""
        (size, width), *_ = self._list_sizes()[0]
        return self.outline.blocks(size) * width

    def _list_sizes(self):
        """([(tokens of a query block, blocks of a list)], those of fine blocks first; tokens of a key block)."""
        selection, longest = self.selection, max(self.outline.lengths)
        if isinstance(selection, Hierarchical):  # under a mask with what is around queries
            keys, rows = selection.block, -(-longest // selection.block**selection.levels) - self.causal
            widths = [selection.keep + self.causal] * (selection.levels - 1) + [min(selection.keep, rows) + self.causal]
            sizes = [(selection.block, widths[0])]
            if selection.levels > 1:
                under = sum(self._turns(level) * width for level, width in enumerate(widths[1:], 1))
                last = -(-rows // selection.block) + self._turns(selection.levels) - 1  # all of the last level
                sizes.append((tile_rows(selection.block), under + last))
        else:
            sizes, keys = [(selection.query_block, self._longest_list())], selection.key_block
        return sizes, keys

    def _turns(self, level):
        """Blocks under a row of the next level: two where some last row of a level has fewer tokens."""
        span, block = self.selection.block**level, self.selection.block
        return 1 + any(length % span and length // span % block for length in self.outline.lengths)

    def _longest_list(self):
        selection, longest = self.selection, max(self.outline.lengths)
        if not isinstance(selection, TopBlocks):  # about as long as all
            return -(-int(selection.pairs(longest)) // (longest * selection.key_block))
        keys = selection.key_block
        if not self.causal:
            return int(kept_of(np.array(-(-longest // keys)), selection.keep))
        begin = np.arange(0, longest, selection.query_block)
        met = -(-np.minimum(begin + selection.query_block, longest) // keys) - begin // keys
        return int(kept_of(begin // keys, selection.keep).max() + met.max())
