"""The cases of sparse attention: selections in small, their inputs, and what makes a host wait for its device."""

import zlib
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention import (
    Antidiagonal,
    BlockLists,
    CompressedTop,
    Hierarchical,
    Radial,
    TokenTop,
    TopBlocks,
    Window,
)

HEAD_SIZE = 8
SMALL = {"query_block": 16, "key_block": 8}
# name: (query heads, key heads, keyword arguments)
VARIANTS = {
    "causal": (2, 2, {"selection": TopBlocks(2, **SMALL)}),
    "causal_gqa": (4, 2, {"selection": TopBlocks(0.3, **SMALL)}),
    "causal_forced": (2, 1, {"selection": TopBlocks(4, **SMALL, first=1, recent=1)}),
    "causal_odd": (2, 2, {"selection": TopBlocks(3, query_block=12, key_block=7)}),
    "full": (2, 2, {"selection": TopBlocks(3, **SMALL), "causal": False}),
    "full_gqa": (4, 2, {"selection": TopBlocks(0.2, **SMALL), "causal": False}),
    "levels1": (2, 2, {"selection": Hierarchical(8, 2, 1)}),
    "levels2": (4, 2, {"selection": Hierarchical(4, 2, 2)}),
    "levels3": (2, 2, {"selection": Hierarchical(3, 2, 3)}),
    "levels1_full": (2, 2, {"selection": Hierarchical(8, 2, 1), "causal": False}),
    "levels2_full": (2, 1, {"selection": Hierarchical(4, 3, 2), "causal": False}),
    "levels3_full": (4, 2, {"selection": Hierarchical(3, 2, 3), "causal": False}),
}


def every_second(length):
    """Key blocks 0, 2, 4, ... of the first half of those there are, for every block of queries."""
    blocks = torch.arange(0, -(-length // 8) // 2 + 1, 2)
    return blocks.expand(-(-length // 16), -1)


def random_lists(lengths, heads=2):
    """Up to three key blocks a list, later ones and none among them."""
    generator, lists = torch.Generator().manual_seed(0), []
    for length in lengths:
        columns, rows = -(-length // 8), -(-length // 16)
        chosen = torch.rand(heads, rows, columns, generator=generator).argsort(-1)[..., :3]
        lists.append(chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, -1))
    return BlockLists(tuple(lists), **SMALL)


# The same for selections with lists from lengths, of different lengths, and token by token. A selection that is a
# function is one of lengths.
MORE_VARIANTS = {
    "window": (4, 2, {"selection": Window(37, **SMALL)}),
    "window2": (2, 1, {"selection": Window((3, 5), (0, 7), query_block=12, key_block=7)}),
    "window3": (2, 2, {"selection": Window((2, 3, 3), (0, 3, 5), causal_axes=(True, False, True), **SMALL)}),
    "window_morton": (2, 2, {"selection": Window((4, 7), (19, 16), "morton", **SMALL)}),
    "window_full": (2, 2, {"selection": Window(8, **SMALL), "causal": False}),
    "window2_full": (4, 2, {"selection": Window((4, 3), (20, 15), **SMALL), "causal": False}),
    "window3_morton_full": (2, 1, {"selection": Window((3, 3, 2), (0, 4, 6), "morton", **SMALL), "causal": False}),
    "radial": (2, 2, {"selection": Radial(21, query_block=8, key_block=4)}),
    "radial_full": (4, 2, {"selection": Radial(20, query_block=8, key_block=4), "causal": False}),
    "radial_far_full": (2, 2, {"selection": Radial(3, query_block=2, key_block=3), "causal": False}),
    "antidiagonal": (4, 2, {"selection": Antidiagonal(0.4, 4, **SMALL)}),
    "antidiagonal_full": (2, 2, {"selection": Antidiagonal(0.3, 8, **SMALL, first=0), "causal": False}),
    "tokens": (4, 2, {"selection": TokenTop(3, **SMALL)}),
    "tokens_own": (2, 2, {"selection": TokenTop(1, query_block=12, key_block=7)}),
    "tokens_full": (2, 1, {"selection": TokenTop(2, **SMALL), "causal": False}),
    "compressed": (4, 2, {"selection": CompressedTop(4, 8, 8, 4, 2)}),
    "compressed_odd": (4, 1, {"selection": CompressedTop(3, 4, 6, 6, 3, first=0, recent=1)}),
    "compressed_full": (2, 2, {"selection": CompressedTop(3, 4, 8, 4, 2, recent=1), "causal": False}),
    "lists": (4, 2, {"selection": BlockLists(every_second, **SMALL)}),
    "lists_of_heads": (4, 2, {"selection": random_lists}),
    "lists_full": (2, 2, {"selection": random_lists, "causal": False}),
}
VARIANTS |= MORE_VARIANTS
CAUSAL = [name for name in VARIANTS if "full" not in name]


def make_inputs(variant, lengths, dtype=torch.float64):
    heads, key_heads, kwargs = VARIANTS[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(heads):
        return torch.randn(sum(lengths), heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)

    if callable(kwargs["selection"]):
        kwargs = kwargs | {"selection": kwargs["selection"](lengths)}
    return {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}, normal(heads), kwargs


def small_variant(variant):
    """Inputs of a variant in fp32 with blocks that the Triton kernels take."""
    inputs, grad_out, kwargs = make_inputs(variant, (100,), torch.float32)
    blocks = {"block": 16} if "levels" in variant else {"query_block": 32, "key_block": 16}
    return inputs, grad_out, kwargs | {"selection": replace(kwargs["selection"], **blocks)}


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, and results whose shape depends on values."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in self.names, f"{func} waits for the device"
        if func._opname == "index":
            assert all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in args[1]), "mask as an index"
        if func._opname == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "repeat_interleave without output_size"
        return func(*args, **(kwargs or {}))
