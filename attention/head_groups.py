"""Softmax attention of some heads after the others: what travels and what is summed exists for those alone.

Heads know nothing of one another, so that nothing is computed or sent twice and every head gets the bits that it gets
among all others, where kernels add up in an order that does not go by the number of heads. Calls and messages are
smaller.
"""

from collections.abc import Iterable

import torch

from longspan.parallel.geometry import Mask

# Tokens of a rank times query heads of a group at least, and groups at least. Four groups of so many, and eight of half
# as many, take as long as all heads at once where queries see 128K keys (benchmarks/results/head_groups_2xH200.json); a
# call then has 31 tiles of 128 queries for each multiprocessor of an H200. Where they see few there is little to
# compute beside what is copied (8 to 15 % more with windows of 4K, so about 1 % at FAR): such layers are divided later,
# where they hold 10 GiB and more. Two groups hold more than one on a lone GPU, where results of all come on top.
GROUP, GROUP_OF_NEAR, FEWEST, FAR = 1 << 19, 1 << 20, 4, 1 << 16


def head_groups(wanted: int, tokens: int, heads: int, kv_heads: int, mask: Mask, lengths: Iterable[int]) -> int:
    """Groups of key heads, with their query heads, that attention works on one after the other.

    wanted: so many; 0: as many as leave each with GROUP, or GROUP_OF_NEAR where no query sees FAR keys, from FEWEST of
    these on. tokens: of a rank, on average, so that all ranks get the same; lengths: of documents. ValueError where key
    heads do not come out even.
    """
    even = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    if wanted and wanted not in even:
        allowed = ", ".join(map(str, even))
        raise ValueError(f"head_groups={wanted} does not divide the {kv_heads} key heads: use one of {allowed}, or 0")
    longest = max(lengths)
    seen = longest if mask.window is None else min(mask.window, longest)
    most = tokens * heads // (GROUP if seen >= FAR else GROUP_OF_NEAR)
    return wanted or max(n for n in even if n <= (most if most >= FEWEST else 1))


def by_groups(run, groups: int, tensors, *rest) -> tuple[torch.Tensor, ...]:
    """run(*tensors, *rest) of one group of heads after the other: tensors are [T, heads, ...], and so is what it
    returns."""
    if groups == 1:
        return run(*tensors, *rest)
    wholes = None
    for number in range(groups):
        wholes = _put(wholes, number, groups, run(*(group_of(number, groups, x) for x in tensors), *rest))
    return wholes


def _put(wholes, number, groups, parts):
    if wholes is None:
        wholes = tuple(x.new_empty(x.shape[0], groups * x.shape[1], *x.shape[2:]) for x in parts)
    for whole, part in zip(wholes, parts, strict=True):
        group_of(number, groups, whole).copy_(part)
    return wholes


def group_of(number, groups, x):
    """The heads of a group, in place."""
    heads = x.shape[1] // groups
    return x[:, number * heads : (number + 1) * heads]
