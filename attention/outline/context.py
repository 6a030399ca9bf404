"""What a model on tensors without data gets in the place of a SequenceContext."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from longspan.attention.outline.stand_in import Call
from longspan.parallel.topology import Topology


@dataclass(frozen=True)
class Outline:
    """In the place of a SequenceContext: this rank's share of documents with these `lengths`, over `world_size` ranks.

    gpu: whether kernels are those of GPUs, hopper: of Hopper GPUs. positions: int64 [num_tokens_local]. record: gets
    every Call; uncounted: a context in which nothing else is counted. derived: what `derive` answers, by function.
    softmax_strategy: by which keys travel, one of schedules.STRATEGIES or double_ring. sparse_strategy:
    parallel.sparse; topology: which ranks share a machine (default: all); peer_blocks: whether blocks of sparse layers
    go through memory that ranks share. head_groups: parallel.head_groups.
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
    uncounted: Callable[[], AbstractContextManager] = nullcontext

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
