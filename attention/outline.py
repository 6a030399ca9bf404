"""Attention on tensors without data: what each kind keeps for the backward pass and holds meanwhile, and no arithmetic.

A model that gets an `Outline` as its `seq` runs every line of its own on tensors of torch's meta device, while
attention allocates what its kernels would and notes the call. So memory and work of a model are counted on the model
itself, for lengths and GPUs that are not there. Recomputation is that of longspan.attention.recompute: what a layer
keeps for it is kept here as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from longspan.attention.expected_requests import expected_requests
from longspan.attention.head_groups import head_groups
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.hierarchy_tables import tile_rows
from longspan.attention.linear_branch import WHOLE_BLOCK
from longspan.attention.offload import Offload
from longspan.attention.recompute import keep, recall
from longspan.attention.schedules import ranks_at_once
from longspan.attention.selections import TopBlocks
from longspan.attention.shared_requests import is_cut, room_for, window_sizes
from longspan.attention.sparse_estimate import Estimate
from longspan.kernels.block_states import state_dtype
from longspan.kernels.linear import hopper
from longspan.kernels.linear.groups import CHUNK, ROWS
from longspan.kernels.sparse import kept_of
from longspan.kernels.wide import wide_dtype
from longspan.parallel.balanced import balanced
from longspan.parallel.geometry import Mask
from longspan.parallel.topology import Topology

# Of the fused kernels of linear attention (kernels.linear): multiprocessors that splits are made for, programs per one,
# columns of a program, fewest tokens of a split; numbers per token and head that the delta rule keeps of chunks;
# bytes of the states of chunks in one wave of decay per channel; columns of scores kept there.
PROCESSORS, ROUNDS, COLUMNS, MIN_SPLIT = 132, 2, 64, 512
DELTA_CHUNK_NUMBERS, CHANNEL_WAVE_NUMBERS, CHANNEL_SCORES = 144, 1 << 27, 64


@dataclass(frozen=True)
class Call:
    """One call of an attention kernel: kind is softmax, linear, sparse or convolution; detail says which (a Mask, a
    form of linear attention, a selection, a width). asked: of sparse layers whose keys come by request, for which the
    host waits, the tokens of others whose keys this rank gets, None for others and in a ring. window: of those that
    come through memory that ranks share, bytes of this rank's window, which all layers use."""

    kind: str
    detail: Any
    backward: bool
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    asked: int | None = None
    window: int = 0


@dataclass(frozen=True)
class Outline:
    """In the place of a SequenceContext: this rank's share of documents with these `lengths`, over `world_size` ranks.

    gpu: whether kernels are those of GPUs, hopper: of Hopper GPUs. positions: int64 [num_tokens_local]. record: gets
    every Call. derived: what `derive` answers, by function. softmax_strategy: by which keys travel, one of
    schedules.STRATEGIES. sparse_strategy: parallel.sparse; topology: which ranks share a machine (default: all);
    peer_blocks: whether blocks of sparse layers go through memory that ranks share. head_groups: parallel.head_groups.
    """

    lengths: tuple[int, ...]
    num_tokens_local: int
    world_size: int
    gpu: bool
    hopper: bool
    positions: torch.Tensor
    record: Callable[[Call], None]
    derived: dict = field(default_factory=dict)
    softmax_strategy: str = "ring"
    sparse_strategy: str = "auto"
    topology: Topology | None = None
    peer_blocks: bool = False
    head_groups: int = 0

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

    def blocks(self, size: int) -> int:
        """Blocks of so many tokens that this rank's spans are cut into."""
        if self.world_size == 1:
            return sum(-(-length // size) for length in self.lengths)
        return self.spans * -(-self.num_tokens_local // (self.spans * size))

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
        self.put_away = put_away

    def host_like(self, tensor):
        return self.put_away(tensor), None

    def give_back(self, buffers):
        pass

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
    """Keys travel step by step; results of steps, and gradients, are added in fp32: of one group of heads after the
    other, whose results are copied to where those of all are."""

    outline: Outline
    mask: Mask

    def travels(self, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        (q, k, v), groups = self._group(q, k, v)
        self._note(q, k, groups, backward=False)
        if self.outline.world_size > 1:
            _held = self._arriving(q, k, v, groups), torch.empty_like(q, dtype=wide_dtype(q.dtype))
        elif groups > 1:
            _held = torch.empty_like(q)
        return out, lse

    def output(self, kept, q, k, v):
        return kept[0], kept

    def hold(self, d_out, q, k, v):
        (q, k, v), groups = self._group(q, k, v)
        self._note(q, k, groups, backward=True)
        held = [torch.empty_like(q, dtype=wide_dtype(q.dtype))] if self.outline.gpu else []  # kernels add up dq in fp32
        if groups > 1:
            held += [torch.empty_like(x) for x in (q, k, v)]
        if self.outline.world_size > 1:
            held += self._arriving(q, k, v, groups)
            held += [torch.empty_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v, k, v)]
            held += [
                torch.empty_like(q),
                *(torch.empty_like(x) for x in (k, v) for _ in range(max(self._at_once(q, k)))),
            ]
        return held

    def _at_once(self, q, k):
        """Of how many ranks a step brings keys, for every step."""
        return ranks_at_once(self.outline.softmax_strategy, self.outline.world_size, q.shape[1] // k.shape[1])

    def _group(self, q, k, v):
        """(q, k, v of a group of heads, in place; groups)."""
        outline = self.outline
        tokens = outline.num_tokens // outline.world_size
        groups = head_groups(outline.head_groups, tokens, q.shape[1], k.shape[1])
        return [x[:, : x.shape[1] // groups] for x in (q, k, v)], groups

    def _arriving(self, q, k, v, groups):
        """Keys and values of the step under way and of the next. A rank that sees all of the others gets as many from
        each as it has. Of a group they are copied to be sent."""
        counts = self._at_once(q, k)
        most = max(map(sum, zip(counts, (*counts[1:], 0)))) + (groups > 1)
        return [torch.empty_like(x) for x in (k, v) for _ in range(most)]

    def _note(self, q, k, groups, backward):
        for _ in range(groups):
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
        scratch = self._scratch(form, q, v, log_decay)
        if form in ("whole", "chunked"):
            return out, (kept,)
        if form == "general":
            return out, (kept, *(self._states(rows, q, v) for rows in self._blocks(len(q))))
        splits = self._splits(form, q, v)
        saved = [self._states(splits, q, v)]
        if form in ("delta", "kda"):
            saved += [self._states(splits, q, q), q.new_empty(len(q), q.shape[1], DELTA_CHUNK_NUMBERS)]
        if form in ("fused", "kda"):
            saved += scratch
        return out, tuple(saved)

    def hold(self, d_out, q, k, v, log_decay, beta):
        form = self._note(q, v, log_decay, beta, backward=True)
        held = [self._states(self._splits(form, q, v), q, v)]
        if form not in ("fused", "kda"):  # they save it
            held += self._scratch(form, q, v, log_decay)
        if form == "fused" and log_decay is not None and log_decay.requires_grad:
            columns = -(-q.shape[2] // COLUMNS)  # sums of rows, of the reading and of the writing side
            held += [q.new_empty(columns, q.shape[1], len(q), dtype=torch.float32) for _ in range(2)]
        if form == "channel":
            held += [q.new_empty(self._wave(q, v), q.shape[1], q.shape[2], v.shape[2]) for _ in range(2)]
        return held

    def _scratch(self, form, q, v, log_decay):
        if form == "fused" and log_decay is not None and log_decay.ndim == 2:
            if self.outline.hopper and hopper.takes_heads(q, v):  # its kernels form decays where they use them
                return []
            dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
            return [log_decay.new_empty(*log_decay.shape, 2, dtype=dtype)]
        if form == "channel":
            return [torch.empty_like(q), torch.empty_like(q), q.new_empty(*q.shape[:2], CHANNEL_SCORES)]
        if form == "kda":  # q and k with their decays, and what decays in a chunk
            total = q.new_empty(-(-len(q) // CHUNK), *q.shape[1:], dtype=torch.float32)
            return [*(torch.empty_like(q) for _ in range(3)), total]
        if form == "whole":
            return [torch.empty_like(v, dtype=wide_dtype(v.dtype))]
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
        if not self.outline.gpu:
            return "general" if decay == "channel" or beta is not None else "chunked", name
        forms = {"delta": "delta", "gated_delta": "delta", "kda": "kda", "channel": "channel"}
        return forms.get(name, "fused"), name

    def _splits(self, form, q, v):
        programs = q.shape[1] * -(-v.shape[2] // COLUMNS)
        tokens = min(len(q), self._wave(q, v) * CHUNK) if form == "channel" else len(q)
        splits = max(1, min(tokens // MIN_SPLIT, ROUNDS * PROCESSORS // programs))
        return max(self.outline.spans, splits * -(-len(q) // max(1, tokens)))

    def _wave(self, q, v):
        """Chunks whose states exist at once, with a decay per channel."""
        most = max(1, CHANNEL_WAVE_NUMBERS // (q.shape[1] * q.shape[2] * v.shape[2]))
        return min(-(-len(q) // CHUNK), most)

    def _blocks(self, tokens):
        """States kept of every block of chunks but the first, which is what enters."""
        spans = self.outline.spans
        steps = -(-(-(-tokens // spans)) // CHUNK)
        per_block = max(1, ROWS // spans)
        return [spans] * (-(-steps // per_block) - 1)

    def _states(self, rows, q, v):
        return q.new_empty(rows, q.shape[1], q.shape[2], v.shape[2], dtype=wide_dtype(q.dtype))


@dataclass(frozen=True)
class _Sparse:
    """Keys of other ranks that are asked for, and all means, come once and stay for the backward pass; a recomputed
    layer lays this rank's that are chosen beside them once more."""

    outline: Outline
    selection: Any
    causal: bool
    branch: "_Branch | None" = None

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
        return sum(window_sizes(outline.sparse_strategy, *given) or ())

    def _room(self, q, k):
        """Rows of the buffer for all that lists could name of keys that come through shared memory, until it is known
        how many do; 0 without."""
        if not self._window(k):
            return 0
        size = self.selection.block if isinstance(self.selection, Hierarchical) else self.selection.key_block
        apart = self.branch is not None and self.branch.rest
        return room_for(self.outline.num_tokens - apart * self.outline.num_tokens_local, self._entries(), size)

    def _buffers(self, q, k):
        """Rows of what arrives, and of what others get. By request this rank's own that are chosen lie in
        front, about as many as of another rank."""
        asked, given, by_request = self._asked_and_given(q, k)
        return asked + by_request * -(-asked // max(1, self.outline.world_size - 1)), given

    def _asked_and_given(self, q, k):
        """Tokens whose keys this rank gets of others, and others of it, for every key head, of the rank that holds
        most, and whether by request. All of them in a ring, and of selections that are not known."""
        outline = self.outline
        if outline.world_size == 1:
            return 0, 0, False
        others, strategy = outline.num_tokens - outline.num_tokens_local, outline.sparse_strategy
        if strategy == "ring" or not isinstance(self.selection, (Hierarchical, TopBlocks)):
            return others, others, strategy != "ring"
        layout = _layout(outline.lengths, outline.world_size)
        tokens, listed = expected_requests(self.selection, layout, self.causal)
        if strategy == "auto" and not self._window(k):
            topology, lists = outline.topology or Topology(1, outline.world_size), k.shape[1]
            way = Estimate(q.shape[1], lists, k.shape[2], k.itemsize, topology)
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


@dataclass(frozen=True)
class _Branch:
    """The linear branch beside chosen blocks (attention.linear_branch): a state for every block of queries that reads
    one of its own, or for every span, with the normalizers of what was summed before chosen blocks were taken out."""

    outline: Outline
    selection: Any
    causal: bool
    rest: bool

    def entry(self, weight, bias, own_q, own_k, k, v):
        return self._states(self.outline.linked, own_k, k, v, wide_dtype(k.dtype))

    def states(self, weight, bias, own_q, own_k, q, k, v):
        """(states, normalizers), saved; where all queries of a document read the same, the states times weight in place
        of normalizers. Sums of blocks exist meanwhile."""
        self._note(own_k, q, k, v, backward=False)
        _sums = self._sums(own_k, k, v, forward=True)
        folded = self._states(self._folded(), own_k, k, v, wide_dtype(k.dtype))
        states = folded
        if self.rest:
            states = self._states(self.outline.blocks(self.selection.query_block), own_k, k, v, state_dtype(k.dtype))
        if not (self.causal or self.rest):
            return states, torch.empty_like(states)
        size = (k if own_k is None else own_k).shape[2]
        return states, k.new_empty(len(states), k.shape[1], size, dtype=wide_dtype(k.dtype))

    def hold(self, weight, bias, own_q, own_k, q, k, v):
        """Gradients of numerators, denominators (where not all queries of a document read the same) and, to be added,
        of queries; their sums of blocks."""
        self._note(own_k, q, k, v, backward=True)
        d_q = [] if own_q is not None else [torch.empty_like(q)]
        if self.causal or self.rest:
            d_q += [q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))]
        return [self._sums(own_k, k, v, forward=False), *d_q]

    def late(self, own_k, k, v):
        """Numbers of states of gradients, in fp32; those that chosen blocks are taken out of are half as wide."""
        rows = self._folded() + (self.outline.blocks(self.selection.key_block) // 2 if self.rest else 0)
        return rows * k.shape[1] * (k if own_k is None else own_k).shape[2] * (v.shape[2] + 1)

    def _note(self, own_k, q, k, v, backward):
        """Its work is taken as that of linear attention without decay."""
        size = (k if own_k is None else own_k).shape[2]
        self.outline.record(Call("linear", "none", backward, q.shape[1], k.shape[1], size, v.shape[2]))

    def _sums(self, own_k, k, v, forward):
        if self.rest:
            rows = self.outline.blocks(self.selection.key_block if forward else self.selection.query_block)
        else:
            rows = self.outline.blocks(self.selection.query_block if self.causal else WHOLE_BLOCK)
        return self._states(rows, own_k, k, v, state_dtype(k.dtype))

    def _folded(self):
        return self.outline.blocks(self.selection.query_block) if self.causal else self.outline.spans

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


@lru_cache(maxsize=4)
def _layout(lengths, world_size):
    return balanced(lengths, world_size)
