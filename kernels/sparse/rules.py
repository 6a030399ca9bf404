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
    def arguments(self) -> dict:
        """What the kernels take."""
        heads, choices = self.blocks.shape[1:]
        return _arguments(self.blocks, self.blocks, 0, PICKS, heads, choices)

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
    def arguments(self) -> dict:
        """What the kernels take."""
        return _arguments(self.bounds, self.coordinates, self.guard, BOXES, 1, 1)

    def seen(self, rows, positions, size):
        """bool [..., 1, rows, keys]: rows int64 [..., rows], positions [..., keys]."""
        at = self.coordinates[positions.clamp(max=len(self.coordinates) - 1).long()][..., None, None, :]
        low, high = self.bounds[rows][..., None, :, :].unbind(-1)
        inside = ((at | self.guard) - low[..., None]) & ((high | self.guard)[..., None] - at)
        return inside & self.guard == self.guard


def arguments(plan) -> dict:
    """What the kernels take for the rule of a plan."""
    start = plan.queries.start
    return _arguments(start, start, 0, NONE, 1, 1) if plan.rule is None else plan.rule.arguments


def _arguments(rows, keys, guard, rule, heads, choices):
    padded = 1 << (choices - 1).bit_length()
    return {
        "rule_rows": rows.contiguous(), "rule_keys": keys, "guard": guard,
        "RULE": rule, "RULE_HEADS": heads, "CHOICES": choices, "PADDED": padded,
    }  # fmt: skip
