"""What sparse_attention asks of a selection, its own ones and those of users."""

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Selection(Protocol):
    """Chooses key blocks for blocks of queries. It is hashable and picklable, and equal on all ranks.

    What it chooses for a token depends on its document alone, never on the layout, and under a causal mask on no later
    token. `pairs(length)`, the pairs of queries and keys in a document under a causal mask, is needed in models only.
    """

    def tables(self, seq, causal: bool):
        """What follows from the layout, by seq.derive; with `queries` and `keys`, attention.block_tables.Pieces."""

    def coarse(self, k, v, tables, gather):
        """Keys and values that stand for many, [rows, Hkv, D] each, with gradients; (None, None) for none. gather(x):
        the rows of all ranks."""

    def choose(self, q, k, coarse_k, tables, ranks) -> tuple[torch.Tensor, torch.Tensor | None, ...]:
        """(fine, coarse) or (fine, coarse, rule), without gradients. fine: int32 [Hkv or 1, local query pieces, n], key
        blocks by their number in the batch, ascending, none twice, -1 anywhere for nothing; coarse: the same of
        tables.coarse_blocks, or None; rule: what single queries see of them, Picks or Boxes of kernels.sparse, or None.
        ranks: attention.gather_rows.Ranks."""


def selects(x) -> bool:
    """Whether x is a Selection; isinstance of a protocol takes as long as a launch, at every call."""
    return not isinstance(x, type) and all(hasattr(x, name) for name in ("tables", "coarse", "choose"))


def require_whole(selection, **least) -> None:
    """ValueError where a field is no whole number of at least so much."""
    for name, bound in least.items():
        value = getattr(selection, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{type(selection).__name__}.{name}={value!r} must be a whole number of at least {bound}")
