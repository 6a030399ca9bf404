"""The rows with the highest scores for each row of a level, among the children of rows chosen one level up."""

from dataclasses import dataclass, replace

import torch

from longspan.kernels.linear.splits import padded
from longspan.kernels.sparse import forms
from longspan.kernels.sparse.top import ascending

CANDIDATE_ELEMENTS = 1 << 24  # numbers of candidate keys that plain PyTorch gathers at once
TILE_ELEMENTS = 1 << 15  # numbers of candidate keys that a Triton program holds


@dataclass(frozen=True)
class Families:
    """Rows of a level and those above them; int32. parent: [rows], the row above each; start, length: [rows above], its
    children, start to start + length, at most `block`. router: [rows], the row whose mean chooses for each. chooses:
    [R], the rows that choose; groups: [G, block], places in `chooses` of rows under one parent, -1 for none, all R of
    them; group_parent: [G], that parent."""

    parent: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    router: torch.Tensor
    chooses: torch.Tensor
    groups: torch.Tensor
    group_parent: torch.Tensor
    block: int

    def map(self, move) -> "Families":
        """The same with every tensor passed through `move`."""
        return replace(self, **{name: move(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})


def blocks_below(found, rows, blocks, causal: bool, always=None) -> torch.Tensor:
    """int32 [H, len(rows), n]: what `blocks` [rows above + 1, w], int32, says of each in found [H, rows above, m] at
    `rows`, int64, one after the other; its last line of -1. causal: and of the row itself. always: int32
    [len(rows), a], listed last, or None."""
    if forms.takes(found):
        from longspan.kernels.sparse.descend_triton import blocks_below_triton

        return blocks_below_triton(found, rows, blocks, causal, always)
    heads, found = len(found), found[:, rows]
    if causal:
        found = torch.cat([found, rows[:, None].expand(heads, -1, 1)], 2)
    listed = blocks[found].flatten(2)
    return listed if always is None else torch.cat([listed, always.expand(heads, -1, -1)], 2)


def descend(means, keys, above, families: Families, keep: int, causal: bool, always=None) -> torch.Tensor:
    """int32 [H, R, keep + n]: of the children of above [H, rows above, m] (-1 for none) at a row's parent, those with
    the highest products with the row's mean, ascending, -1 after the last. causal: the row's siblings before it are
    candidates as well. always: int32 [R, n], listed last, or None. means: [rows, H, D] in at least fp32; keys: in any;
    products are as in `top`."""
    width = (above.shape[2] + causal) * families.block
    if forms.takes(means) and padded(width) * padded(means.shape[2]) <= TILE_ELEMENTS:
        from longspan.kernels.sparse.descend_triton import descend_triton

        return descend_triton(means, keys, above, families, keep, causal, always)
    (_, heads, dim), found, keys = keys.shape, [], keys.to(means.dtype)
    head = torch.arange(heads, device=keys.device)[:, None, None]
    place = torch.arange(families.block, dtype=torch.int32, device=keys.device)
    for rows in families.chooses.split(max(1, CANDIDATE_ELEMENTS // (heads * width * dim))):
        parents = families.parent[rows]
        chosen = above[:, parents]
        if causal:
            chosen = torch.cat([chosen, parents[:, None].expand(heads, -1, 1)], 2)
        inside = (chosen >= 0)[..., None] & (place < families.length[chosen.clamp(min=0)][..., None])
        candidates = torch.where(inside, families.start[chosen.clamp(min=0)][..., None] + place, -1).flatten(2)
        if causal:
            candidates = candidates.masked_fill(candidates >= rows[:, None], -1)
        query = means[families.router[rows]].transpose(0, 1)
        scores = (
            (keys[candidates.clamp(min=0), head] @ query[..., None]).squeeze(-1).masked_fill(candidates < 0, -torch.inf)
        )
        order = scores.sort(stable=True, dim=-1, descending=True).indices[..., :keep]
        best = ascending(candidates.gather(2, order), keys.shape[0])
        found.append(torch.nn.functional.pad(best, (0, keep - best.shape[2]), value=-1))
    found = torch.cat(found, 1)
    return found if always is None else torch.cat([found, always.expand(heads, -1, -1)], 2)
