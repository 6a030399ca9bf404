"""Megatron's batches as sequence contexts.

Megatron lays tokens out as [s, b, ...]; with context parallelism every rank has two chunks of each sequence, one from
its head and the mirrored one from its tail, which is longspan's zig-zag layout. Packed batches ("thd") have one row of
documents laid end to end, each of them cut that way.
"""

import torch

from longspan.kernels.peer import peer_kernels
from longspan.kernels.wide import wide_dtype
from longspan.models.rope import Rotary, rotary_angles
from longspan.parallel import SequenceContext, SequenceParallel, zigzag
from longspan.parallel.exchange import agree
from longspan.parallel.peer_memory import open_peer_memory

OPTIONS = ("linear", "softmax", "sparse", "backend", "topology", "costs", "token_cap", "head_groups", "peer_memory")


class Contexts:
    """What all layers of a model share: one sequence-parallel group, and the latest batch's context and angles.

    options: those of SequenceParallel that are named in OPTIONS, and peer_memory, by which states travel: auto, on or
    off, the default (parallel.peer_memory). The group is Megatron's context-parallel one, known when the first batch
    comes. ValueError for another option.
    """

    def __init__(self, options):
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"parallel has {name!r}, which is none of {', '.join(OPTIONS)}; leave it out")
        self._options, self._parallel = dict(options), {}
        self._packed = self._latest = self._turned = (None, None)

    def of(self, x: torch.Tensor, packed_seq_params, group) -> SequenceContext:
        """The context of the batch that x [s, b, ...] or, packed, [t, ...] is of. group: Megatron's context-parallel
        group. Raises ValueError for lengths that Megatron would not cut evenly."""
        parallel = self._parallel.get(group) or self._join(group, x.device)
        if is_packed(packed_seq_params):
            lengths = self._documents(packed_seq_params)
        else:
            lengths = (x.shape[0] * parallel.world_size,) * x.shape[1]
        key = group, lengths
        if self._latest[0] != key:
            _check(lengths, parallel.world_size)
            self._latest = key, parallel.context(zigzag(lengths, parallel.world_size))
        return self._latest[1]

    def angles(self, seq: SequenceContext, model, dtype: torch.dtype) -> Rotary:
        """Rotary angles of the tokens of seq; see models.rope."""
        key = seq, model.head_size, model.rope, wide_dtype(dtype)
        if self._turned[0] != key:
            _, size, rope, wide = key
            self._turned = key, rotary_angles(seq.positions, size, **rope, dtype=wide)
        return self._turned[1]

    def _join(self, group, device):
        options = dict(self._options)
        wanted = options.pop("peer_memory", "off")
        parallel = SequenceParallel(group, device=device, **options)
        # Also sets the communicator up with all its ranks: later a point-to-point call may involve only some of them.
        agree(None, repr(self._options), group)
        parallel.peers = open_peer_memory(group, parallel.topology, device, peer_kernels, wanted)
        self._parallel[group] = parallel
        return parallel

    def _documents(self, packed) -> tuple[int, ...]:
        """The lengths of the documents of a packed batch, with their padding: it follows what a causal mask hides."""
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        if self._packed[0] is not bounds:  # the host waits for the GPU once per batch, not once per layer
            self._packed = bounds, tuple(length for length in bounds.diff().tolist() if length)
        return self._packed[1]


def is_packed(packed_seq_params) -> bool:
    return packed_seq_params is not None and packed_seq_params.qkv_format == "thd"


def pack(x: torch.Tensor) -> torch.Tensor:
    """[s, b, ...] as [b s, ...]: sequences end to end."""
    return x.transpose(0, 1).flatten(0, 1)


def unpack(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The way back from `pack`, contiguous."""
    return x.unflatten(0, (batch, -1)).transpose(0, 1).contiguous()


def _check(lengths, ranks):
    for length in lengths:
        if ranks > 1 and length % (2 * ranks):
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into 2 equal chunks for each of {ranks} context-parallel"
                f" ranks; pad it to {-(-length // (2 * ranks)) * 2 * ranks}"
            )
