"""Which keys of a listed block a query sees, where that differs from query to query: a plan's optional rule."""

from dataclasses import dataclass

import torch

NONE, PICKS, BOXES = range(3)


@dataclass(frozen=True)
class Picks:
    """Every query has chosen its own blocks; a plan lists for a query block what any of its rows chose. blocks: int32
    [Tq, Hp, n], numbers of key blocks in the query's document (position // size), -1 for none; Hp divides the query
    heads."""

    blocks: torch.Tensor

    @property
    def recorded_as(self) -> tuple:
        return (self.blocks,)

    @property
    def arguments(self) -> tuple:
        """What the kernels take."""
        blocks = self.blocks.contiguous()
        return blocks, blocks, 0

    @property
    def constants(self) -> tuple:
        """What they are compiled for: the rule, heads, choices."""
        return PICKS, *self.blocks.shape[1:]

    def seen(self, rows, positions, size):
        """bool [..., Hp, rows, keys]: rows int64 [..., rows], positions [..., keys] of keys in blocks of `size`."""
        blocks = self.blocks[rows].movedim(-2, -3)  # [..., Hp, rows, n]
        names = (positions // size)[..., None, None, :]
        seen = torch.zeros(*blocks.shape[:-1], positions.shape[-1], dtype=torch.bool, device=rows.device)
        for turn in range(blocks.shape[-1]):
            seen |= blocks[..., turn, None] == names
        return seen


@dataclass(frozen=True)
class Boxes:
    """A query sees the keys in a box of coordinates. coordinates: int32 [positions], those of a position, each in a
    field of bits with a zero above it; bounds: int32 [Tq, 2], the lowest and highest that a query sees, in the same
    fields; guard: a one above every field. So one subtraction compares all coordinates: its ones stay where none is
    less."""

    coordinates: torch.Tensor
    bounds: torch.Tensor
    guard: int

    @property
    def arguments(self) -> tuple:
        """What the kernels take."""
        return self.bounds.contiguous(), self.coordinates, self.guard

    @property
    def constants(self) -> tuple:
        """What they are compiled for: the rule, heads, choices."""
        return BOXES, 1, 1

    def seen(self, rows, positions, size):
        """bool [..., 1, rows, keys]: rows int64 [..., rows], positions [..., keys]."""
        at = self.coordinates[positions.clamp(max=len(self.coordinates) - 1).long()][..., None, None, :]
        low, high = self.bounds[rows][..., None, :, :].unbind(-1)
        inside = ((at | self.guard) - low[..., None]) & ((high | self.guard)[..., None] - at)
        return inside & self.guard == self.guard


def arguments(plan) -> tuple:
    """What the kernels take for the rule of a plan: rule_rows, rule_keys, guard."""
    start = plan.queries.start
    return (start, start, 0) if plan.rule is None else plan.rule.arguments


def constants(plan) -> tuple:
    """What the kernels are compiled for by the rule of a plan: the rule, heads, choices."""
    return (NONE, 1, 1) if plan.rule is None else plan.rule.constants
