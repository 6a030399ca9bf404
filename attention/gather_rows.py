"""Rows of all ranks on every rank; gradients of the copies are summed in rank order, as of any route."""

import torch

from longspan.attention.recompute import keep, recall
from longspan.parallel.exchange import all_to_all_rows, gather, group_size
from longspan.parallel.routes import Route


def gather_rows(x: torch.Tensor, group, peers=None) -> torch.Tensor:
    """[n, ...] with n >= 1 and equal on all ranks -> [world_size * n, ...], differentiable. A collective call, also
    backward: x must be part of the graph on all ranks or on none. Recomputation takes what was gathered before, where
    gradients are wanted. peers: as Ranks has it."""
    return _GatherRows.apply(x, group, peers) if torch.is_grad_enabled() else Ranks(group, peers)(x)


class Ranks:
    """What a selection gets from other ranks, without gradients: ranks(x), the rows of all from mine (as many on each);
    ranks.move(table, x), those that a RouteTable brings. Collective calls. peers: the group's PeerMemory, through which
    rows come where it takes them, or None."""

    def __init__(self, group=None, peers=None):
        self.group, self.peers = group, peers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return gather(x, self.group, self.peers).flatten(0, 1)

    def move(self, table, x: torch.Tensor) -> torch.Tensor:
        return Route(table, self.group).move(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, peers):
        ctx.group = group
        kept = recall()
        return (keep(gather(x, group, peers)) if kept is None else kept).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        ranks = group_size(ctx.group)
        counts = [grad.shape[0] // ranks] * ranks
        return all_to_all_rows(grad, counts, counts, ctx.group).unflatten(0, (ranks, -1)).sum(0), None, None
