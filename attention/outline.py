"""Attention on tensors without data: what each kind keeps for the backward pass and holds meanwhile, and no arithmetic.

A model that gets an `Outline` as its `seq` runs every line of its own on tensors of torch's meta device, while
attention allocates what its kernels would and notes the call. So memory and work of a model are counted on the model
itself, for lengths and GPUs that are not there. Recomputation is that of longspan.attention.recompute: what a layer
keeps for it is kept here as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from longspan.attention.hierarchy import Hierarchical
from longspan.attention.hierarchy_tables import tile_rows
from longspan.attention.linear_branch import WHOLE_BLOCK
from longspan.attention.offload import Offload
from longspan.attention.recompute import keep, recall
from longspan.attention.schedules import ranks_at_once
from longspan.kernels.block_states import state_dtype
from longspan.kernels.linear.chunked import accumulation_dtype
from longspan.kernels.linear.groups import CHUNK, ROWS
from longspan.kernels.sparse import kept_of
from longspan.parallel.geometry import Mask

# Of the fused kernels of linear attention (kernels.linear): multiprocessors that splits are made for, programs per one,
# columns of a program, fewest tokens of a split; bytes per number, token and head that the delta rule keeps of chunks;
# bytes of the states of chunks in one wave of decay per channel; columns of scores kept there.
PROCESSORS, ROUNDS, COLUMNS, MIN_SPLIT = 132, 2, 64, 512
DELTA_CHUNK_NUMBERS, CHANNEL_WAVE_NUMBERS, CHANNEL_SCORES = 144, 1 << 27, 64


@dataclass(frozen=True)
class Call:
    """One call of an attention kernel: kind is softmax, linear, sparse or convolution; detail says which (a Mask, a
    form of linear attention, a selection, a width)."""

    kind: str
    detail: Any
    backward: bool
    heads: int
    kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class Outline:
    """In the place of a SequenceContext: this rank's share of documents with these `lengths`, over `world_size` ranks.

    gpu: whether kernels are those of GPUs. positions: int64 [num_tokens_local]. record: gets every Call. derived: what
    `derive` answers, by function. softmax_strategy: by which keys travel, one of schedules.STRATEGIES.
    """

    lengths: tuple[int, ...]
    num_tokens_local: int
    world_size: int
    gpu: bool
    positions: torch.Tensor
    record: Callable[[Call], None]
    derived: dict = field(default_factory=dict)
    softmax_strategy: str = "ring"

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def layout(self):
        return SimpleNamespace(lengths=self.lengths)

    @property
    def parallel(self):
        return SimpleNamespace(linear="auto", softmax="auto", sparse="auto", group=None)

    @property
    def spans(self) -> int:
        """Runs of tokens of one document here: a document on several ranks is laid out in two (zig-zag)."""
        return len(self.lengths) if self.world_size == 1 else max(2, -(-len(self.lengths) // self.world_size))

    @property
    def linked(self) -> int:
        """Those that a state may enter."""
        return 0 if self.world_size == 1 else 2

    def derive(self, function, *_):
        return self.derived[function]

    def softmax(self, q, k, v, mask: Mask):
        return _StandIn.apply(_Softmax(self, mask), q, k, v)

    def linear(self, q, k, v, log_decay, beta, causal, dtype):
        return _StandIn.apply(_Linear(self, causal, dtype), q, k, v, log_decay, beta)

    def sparse(self, q, k, v, selection, linear, causal):
        if linear is None:
            return _StandIn.apply(_Sparse(self, selection, causal), q, k, v)
        own = linear.weight, linear.bias, linear.q, linear.k
        branch = _Branch(self, selection, causal, linear.over == "rest")
        return _StandIn.apply(_Sparse(self, selection, causal, branch), q, k, v, *own)

    def convolution(self, x, weight, bias):
        return _StandIn.apply(_Convolution(self), x, weight, bias)


class OutlinedOffload(Offload):
    """Of tensors without data: nothing is copied. put_away: gets every tensor that leaves, and returns one that takes
    no memory of the device."""

    def __init__(self, put_away: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.host_like = put_away

    def copy(self, pairs):
        return None

    def wait(self, event, device):
        pass


class _StandIn(torch.autograd.Function):
    """Runs one of the kinds below: `travels` what comes from other ranks and is kept for recomputation, `output` the
    result and what else is saved, `hold` what exists in the backward pass besides gradients."""

    @staticmethod
    def forward(ctx, kind, *inputs):
        kept = recall()
        if kept is None:
            kept = keep(kind.travels(*inputs))
        out, saved = kind.output(kept, *inputs)
        ctx.kind = kind
        ctx.save_for_backward(*inputs, *saved)
        ctx.inputs = len(inputs)
        return out.detach()

    @staticmethod
    def backward(ctx, d_out):
        tensors = ctx.saved_tensors
        inputs = tensors[: ctx.inputs]
        d_out = d_out.contiguous()
        held = ctx.kind.hold(d_out, *inputs)
        needed = ctx.needs_input_grad[1:]
        gradients = tuple(torch.empty_like(x) if need else None for x, need in zip(inputs, needed))
        del held
        return None, *gradients


@dataclass(frozen=True)
class _Softmax:
    """Keys travel step by step; results of steps, and gradients, are added in fp32."""

    outline: Outline
    mask: Mask

    def travels(self, q, k, v):
        self._note(q, k, backward=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_wide(q))
        if self.outline.world_size > 1:
            _held = self._arriving(q, k, v), torch.empty_like(q, dtype=_wide(q))
        return out, lse

    def output(self, kept, q, k, v):
        return kept[0], kept

    def hold(self, d_out, q, k, v):
        self._note(q, k, backward=True)
        held = [torch.empty_like(q, dtype=_wide(q))] if self.outline.gpu else []  # kernels add up dq in fp32
        if self.outline.world_size > 1:
            held += [*self._arriving(q, k, v), *(torch.empty_like(x, dtype=_wide(x)) for x in (k, v, k, v))]
            held += [
                torch.empty_like(q),
                *(torch.empty_like(x) for x in (k, v) for _ in range(max(self._at_once(q, k)))),
            ]
        return held

    def _at_once(self, q, k):
        """Of how many ranks a step brings keys, for every step."""
        return ranks_at_once(self.outline.softmax_strategy, self.outline.world_size, q.shape[1] // k.shape[1])

    def _arriving(self, q, k, v):
        """Keys and values of the step under way and of the next. A rank that sees all of the others gets as many from
        each as it has."""
        counts = self._at_once(q, k)
        most = max(map(sum, zip(counts, (*counts[1:], 0))))
        return [torch.empty_like(x) for x in (k, v) for _ in range(most)]

    def _note(self, q, k, backward):
        self.outline.record(Call("softmax", self.mask, backward, q.shape[1], k.shape[1], q.shape[2], k.shape[2]))


@dataclass(frozen=True)
class _Linear:
    """States travel; of each span, or split, the state that enters is saved."""

    outline: Outline
    causal: bool
    dtype: torch.dtype

    def travels(self, q, k, v, log_decay, beta):
        rows = len(self.outline.lengths) if not self.causal else self.outline.linked
        return self._states(rows, q, v)

    def output(self, kept, q, k, v, log_decay, beta):
        form = self._note(q, v, log_decay, beta, backward=False)
        out = v.new_empty(v.shape, dtype=self.dtype)
        _scratch = self._scratch(form, q, v, log_decay)
        if form in ("whole", "chunked"):
            return out, (kept,)
        if form == "general":
            return out, (kept, *(self._states(rows, q, v) for rows in self._blocks(len(q))))
        splits = self._splits(q, v)
        saved = [self._states(splits, q, v)]
        if form == "delta":
            saved += [self._states(splits, q, q), q.new_empty(len(q), q.shape[1], DELTA_CHUNK_NUMBERS)]
        return out, tuple(saved)

    def hold(self, d_out, q, k, v, log_decay, beta):
        form = self._note(q, v, log_decay, beta, backward=True)
        held = [self._states(self._splits(q, v), q, v), *self._scratch(form, q, v, log_decay)]
        if form == "fused" and log_decay is not None and log_decay.requires_grad:
            columns = -(-q.shape[2] // COLUMNS)  # sums of rows, of the reading and of the writing side
            held += [q.new_empty(columns, q.shape[1], len(q), dtype=torch.float32) for _ in range(3)]
        if form == "channel":
            chunks = min(-(-len(q) // CHUNK), max(1, CHANNEL_WAVE_NUMBERS // (q.shape[1] * q.shape[2] * v.shape[2])))
            held += [q.new_empty(chunks, q.shape[1], q.shape[2], v.shape[2]) for _ in range(2)]
        return held

    def _scratch(self, form, q, v, log_decay):
        if form == "fused" and log_decay is not None and log_decay.ndim == 2:
            return [log_decay.new_empty(*log_decay.shape, 2, dtype=torch.float32)]
        if form == "channel":
            return [torch.empty_like(q), torch.empty_like(q), q.new_empty(*q.shape[:2], CHANNEL_SCORES)]
        if form == "whole":
            return [torch.empty_like(v, dtype=_wide(v))]
        return []

    def _note(self, q, v, log_decay, beta, backward):
        form, name = self._form(log_decay, beta)
        self.outline.record(Call("linear", name, backward, q.shape[1], q.shape[1], q.shape[2], v.shape[2]))
        return form

    def _form(self, log_decay, beta):
        """Which code runs, and the family by its arithmetic."""
        decay = {None: "none", 1: "fixed", 2: "scalar", 3: "channel"}[getattr(log_decay, "ndim", None)]
        name = {"none": "delta", "scalar": "gated_delta"}.get(decay, "kda") if beta is not None else decay
        if not self.causal:
            return "whole", "whole"
        if not self.outline.gpu or name == "kda":
            return "general" if decay == "channel" or beta is not None else "chunked", name
        return {"delta": "delta", "gated_delta": "delta", "channel": "channel"}.get(name, "fused"), name

    def _splits(self, q, v):
        programs = q.shape[1] * -(-v.shape[2] // COLUMNS)
        return max(self.outline.spans, min(len(q) // MIN_SPLIT, ROUNDS * PROCESSORS // programs))

    def _blocks(self, tokens):
        """States kept of every block of chunks but the first, which is what enters."""
        spans = self.outline.spans
        steps = -(-(-(-tokens // spans)) // CHUNK)
        per_block = max(1, ROWS // spans)
        return [spans] * (-(-steps // per_block) - 1)

    def _states(self, rows, q, v):
        return q.new_empty(rows, q.shape[1], q.shape[2], v.shape[2], dtype=accumulation_dtype(q.dtype))


@dataclass(frozen=True)
class _Sparse:
    """Taken as if all keys and means of other ranks were asked for: they come once and stay for the backward pass."""

    outline: Outline
    selection: Any
    causal: bool
    branch: "_Branch | None" = None

    def travels(self, q, k, v, *own):
        self._note(q, k, backward=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_wide(q))
        others = self.outline.num_tokens - self.outline.num_tokens_local
        arrived = [x.new_empty(others, *x.shape[1:]) for x in (k, v)] if others else []
        rows = self._coarse_rows()
        if rows and others:  # sums of the smallest blocks that are on every rank, gathered
            arrived.append(k.new_empty(rows[min(1, len(rows) - 1)], 2 * k.shape[1], k.shape[2], dtype=_wide(k)))
        entry = self.branch.entry(*own, k, v) if self.branch else None
        return out, lse, k.new_empty(k.shape[1], self._listed(), dtype=torch.int32), arrived, entry

    def output(self, kept, q, k, v, *own):
        out, lse, lists, arrived, _ = kept
        rows = self._coarse_rows()
        coarse = [x.new_empty(sum(rows), *x.shape[1:]) for x in (k, v)] if rows else []
        sums = [] if self.outline.gpu or self.outline.world_size == 1 else self._segment_sums(rows, k, v)
        states = self.branch.states(*own, q, k, v) if self.branch else ()
        return torch.empty_like(out) if self.branch else out, (*coarse, *sums, *states, out, lse, *arrived[:2])

    def _segment_sums(self, rows, k, v):
        """What torch.segment_reduce keeps: its input in fp32, its result and the lengths of blocks, level by level."""
        saved, wide = [x if x.dtype == _wide(x) else x.to(_wide(x)) for x in (k, v)] if rows else [], _wide(k)
        for level, count in enumerate(rows):
            if level < 2:  # sums of what is here, before ranks show one another theirs
                count = -(-count // self.outline.world_size)
            parts = 1 if level else 2  # of keys and values one after the other, then of both at once
            saved += [k.new_empty(count, 2 * k.shape[1] // parts, k.shape[2], dtype=wide) for _ in range(parts)]
            saved += [k.new_empty(count, dtype=torch.int64) for _ in range(parts)]
            if level + 1 < len(rows) and not level:
                saved.append(k.new_empty(count, 2 * k.shape[1], k.shape[2], dtype=wide))
        return saved

    def hold(self, d_out, q, k, v, *own):
        self._note(q, k, backward=True)
        # dq is made in fp32; when it is done come the states from which the branch's dk and dv follow.
        numbers = max(q.numel(), self.branch.late(own[3], k, v) if self.branch else 0)
        held = [q.new_empty(numbers, dtype=_wide(q)), k.new_empty(k.shape[1], self._listed(), dtype=torch.int32)]
        if self.outline.world_size > 1:
            held += [x.new_empty(self.outline.num_tokens, *x.shape[1:], dtype=_wide(x)) for x in (k, v)]
        return held + (self.branch.hold(*own, q, k, v) if self.branch else [])

    def _note(self, q, k, backward):
        self.outline.record(Call("sparse", self.selection, backward, q.shape[1], k.shape[1], q.shape[2], k.shape[2]))

    def _coarse_rows(self):
        """Rows of every level of means."""
        if not isinstance(self.selection, Hierarchical):
            return []
        block, levels = self.selection.block, range(1, self.selection.levels + 1)
        return [sum(-(-length // block**level) for length in self.outline.lengths) for level in levels]

    def _listed(self):
        """Blocks listed for the queries of this rank, on average over their places."""
        tokens, selection = self.outline.num_tokens_local, self.selection
        if isinstance(selection, Hierarchical):
            listed = selection.keep + self.causal  # under a mask what is around the queries as well
            tiles = -(-tokens // tile_rows(selection.block))
            return listed * (-(-tokens // selection.block) + tiles * (selection.levels - 1))
        longest = max(self.outline.lengths)
        blocks = -(-longest // selection.key_block)
        kept = int(kept_of(np.array(blocks), selection.keep))
        seen = kept // 2 + 1 if self.causal else kept
        return -(-tokens // selection.query_block) * (seen + -(-selection.query_block // selection.key_block))


@dataclass(frozen=True)
class _Branch:
    """The linear branch beside chosen blocks (attention.linear_branch): a state for every block of queries that reads
    one of its own, or for every span, with the normalizers of what was summed before chosen blocks were taken out."""

    outline: Outline
    selection: Any
    causal: bool
    rest: bool

    def entry(self, weight, bias, own_q, own_k, k, v):
        return self._states(self.outline.linked, own_k, k, v, _wide(k))

    def states(self, weight, bias, own_q, own_k, q, k, v):
        """(states, normalizers), saved; sums of blocks exist meanwhile."""
        self._note(own_k, q, k, v, backward=False)
        _sums = self._sums(own_k, k, v, forward=True)
        folded = self._states(self._folded(), own_k, k, v, _wide(k))
        states = folded
        if self.rest:
            states = self._states(self._blocks(self.selection.query_block), own_k, k, v, state_dtype(k.dtype))
        size = (k if own_k is None else own_k).shape[2]
        return states, k.new_empty(len(states), k.shape[1], size, dtype=_wide(k))

    def hold(self, weight, bias, own_q, own_k, q, k, v):
        """Gradients of numerators, denominators (where not all queries of a document read the same) and, to be added,
        of queries; their sums of blocks."""
        self._note(own_k, q, k, v, backward=True)
        d_q = [] if own_q is not None else [torch.empty_like(q)]
        if self.causal or self.rest:
            d_q += [q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=_wide(q))]
        return [self._sums(own_k, k, v, forward=False), *d_q]

    def late(self, own_k, k, v):
        """Numbers of states of gradients, in fp32; those that chosen blocks are taken out of are half as wide."""
        rows = self._folded() + (self._blocks(self.selection.key_block) // 2 if self.rest else 0)
        return rows * k.shape[1] * (k if own_k is None else own_k).shape[2] * (v.shape[2] + 1)

    def _note(self, own_k, q, k, v, backward):
        """Its work is taken as that of linear attention without decay."""
        size = (k if own_k is None else own_k).shape[2]
        self.outline.record(Call("linear", "none", backward, q.shape[1], k.shape[1], size, v.shape[2]))

    def _sums(self, own_k, k, v, forward):
        if self.rest:
            rows = self._blocks(self.selection.key_block if forward else self.selection.query_block)
        else:
            rows = self._blocks(self.selection.query_block if self.causal else WHOLE_BLOCK)
        return self._states(rows, own_k, k, v, state_dtype(k.dtype))

    def _folded(self):
        return self._blocks(self.selection.query_block) if self.causal else self.outline.spans

    def _blocks(self, size):
        """Blocks of so many tokens that this rank's spans are cut into."""
        outline = self.outline
        if outline.world_size == 1:
            return sum(-(-length // size) for length in outline.lengths)
        return outline.spans * -(-outline.num_tokens_local // (outline.spans * size))

    def _states(self, rows, own_k, k, v, dtype):
        """[rows, Hkv, 1, K V + K]: state_dtype for sums and what chosen blocks are taken out of, else at least fp32."""
        size = (k if own_k is None else own_k).shape[2]
        return k.new_empty(rows, k.shape[1], 1, size * (v.shape[2] + 1), dtype=dtype)


@dataclass(frozen=True)
class _Convolution:
    outline: Outline

    def travels(self, x, weight, bias):
        rows = self.outline.linked * 2 * (weight.shape[1] - 1)  # of a strip: what comes before a span, and its start
        return x.new_empty(rows, x.shape[1])

    def output(self, kept, x, weight, bias):
        self._note(x, weight, backward=False)
        return torch.empty_like(x), (kept,)

    def hold(self, d_out, x, weight, bias):
        self._note(x, weight, backward=True)
        return []

    def _note(self, x, weight, backward):
        self.outline.record(Call("convolution", weight.shape[1], backward, 1, 1, x.shape[1], x.shape[1]))


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)
