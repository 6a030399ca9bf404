"""The parts of block-sparse attention over ranks: this rank's keys, coarse ones, and those that come from others.

By request (attention.requests) each rank asks the owners for the blocks its queries chose; in a ring, all keys of one
rank after the other arrive.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from longspan.attention.block_tables import Pieces
from longspan.kernels.sparse import BlockPlan, add_shares
from longspan.kernels.wide import wide_dtype
from longspan.parallel.exchange import Pending, group_rank, group_size, start_exchange

STRATEGIES = ("fetch", "ring")


class Way(Protocol):
    """How keys of other ranks come here and their gradients go back; this rank's own go to others and come back.
    turns: transfers, one of each of as many groups of lists."""

    turns: int

    def start(self, k, v, group) -> Pending:
        """k, v: [T, Hkv, D], this rank's; of keys and values [rows, Hkv or 1, D] that arrive."""

    def start_return(self, gradients, dtype, group) -> Pending:
        """gradients: those of what arrived; of what `add_returned` takes."""

    def add_returned(self, arrived, totals, blocks, shares) -> list[torch.Tensor]:
        """totals: this rank's gradients [T, Hkv, D]; gives them with what other ranks returned and, unless None,
        Shares of `blocks`, this rank's blocks of keys."""


@dataclass(frozen=True)
class Part:
    """Keys, and what to attend to among them. coarse: whether they are the coarse keys; way: of those that come from
    other ranks. Without either this rank's tokens."""

    plan: BlockPlan
    coarse: bool = False
    way: Way | None = None

    @property
    def remote(self) -> bool:
        return self.way is not None


def pieces_of(blocks, keys: Pieces) -> torch.Tensor:
    """int32 [..., n] block numbers -> int32 [..., m] numbers of their pieces, -1 for none."""
    found = keys.of_block.int()[blocks.clamp(min=0)]
    return found.masked_fill_((blocks < 0)[..., None], -1).flatten(-2)


def ring(plans, keys: Pieces, reach, group) -> list[Part]:
    """All keys of one rank after the other. plans: of the keys of every rank; reach: [who, whom], on the host, where
    keys have to go."""
    rank, world_size, parts = group_rank(group), group_size(group), []
    for step in range(1, world_size):
        source, target = (rank - step) % world_size, (rank + step) % world_size
        num_rows, plan = keys.tokens[source] if reach[rank][source] else 0, plans[source]
        if not num_rows:  # lists may name blocks of a rank of which the mask hides everything
            plan = replace(plan, keys=plan.keys.map(lambda x: x[:0]))
        way = _Step(source, num_rows, target, keys.tokens[rank] if reach[target][rank] else 0)
        parts.append(Part(plan, way=way))
    return parts


@dataclass(frozen=True)
class _Step:
    """A step of a ring: num_rows rows of `source` arrive, `num_sent` of this rank's, all or none, go to `target`."""

    source: int
    num_rows: int
    target: int
    num_sent: int
    turns = 1

    def start(self, k, v, group):
        given = [x.contiguous() for x in (k, v)] if self.num_sent else ()
        buffers = [x.new_empty(self.num_rows, *x.shape[1:]) for x in (k, v)]
        return _start((self.target, given), (self.source, buffers), group)

    def start_return(self, gradients, dtype, group):
        given = [x.to(dtype) for x in gradients] if self.num_rows else ()
        buffers = [x.new_empty(self.num_sent, *x.shape[1:], dtype=dtype) for x in gradients]
        return _start((self.source, given), (self.target, buffers), group)

    def add_returned(self, arrived, totals, blocks, shares):
        totals = [x.to(wide_dtype(x.dtype)).contiguous() for x in totals]
        if self.num_sent:
            totals = [total.add_(x) for total, x in zip(totals, arrived)]
        if shares is not None:
            add_shares(totals, blocks, shares)
        return totals


def _start(sends, receives, group):
    """Of the buffers of `receives`, also where nothing arrives."""
    (target, given), (source, buffers) = sends, receives
    receives = [(source, x) for x in buffers if x.shape[0]]
    pending = start_exchange([(target, x) for x in given], receives, group)
    return Pending((pending,), buffers)
