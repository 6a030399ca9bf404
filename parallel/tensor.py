"""Tensor parallelism: ranks that hold parts of the same layers and work on the same tokens.

Between layers every rank holds its share of the rows, consecutive and equal but for padding at the end (arXiv
2205.05198). A layer gathers rows, computes with its part of the weights, and scatters sums of all parts, so that
everything outside of layers is computed once. Weights are torch's DTensors, which sharding and checkpoints understand;
layers read the local part.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from longspan.parallel.exchange import reduce_scatter, start_all_gather


class TensorParallel:
    """The ranks of a 1-D `mesh`. What moves rows is differentiable, for losses of which each rank's backward adds a
    part: the gradient of gathered rows is summed over ranks, that of scattered sums is gathered."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.group = mesh, mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def share(self, size: int) -> tuple[int, int]:
        """First and last + 1 of what this rank has of `size` things; the last ranks have fewer where it is uneven."""
        most = -(-size // self.size)
        return min(self.rank * most, size), min((self.rank + 1) * most, size)

    def split(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        """The parameter with this rank's share of dimension `dim` (None: whole on every rank), known as one tensor."""
        placement = Replicate() if dim is None else Shard(dim)
        return nn.Parameter(distribute_tensor(parameter.detach(), self.mesh, [placement], src_data_rank=None))

    def readable(self, parameter: nn.Parameter) -> bool:
        """Whether it is not sharded over other ranks at the moment."""
        return parameter.device_mesh == self.mesh

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this rank holds of it. Gradients of what every rank holds are parts that are yet to be summed."""
        held = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
        return parameter.to_local(grad_placements=held)

    @torch.compiler.disable
    def gather(self, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """The first `rows` (None: all, padding included) of all ranks' rows, on every rank."""
        rows = len(x) * self.size if rows is None else rows
        missing = -(-rows // self.size) - len(x)
        return _Gather.apply(_more_rows(x, missing), self, rows)

    @torch.compiler.disable
    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's share of the rows of the sum of all ranks' x, padded with zeros to equal shares."""
        return _Scatter.apply(x, self)

    @torch.compiler.disable
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x."""
        return _Sum.apply(x, self)

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]: all ranks' x, without a gradient."""
        return self.all_gather(x).unflatten(0, (self.size, -1))

    # What follows has no rows only where no rank has any.

    def all_gather(self, x):
        return start_all_gather(x, self.group).wait().flatten(0, 1) if x.numel() else x

    def reduce_scatter(self, x):
        return reduce_scatter(x, self.group) if x.numel() else x

    def all_reduce(self, x):
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x


class OutlinedRanks(TensorParallel):
    """The first of `size` ranks that are not there, for models on torch's meta device. record: gets the bytes that each
    exchange brings to a rank."""

    def __init__(self, size: int, record: Callable[[float], None]):
        self.size, self.rank, self.record = size, 0, record

    def split(self, parameter, dim):
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] = -(-shape[dim] // self.size)
        return nn.Parameter(parameter.new_empty(shape))

    def readable(self, parameter):
        return True

    def local(self, parameter):
        return parameter

    def all_gather(self, x):
        return self._received(x.new_empty(self.size * len(x), *x.shape[1:]), 1)

    def reduce_scatter(self, x):
        self._received(x, 1)
        return x.new_empty(len(x) // self.size, *x.shape[1:])

    def all_reduce(self, x):
        return self._received(torch.empty_like(x), 2)

    def _received(self, x, times):
        self.record(times * x.numel() * x.element_size() * (1 - 1 / self.size))
        return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, rows):
        ctx.ranks = ranks
        return ranks.all_gather(x)[:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return ctx.ranks.reduce_scatter(_padded(d_out, ctx.ranks.size)), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks, ctx.rows = ranks, len(x)
        return ranks.reduce_scatter(_padded(x, ranks.size))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return ctx.ranks.all_gather(d_out)[: ctx.rows], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return ctx.ranks.all_reduce(d_out), None


def _padded(x, size):
    """With rows of zeros up to a multiple of `size`."""
    return _more_rows(x, -len(x) % size)


def _more_rows(x, rows):
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows)) if rows else x
