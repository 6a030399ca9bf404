"""Rows of all ranks on every rank; gradients of the copies are summed in rank order, as of any route."""

from dataclasses import replace

import torch

from longspan.attention.block_parts import Request, pieces_of, rows_of
from longspan.attention.recompute import keep, recall
from longspan.parallel.exchange import all_to_all_rows, group_rank, group_size, start_all_gather
from longspan.parallel.routes import Route


def gather_rows(x: torch.Tensor, group) -> torch.Tensor:
    """[n, ...] with n >= 1 and equal on all ranks -> [world_size * n, ...], differentiable. A collective call, also
    backward: x must be part of the graph on all ranks or on none. Recomputation takes what was gathered before."""
    return _GatherRows.apply(x, group)


class Ranks:
    """What a selection gets from other ranks, without gradients: ranks(x), the rows of all from mine (as many on each);
    ranks.move(table, x), those that a RouteTable brings; ranks.rows, coarse rows by request. Collective calls.

    coarse: this rank's coarse keys and values. arrived: (part, keys, values) of what `rows` brought to attend to."""

    def __init__(self, group=None, coarse=(None, None)):
        self.group, self.coarse, self.arrived = group, coarse, []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return start_all_gather(x, self.group).wait().flatten(0, 1)

    def move(self, table, x: torch.Tensor) -> torch.Tensor:
        return Route(table, self.group).move(x)

    def rows(self, blocks, own, tables) -> tuple[torch.Tensor, torch.Tensor]:
        """blocks: int32 [Hkv, local tiles, n], blocks of tables.means.keys (attention.hierarchy_tables), -1 for
        none; own: [this rank's rows, Hkv, D]. Gives (those that are here, by their number among this rank's pieces;
        keys [all rows, Hkv, D], set for the rows in blocks that are listed for a head)."""
        means, causal = tables.means, tables.diagonal.shape[1] > 0
        wanted, rank = pieces_of(blocks, means.keys), group_rank(self.group)
        keys = own.new_empty(len(tables.keys.length), *own.shape[1:])
        keys[means.rows] = own
        if group_size(self.group) > 1:
            asked = Request(wanted, means.keys, tables.tiles, causal, self.group, weights=means.weight)
            (part,), pending, *tensors = asked.parts(*self.coarse)
            pending.wait()
            self.arrived.append((replace(part, coarse=True), *tensors))
            pieces, heads = asked.brought
            keys[rows_of(means.first[pieces], part.plan.keys.length, heads, part.num_rows)] = tensors[0][:, 0]
        first = rank * means.keys.width
        return torch.where(wanted // means.keys.width == rank, wanted - first, -1), keys


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
