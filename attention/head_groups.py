"""Softmax attention of some heads after the others: what travels and what is summed exists for those alone.

Heads know nothing of one another, so that nothing is computed or sent twice and every head gets the bits that it gets
among all others, where kernels add up in an order that does not go by the number of heads. Calls and messages are
smaller.
"""

import torch

# Tokens of a rank times query heads: of a group at least, and of all heads before they are divided. A call for a group
# then has 8,192 tiles of 128 queries, 62 for each multiprocessor of an H200, some of which are idle during the last. In
# bf16 with heads of 128, queries of all heads are 1 GiB from where on heads are divided, and of a group 256 MiB.
GROUP, ALL = 1 << 20, 1 << 22


def head_groups(wanted: int, tokens: int, heads: int, kv_heads: int) -> int:
    """Groups of key heads, with their query heads, that attention works on one after the other.

    wanted: so many; 0: as many as leave each with GROUP. tokens: of a rank, on average, so that all ranks get the same.
    ValueError where key heads do not come out even.
    """
    even = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    if wanted and wanted not in even:
        allowed = ", ".join(map(str, even))
        raise ValueError(f"head_groups={wanted} does not divide the {kv_heads} key heads: use one of {allowed}, or 0")
    if wanted or tokens * heads < ALL:
        return wanted or 1
    return max(n for n in even if tokens * heads >= n * GROUP)


def by_groups(run, groups: int, tensors, *rest) -> tuple[torch.Tensor, ...]:
    """run(*tensors, *rest) of one group of heads after the other: tensors are [T, heads, ...], and so is what it
    returns."""
    if groups == 1:
        return run(*tensors, *rest)
    wholes = None
    for number in range(groups):
        wholes = _put(wholes, number, groups, run(*(_of(number, groups, x) for x in tensors), *rest))
    return wholes


def _put(wholes, number, groups, parts):
    if wholes is None:
        wholes = tuple(x.new_empty(x.shape[0], groups * x.shape[1], *x.shape[2:]) for x in parts)
    for whole, part in zip(wholes, parts, strict=True):
        _of(number, groups, whole).copy_(part)
    return wholes


def _of(number, groups, x):
    """The heads of a group, in place."""
    heads = x.shape[1] // groups
    return x[:, number * heads : (number + 1) * heads]
