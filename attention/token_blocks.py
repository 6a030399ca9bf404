"""Blocks chosen token by token: mixture of block attention (MoBA) and native sparse attention (NSA).

A plan lists for a block of queries what any of its tokens chose; which of them a token sees is the plan's rule.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.attention.block_tables import Pieces, pieces
from longspan.attention.selection import require_whole
from longspan.attention.selections import block_means, block_sums
from longspan.kernels.sparse import Picks, Ranges, top

SCORE_ELEMENTS = 1 << 22  # scores held at once


@dataclass(frozen=True)
class TokenTop:
    """MoBA (arXiv 2502.13189): every query head of every token attends to the `keep` key blocks whose mean key has the
    highest product with its query. Under a causal mask these are its own block, as far as the mask lets it see, and
    keep - 1 wholly in the past; without a mask any. Blocks: tokens; query_block: tokens that share a list, which does
    not change the result."""

    keep: int = 8
    query_block: int = 32
    key_block: int = 128

    def __post_init__(self):
        require_whole(self, keep=1, query_block=1, key_block=1)

    def pairs(self, length: int) -> int:
        """Query-key pairs of one head in a document of `length` tokens under a causal mask."""
        return _pairs(self, length)

    def tables(self, seq, causal: bool) -> "TokenTables":
        return seq.derive(token_tables, self.query_block, self.key_block, 0, causal)

    def coarse(self, k, v, tables, gather):
        return None, None

    def choose(self, q, k, coarse_k, tables: "TokenTables", ranks):
        """(int32 [Hkv, local query pieces, n]: key blocks, ascending, -1 for none, None, Picks of every query head)."""
        means, (heads, per_key) = block_means(k, tables.keys, ranks), (k.shape[1], q.shape[1] // k.shape[1])
        past = tables.past(per_key, self.keep)
        rows = q.to(means.dtype).unflatten(1, (heads, -1)).transpose(1, 2).flatten(0, 1)
        mine = torch.arange(len(rows), dtype=torch.int32, device=q.device)
        found = top(rows, means, mine, past) if past.kept else mine.new_empty(heads, len(rows), 0)
        found = found.unflatten(1, (q.shape[0], per_key)).permute(1, 0, 2, 3).flatten(1, 2)  # [T, Hq, n]
        if tables.causal:
            found = torch.cat([found, tables.own[:, None, None].expand(-1, q.shape[1], 1)], 2)
        return tables.listed(found, heads)


@dataclass(frozen=True)
class CompressedTop:
    """The selected branch of NSA (arXiv 2502.11089): compressed keys tell every token which blocks to attend to.

    A compressed key is the mean of `window` keys, one every `stride` tokens. A token's attention to those that end at
    or before it (without a mask: to all of its document) is softmax(q . key / sqrt(D)); a block gets, for every stretch
    of `stride` tokens of it, the attention to all compressed keys over that stretch, summed over the query heads that
    share a key head. The `keep` best of the blocks up to the token's own are taken, among them always the `first` of
    the document and the `recent` up to its own. Blocks: tokens; stride divides window and key_block,
    window is at most key_block.

    Not here: NSA's learned compression in place of the mean, its branch of attention to compressed keys, its window
    branch (softmax_attention, or Window) and the gates that add the three.
    """

    keep: int = 16
    query_block: int = 16
    key_block: int = 64
    window: int = 32
    stride: int = 16
    first: int = 1
    recent: int = 2

    def __post_init__(self):
        require_whole(self, keep=1, query_block=1, key_block=1, window=1, stride=1, first=0, recent=1)
        if self.window % self.stride or self.key_block % self.stride or self.window > self.key_block:
            raise ValueError(
                f"CompressedTop.window={self.window} must be a multiple of stride={self.stride} and at most"
                f" key_block={self.key_block}, another multiple"
            )
        if self.keep < self.first + self.recent:
            raise ValueError(
                f"CompressedTop.keep={self.keep} must be at least first + recent, {self.first + self.recent}"
            )

    def pairs(self, length: int) -> int:
        """Query-key pairs of one head in a document of `length` tokens under a causal mask."""
        return _pairs(self, length)

    def tables(self, seq, causal: bool) -> "TokenTables":
        return seq.derive(token_tables, self.query_block, self.key_block, self.stride, causal)

    def coarse(self, k, v, tables, gather):
        return None, None

    def choose(self, q, k, coarse_k, tables: "TokenTables", ranks):
        """(int32 [Hkv, local query pieces, n]: key blocks, ascending, -1 for none, None, Picks of every key head)."""
        keys, whole = self._compressed(k, tables, ranks)
        heads, block = k.shape[1], torch.arange(len(tables.keys.length), device=k.device)
        q = q.to(keys.dtype).unflatten(1, (heads, -1)).transpose(0, 1)  # [Hkv, T, heads of it, D]
        batch = max(1, SCORE_ELEMENTS // (q.shape[0] * q.shape[2] * len(whole)))
        found = [block.new_empty(0, heads, min(self.keep, len(block)))]
        for at in range(0, q.shape[1], batch):
            rows = slice(at, at + batch)
            scores = self._importance(q[:, rows], keys, whole, tables, rows)  # [Hkv, rows, blocks]
            first, own = tables.first[rows, None], tables.own[rows, None]
            last = own if tables.causal else tables.last[rows, None]
            forced = (block < first + self.first) | ((block > own - self.recent) & (block <= own))
            scores = scores.masked_fill(forced, torch.inf).masked_fill((block < first) | (block > last), -torch.inf)
            values, order = scores.topk(min(self.keep, len(block)), -1)
            found.append(order.masked_fill(values == -torch.inf, -1).transpose(0, 1))
        return tables.listed(torch.cat(found), heads)

    def _compressed(self, k, tables, ranks):
        """([Hkv, stretches, D], bool [stretches]): of every stretch the mean key of the window that starts there, and
        whether it lies in one document."""
        sums, turns = block_sums((k,), tables.stretches, ranks), self.window // self.stride
        count, whole = len(sums), tables.stretch_position + self.window <= tables.stretch_stop
        padded = torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, turns - 1))
        total = sum(padded[turn : turn + count] for turn in range(turns))
        return (total / self.window).transpose(0, 1), whole

    def _importance(self, q, keys, whole, tables, rows):
        """[Hkv, rows, blocks] of queries [Hkv, rows, heads of it, D]."""
        number, turns = tables.stretches_first, self.window // self.stride
        column = torch.arange(len(whole), device=q.device)
        first, stop = number[tables.document[rows], None], number[tables.document[rows] + 1, None]
        seen = whole & (column >= first) & (column < stop)
        if tables.causal:
            seen = seen & (tables.stretch_position + self.window <= tables.position[rows, None] + 1)
        logits = (q.flatten(1, 2) @ keys.mT).unflatten(1, q.shape[1:3]) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
        padded = torch.nn.functional.pad(weights, (turns - 1, 0))
        stretches = sum(padded[..., turns - 1 - turn :][..., : len(whole)] for turn in range(turns))
        stretches = torch.nn.functional.pad(stretches, (0, 1))  # number -1 is zero
        return stretches[..., tables.stretches_of].sum(-1)


def _pairs(selection, length):
    token = np.arange(length)
    past = np.minimum(selection.keep - 1, token // selection.key_block)
    return int((past * selection.key_block + token % selection.key_block + 1).sum())


@dataclass(frozen=True)
class TokenTables:
    """queries, keys: the blocks; stretches: those of compressed keys, or None. For every local token, int64 [T_local]:
    its document, position, own key block, and the first and last block of its document. rows: int64 [local query
    pieces, query block], the tokens of each, -1 for none. bounds: [T_local, 2] own and first on the host. Of stretches:
    stretch_position, where each starts, stretch_stop, where its document ends; stretches_first: [documents + 1], the
    first of each document; stretches_of: [key blocks, n], those of a block, -1 for none."""

    queries: Pieces
    keys: Pieces
    document: torch.Tensor
    position: torch.Tensor
    own: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    rows: torch.Tensor
    bounds: np.ndarray
    causal: bool
    stretches: Pieces | None = None
    stretch_position: torch.Tensor | None = None
    stretch_stop: torch.Tensor | None = None
    stretches_first: torch.Tensor | None = None
    stretches_of: torch.Tensor | None = None

    def map(self, move) -> "TokenTables":
        """The same with every tensor passed through `move`."""
        moved = {name: move(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        moved |= {name: x.map(move) for name, x in vars(self).items() if isinstance(x, Pieces)}
        return replace(self, **moved)

    def past(self, repeats: int, keep: int) -> Ranges:
        """What each token chooses from, `repeats` times: under a causal mask keep - 1 blocks before its own."""
        first = self.first.repeat_interleave(repeats).int()
        stop = (self.own if self.causal else self.last + 1).repeat_interleave(repeats).int()
        bounds, kept = self.bounds.repeat(repeats, 0), keep - 1 if self.causal else keep
        kept = min(kept, int((bounds[:, 1] - bounds[:, 0]).max(initial=0)))
        return Ranges(first, stop, (stop - first).clamp(max=kept), bounds, kept)

    def listed(self, found, heads):
        """What choose gives, for int64 [T_local, heads, n] blocks that tokens chose, -1 for none."""
        numbers = torch.where(found < 0, -1, found - self.first[:, None, None])
        chosen = torch.nn.functional.pad(found, (0, 0, 0, 0, 0, 1), value=-1)[self.rows]  # row -1 is none
        chosen = chosen.unflatten(2, (heads, -1)).movedim(2, 0).flatten(2)
        return distinct(chosen), None, Picks(numbers.int())


def distinct(chosen: torch.Tensor) -> torch.Tensor:
    """[H, P, m] -> int32 [H, P, n]: every number that is not negative once, ascending, -1 for none. Waits for the
    device."""
    ordered = chosen.int().sort(-1).values
    again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    ordered = ordered.masked_fill(again, -1).sort(-1).values
    most = int((ordered >= 0).sum(-1).max()) if ordered.numel() else 0
    return ordered[..., ordered.shape[-1] - most :]


def token_tables(layout, rank: int, query_block: int, key_block: int, stride: int, causal: bool) -> TokenTables:
    """The tables of `rank`; stride: tokens of a stretch, or 0."""
    queries, keys = pieces(layout, rank, query_block), pieces(layout, rank, key_block)
    lengths = np.array(layout.lengths)
    base = _base(lengths, key_block)
    spans = layout.spans[rank]
    document = np.concatenate([[]] + [np.full(len(span), span.document) for span in spans]).astype(np.int64)
    position = layout.positions(rank).astype(np.int64)
    own = base[document] + position // key_block
    first, last = base[document], base[document + 1] - 1
    inside = np.arange(query_block)
    rows = np.where(inside < queries.local.length.numpy()[:, None], queries.local.start.numpy()[:, None] + inside, -1)
    bounds = np.stack([first, own if causal else last + 1], 1)
    tensors = map(_int64, (document, position, own, first, last, rows))
    tables = TokenTables(queries, keys, *tensors, bounds, causal)
    if not stride:
        return tables
    number = _base(lengths, stride)
    of = np.repeat(np.arange(len(lengths)), np.diff(number))
    block_document = np.repeat(np.arange(len(lengths)), np.diff(base))
    place = np.arange(base[-1]) - base[block_document]
    listed = (number[block_document] + place * (key_block // stride))[:, None] + np.arange(key_block // stride)
    return replace(
        tables,
        stretches=pieces(layout, rank, stride),
        stretch_position=_int64((np.arange(number[-1]) - number[of]) * stride),
        stretch_stop=_int64(lengths[of]),
        stretches_first=_int64(number),
        stretches_of=_int64(np.where(listed < number[block_document + 1][:, None], listed, -1)),
    )


def _base(lengths, size):
    return np.concatenate([[0], np.cumsum(-(-lengths // size))])


def _int64(x):
    return torch.from_numpy(np.ascontiguousarray(x).astype(np.int64))
