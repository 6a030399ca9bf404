"""Rows of all ranks on every rank; gradients of the copies are summed in rank order, as of any route."""

import torch

from longspan.attention.recompute import keep, recall
from longspan.parallel.exchange import all_to_all_rows, group_size, start_all_gather
from longspan.parallel.routes import Route


def gather_rows(x: torch.Tensor, group) -> torch.Tensor:
    """[n, ...] with n >= 1 and equal on all ranks -> [world_size * n, ...], differentiable. A collective call, also
    backward: x must be part of the graph on all ranks or on none. Recomputation takes what was gathered before, where
    gradients are wanted."""
    return _GatherRows.apply(x, group) if torch.is_grad_enabled() else Ranks(group)(x)


class Ranks:
    """What a selection gets from other ranks, without gradients: ranks(x), the rows of all from mine (as many on each);
    ranks.move(table, x), those that a RouteTable brings. Collective calls."""

    def __init__(self, group=None):
        self.group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return start_all_gather(x, self.group).wait().flatten(0, 1)

    def move(self, table, x: torch.Tensor) -> torch.Tensor:
        return Route(table, self.group).move(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        kept = recall()
        return (keep(start_all_gather(x, group).wait()) if kept is None else kept).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        ranks = group_size(ctx.group)
        counts = [grad.shape[0] // ranks] * ranks
        return all_to_all_rows(grad, counts, counts, ctx.group).unflatten(0, (ranks, -1)).sum(0), None
