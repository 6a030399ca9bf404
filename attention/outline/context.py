"""What a model on tensors without data gets in the place of a SequenceContext."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from longspan.attention.outline.stand_in import Call
from longspan.parallel.context import SequenceParallel
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class Outline:
    """In the place of a SequenceContext: a rank's share of documents with these `lengths`, by what `parallel` says.

    gpu: whether kernels are those of GPUs, hopper: of Hopper GPUs. positions: int64 [num_tokens_local]. record: gets
    every Call, receive: bytes that come from ranks of this machine and of others, in one exchange; uncounted: a
    context in which nothing else is counted. derived: what `derive` answers, by function. peer_blocks: whether blocks
    of sparse layers go through memory that ranks share.
    """

    lengths: tuple[int, ...]
    num_tokens_local: int
    parallel: SequenceParallel
    gpu: bool
    hopper: bool
    positions: torch.Tensor
    record: Callable[[Call], None]
    receive: Callable[[float, float], None] = lambda near, far: None
    derived: dict = field(default_factory=dict)
    peer_blocks: bool = False
    uncounted: Callable[[], AbstractContextManager] = nullcontext

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def world_size(self) -> int:
        return self.parallel.world_size

    @cached_property
    def layout(self) -> Layout:
        return self.parallel.base_layout(self.lengths)

    @cached_property
    def spans(self) -> int:
        """Runs of tokens of one document on a rank, at most."""
        return max(map(len, self.layout.spans))

    @cached_property
    def linked(self) -> int:
        """Those that a state may enter."""
        return max(sum(span.start > 0 for span in spans) for spans in self.layout.spans)

    def blocks(self, size: int) -> int:
        """Blocks of so many tokens that this rank's spans are cut into."""
        if self.world_size == 1:
            return sum(-(-length // size) for length in self.lengths)
        return self.spans * -(-self.num_tokens_local // (self.spans * size))

    def derive(self, function, *_):
        return self.derived[function]
