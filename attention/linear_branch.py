"""The linear branch beside chosen blocks (SLA, arXiv 2509.24006): what each block of queries reads is one state.

A state holds a query's whole document, or under a causal mask what comes before the block of queries; between ranks
states travel as those of linear attention do. `rest` takes the chosen blocks out again: a rank subtracts the sums of
the blocks that it attends to, of its own and of those that arrived, and sends their gradients back with the others.
Arithmetic: kernels.block_states.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from longspan.attention.arguments import pick_transport
from longspan.attention.block_tables import pieces
from longspan.kernels.block_states import LOST, MAPS, choose, state_dtype
from longspan.kernels.fold import fold_chains, step, summarize
from longspan.kernels.linear.splits import Chains
from longspan.kernels.sparse import Blocks, kept_of
from longspan.kernels.sparse.states import KeyStates
from longspan.parallel.layout import Layout
from longspan.parallel.scan import scan_plan, start_scan

OVER = ("all", "rest")
WHOLE_BLOCK = 1024  # tokens summed at once where all queries of a document read the same


@dataclass(frozen=True)
class LinearBranch:
    """Adds o weight^T + bias to sparse attention, o = phi(q) S / (phi(q) z) over other keys than softmax, S and z sums
    of phi(k) v^T and phi(k).

    weight: [D, D]; bias: [D]; for all heads. over: "all" tokens that the mask lets a query see; or the "rest", blocks
    that could have been chosen and were not (a query for which there are none gets o = 0; a causal query's own block
    always belongs to softmax). feature_map: a name in kernels.block_states.MAPS. q, k: with "identity", queries and
    keys to which a positive map has been applied, [T, Hq, K] and [T, Hkv, K]; only for "all".
    """

    weight: torch.Tensor
    bias: torch.Tensor
    over: str = "all"
    feature_map: str = "softmax"
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None

    @property
    def options(self):
        return self.over, self.feature_map, self.q is None

    def check(self, q, k, selection, causal) -> None:
        """Raises ValueError for what does not fit; selection: a TopBlocks."""
        width = q.shape[2]
        if self.over not in OVER:
            raise ValueError(f"LinearBranch.over={self.over!r} is unknown; use {' or '.join(OVER)}")
        if self.feature_map not in MAPS:
            raise ValueError(f"LinearBranch.feature_map={self.feature_map!r} is unknown; use {', '.join(MAPS)}")
        if self.weight.shape != (width, width) or self.bias.shape != (width,):
            raise ValueError(
                f"LinearBranch has a weight {tuple(self.weight.shape)} and a bias {tuple(self.bias.shape)}; heads of"
                f" {width} need {(width, width)} and {(width,)}"
            )
        given = self.q is not None and self.k is not None
        if given != (self.feature_map == "identity") or given != (self.q is not None or self.k is not None):
            raise ValueError("LinearBranch takes q and k with feature_map='identity', and only then")
        if given and self.over == "rest":
            raise ValueError("LinearBranch over='rest' maps keys that arrive itself; it takes no q and k of its own")
        if given and (self.q.shape[:2] != q.shape[:2] or self.k.shape != (*k.shape[:2], self.q.shape[2])):
            raise ValueError(
                f"LinearBranch has q {tuple(self.q.shape)} and k {tuple(self.k.shape)}; their tokens and heads must be"
                f" those of {tuple(q.shape)} and {tuple(k.shape)}, and their widths equal"
            )
        if self.over == "rest" and causal and selection.query_block % selection.key_block:
            raise ValueError(
                f"LinearBranch over='rest' under a causal mask needs whole key blocks in a query block, not"
                f" key_block={selection.key_block} in query_block={selection.query_block}"
            )


@dataclass(frozen=True)
class Way:
    """States in one direction of time. sums: the blocks that are summed; summary: folds their sums to one for every
    linked span; inner: from them and what enters spans to the states; rows: int32, the state of each block that reads
    one, -1 for zero."""

    sums: Blocks
    summary: Chains
    inner: Chains
    rows: torch.Tensor

    def map(self, move) -> "Way":
        return Way(self.sums.map(move), self.summary.map(move), self.inner.map(move), move(self.rows))


@dataclass(frozen=True)
class BranchTables:
    """queries: the blocks that read states; keys: those that get their gradients. reads: int32, like forward.rows, also
    -1 where all blocks are chosen. spans: where all queries of a document read the same, folds gradients of blocks to
    those of spans, from which `backward` goes on. owners: int32, the span of every key block of the selection."""

    queries: Blocks
    keys: Blocks
    forward: Way
    backward: Way
    reads: torch.Tensor
    spans: Chains | None
    owners: torch.Tensor

    def map(self, move) -> "BranchTables":
        """The same with every tensor passed through `move`."""
        ways = (x.map(move) for x in list(vars(self).values())[:4])
        return BranchTables(*ways, move(self.reads), self.spans and self.spans.map(move), move(self.owners))


def branch_tables(layout: Layout, rank, query_block, key_block, keep, causal: bool, over: str) -> BranchTables:
    plan, offsets = scan_plan(layout, rank), np.array(layout.local_offsets(rank))
    queries = pieces(layout, rank, query_block).local
    keys, sums, spans, listed = queries, (queries, queries), None, pieces(layout, rank, key_block).local
    if over == "rest":
        keys = listed
        sums = keys, queries
    elif not causal:
        queries = keys = Blocks.of(offsets, WHOLE_BLOCK)
        sums = queries, queries
    if causal:
        around = np.searchsorted(queries.start.numpy(), keys.start.numpy(), side="right") - 1  # the query blocks
        forward = _passing(sums[0], queries, offsets, plan.linked, plan.forward.which, 1)
        backward = _passing(sums[1], queries, offsets, plan.linked, plan.backward.which, -1)
        backward = replace(backward, rows=backward.rows[around])
    else:
        summed, readers = ([_members(x, offsets) for x in of] for of in (sums, (queries, keys)))
        if over == "all":
            numbers = range(len(summed[1]))
            spans, summed[1] = _summary(summed[1], numbers), [range(n, n + 1) for n in numbers]
        forward, backward = (_whole(*x, plan.linked, plan.whole.which) for x in zip(sums, summed, readers))
    reads = forward.rows
    if over == "rest":
        length = np.array(layout.lengths)[queries.document.numpy()]
        start = queries.position.numpy().astype(np.int64) // query_block * query_block
        candidates = start // key_block if causal else -(-length // key_block)
        some = torch.from_numpy(candidates > kept_of(candidates, keep))
        reads = torch.where(some, torch.arange(len(queries), dtype=torch.int32), -1)
    owners = np.searchsorted(offsets, listed.start.numpy(), side="right") - 1
    return BranchTables(queries, keys, forward, backward, reads, spans, torch.from_numpy(owners).int())


def _summary(members, linked):
    chains = [(-1, [(n, -1) for n in members[span]] + [(-1, row)]) for row, span in enumerate(linked)]
    return Chains.of(chains, len(linked))


def _members(blocks, offsets):
    """The blocks of every span."""
    return [range(*ends) for ends in pairwise(np.searchsorted(blocks.start.numpy(), offsets).tolist())]


def _passing(sums, readers, offsets, linked, entered, direction) -> Way:
    """Every reader gets what comes before it, or after: sums are cut where readers are."""
    members = [blocks[::direction] for blocks in _members(sums, offsets)]
    entry = {span: n for n, span in enumerate(entered)}
    rows, chains, starts = np.full(len(readers), -1, np.int32), [], sums.start.tolist()
    reader_at = {start: n for n, start in enumerate(readers.start.tolist())}
    for span, blocks in enumerate(members):
        chain = []
        for place, block in enumerate(blocks):
            reader = reader_at.get(starts[block], -1)
            if reader >= 0 and (place or span in entry):
                rows[reader] = reader
            chain.append((block if place < len(blocks) - 1 else -1, rows[reader] if reader >= 0 else -1))
        chains.append((entry.get(span, -1), chain))
    return Way(sums, _summary(members, linked), Chains.of(chains, len(readers)), torch.from_numpy(rows))


def _whole(sums, summed, readers, linked, entered) -> Way:
    """Every reader gets its whole document; what enters a span holds the span's own sum. summed, readers: of every
    span, the sums and the blocks that read."""
    entry = {span: n for n, span in enumerate(entered)}
    chains = [
        (entry.get(span, -1), ([] if span in entry else [(n, -1) for n in blocks]) + [(-1, span)])
        for span, blocks in enumerate(summed)
    ]
    rows = torch.from_numpy(np.repeat(np.arange(len(summed)), [len(x) for x in readers]))
    return Way(sums, _summary(summed, linked), Chains.of(chains, len(summed)), rows.int())


class Branch:
    """One call's branch: what it does on a rank, and between ranks. q, k: those of the branch, mapped or not."""

    def __init__(self, linear: LinearBranch, selection, causal: bool, seq):
        blocks = selection.query_block, selection.key_block, selection.keep
        self.tables = seq.derive(branch_tables, *blocks, causal, linear.over)
        self.plan = seq.derive(scan_plan, seq.parallel.topology)
        self.transport = pick_transport(seq, causal)
        self.parallel, self.feature_map = seq.parallel, linear.feature_map
        self.rest, self.causal = linear.over == "rest", causal
        self.inside, self.whole = causal and not self.rest, not (causal or self.rest)

    def start(self, k, v, travels: bool):
        """(sums of blocks, what enters spans under way or None)."""
        form = self._form(k, v)
        sums = form.sums(k, v, None, self.tables.forward.sums, self.feature_map, k.shape[1], state_dtype(k.dtype))
        return sums, self._scan("forward", self.tables.forward, sums) if travels else None

    def states(self, q, k, v, weight, sums, entry, parts):
        """(states, totals), see kernels.block_states; where all queries of a document read the same states times weight
        in place of totals. parts: (part, keys, values) of every part, local ones first."""
        forward = self.tables.forward
        totals = states = fold_chains(sums, None, forward.inner, entry)
        rows, form = forward.rows, self._form(k, v)
        if self.rest:
            parts = [x for x in parts if x[1].shape[0]] if len(forward.rows) else []
            for number, (part, keys, values) in enumerate(parts):
                theirs = sums if number == 0 else self._sums_of(part, keys, values)
                dtype = states.dtype if number < len(parts) - 1 else state_dtype(k.dtype)
                options = {"transposed": False, "heads": k.shape[1], "dtype": dtype}
                states = form.listed(states, rows, theirs, part.plan, **options)
                rows = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        if self.whole:
            return states, _times(states, weight.mT, q.shape[2])
        normalizers = totals[:, :, 0, -q.shape[2] :]
        if self.rest:
            normalizers = normalizers[forward.rows.clamp(min=0)]
        return states, normalizers.contiguous()

    def output(self, sparse, q, k, v, states, totals, weight, bias):
        tables, form = self.tables, self._form(k, v)
        if self.whole:
            return form.whole_output(sparse, q, totals, tables.reads, tables.queries, bias, self.feature_map)
        return form.output(
            sparse, q, k, v, states, totals, tables.reads, tables.queries, weight, bias, self.feature_map, self.inside,
            LOST[totals.dtype],
        )  # fmt: skip

    def start_backward(self, d_out, q, k, v, states, totals, weight):
        """Gradients of q, weight and bias, and what `gradients` takes; starts passing gradients of states."""
        form, backward = self._form(k, v), self.tables.backward
        if self.whole:
            dq, sums, d_bias = form.whole_query_gradients(
                d_out, q, totals, self.tables.reads, self.tables.queries, self.feature_map, state_dtype(k.dtype)
            )
            sums = fold_chains(sums, None, self.tables.spans)
            d_totals, states = (_split(x, q.shape[2])[0] for x in (sums, states))
            d_weight = torch.bmm(d_totals.mT, states).sum(0)
            sums = _times(sums, weight, q.shape[2])
            return dq, d_weight, d_bias, (q, None, None, sums, self._scan("backward", backward, sums))
        dq, d_num, d_den, value = form.query_gradients(
            d_out, q, k, v, states, totals, self.tables.reads, self.tables.queries, weight, self.feature_map,
            self.inside, LOST[totals.dtype],
        )  # fmt: skip
        sums = form.sums(q, d_num, d_den, backward.sums, self.feature_map, k.shape[1], state_dtype(k.dtype))
        d_weight = d_out.flatten(0, 1).to(value.dtype).T @ value.flatten(0, 1)
        d_bias = d_out.sum((0, 1), dtype=totals.dtype)
        return dq, d_weight, d_bias, (q, d_num, d_den, sums, self._scan("backward", backward, sums))

    def part_gradients(self, part, keys, values, going, onto):
        """(dk, dv) of keys that arrived, added to those in `onto`."""
        form, sums = self._form(keys, values), going[3]
        options = {"transposed": True, "heads": keys.shape[1], "dtype": state_dtype(keys.dtype)}
        states = form.listed(None, None, sums, part.plan, **options)
        rows = torch.arange(len(part.plan.keys), dtype=torch.int32, device=keys.device)
        return form.key_gradients(keys, values, states, rows, part.plan.keys, self.feature_map, onto=onto)

    def gives_states(self, k, v) -> bool:
        """Whether there are `key_states`: where all queries of a document read the same, in Triton."""
        return self.whole and choose(k.device.type, k.dtype, k.shape[2], v.shape[2], ())[1] is None

    def key_states(self, going) -> KeyStates:
        """What gradients of local keys come from, as kernels.sparse takes it."""
        sums, pending = going[3:]
        if pending is not None:
            sums = fold_chains(sums, None, self.tables.backward.inner, self.finish(pending, sums))
        return KeyStates(sums, self.tables.owners, self.feature_map)

    def gradients(self, part, k, v, going, onto):
        """(dk, dv) of the local keys, added to those in `onto` that are not None. part: what is attended to of them."""
        q, d_num, d_den, sums, pending = going
        form, backward = self._form(k, v), self.tables.backward
        states = fold_chains(sums, None, backward.inner, self.finish(pending, sums))
        rows = backward.rows
        if self.rest and len(rows):
            options = {"transposed": True, "heads": k.shape[1], "dtype": state_dtype(k.dtype)}
            states = form.listed(states, rows, sums, part.plan, **options)
            rows = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        inside = (q, d_num, d_den) if self.inside else None
        return form.key_gradients(k, v, states, rows, self.tables.keys, self.feature_map, inside, onto)

    def lonely_gradients(self, part, k, v, states, onto):
        """Adds to the gradients in `onto` those of keys in blocks that no query chose, which `states` left out."""
        self._form(k, v).lonely_key_gradients(k, v, states, part.plan, onto)

    def finish(self, pending, sums):
        """What enters spans, [n, Hkv, 1, K * V + K] in at least fp32."""
        if pending is None:
            return sums.new_empty(0, *sums.shape[1:], dtype=torch.promote_types(sums.dtype, torch.float32))
        return pending.wait()[0]

    def _sums_of(self, part, keys, values):
        form = self._form(keys, values)
        return form.sums(keys, values, None, part.plan.keys, self.feature_map, keys.shape[1], state_dtype(keys.dtype))

    def _scan(self, direction, way, sums):
        if not self.plan.connected:
            return None
        direction, state = direction if self.causal else "whole", fold_chains(sums, None, way.summary)
        return start_scan(
            self.transport, self.plan, direction, state, None, self.parallel.state_group, fold=fold_chains,
            summarize=summarize, step=step, peers=self.parallel.peers,
        )  # fmt: skip

    def _form(self, k, v):
        sizes = () if self.whole else (self.tables.queries.size, self.tables.keys.size)
        return choose(k.device.type, k.dtype, k.shape[2], v.shape[2], sizes)[0]


def _split(states, key_size):
    """Views: S [rows * heads, K, V] and z [rows * heads, K]."""
    states = states.flatten(0, 2)
    size = states.shape[1] - key_size
    matrices, normalizers = states.split_with_sizes((size, key_size), 1)
    return matrices.view(len(states), key_size, size // key_size), normalizers


def _times(states, weight, key_size):
    """The states with S times `weight`."""
    out = states.new_empty(states.shape)
    (matrix, normalizer), (product, copied) = _split(states, key_size), _split(out, key_size)
    torch.bmm(matrix, weight.to(matrix.dtype).expand(len(matrix), -1, -1), out=product)
    copied.copy_(normalizer)
    return out
