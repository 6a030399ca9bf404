"""Gradients of means, passed on to the keys and values that they were made of."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tree:
    """Means of key blocks and means of those, level after level, in rows: row i is the mean of key block i while there
    are blocks. Int32 [rows], size: the tokens of each; up: the row that it is part of, -1 on the last of the `depth`
    levels, which every block reaches."""

    size: torch.Tensor
    up: torch.Tensor
    depth: int

    def map(self, move) -> "Tree":
        """The same with every tensor passed through `move`."""
        return Tree(move(self.size), move(self.up), self.depth)


@dataclass(frozen=True)
class Shares:
    """k, v: [rows, Hkv, D], gradients of the means of a tree; every row of a key block gets those of the means that it
    is part of, divided by their tokens."""

    tree: Tree
    k: torch.Tensor
    v: torch.Tensor

    @property
    def recorded_as(self) -> tuple:
        return self.tree, self.k, self.v

    def add(self, dk, dv, blocks) -> None:
        """Onto [T, Hkv, D] each. blocks: the key blocks, which hold all T rows in their order."""
        for total, grad in ((dk, self.k), (dv, self.v)):
            row, share = torch.arange(len(blocks), device=grad.device), 0
            for _ in range(self.tree.depth):
                share = share + grad[row].to(total.dtype) / self.tree.size[row, None, None]
                row = self.tree.up[row].long()
            total += share.repeat_interleave(blocks.length.long(), 0, output_size=len(total))


def arguments(shares, unused):
    """(arguments of kernels, levels of means); no level without shares."""
    if shares is None:
        return (unused,) * 4, 0
    return (shares.k, shares.v, shares.tree.size, shares.tree.up), shares.tree.depth
