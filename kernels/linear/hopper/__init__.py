"""Kernels of linear attention for Hopper GPUs, in Gluon: tiles come by TMA while warpgroups multiply."""

from longspan.kernels.sparse import hopper

# Decays of which one launch sums and sweeps, where it can. Of a fixed one it takes 1.1 times as long on an H200.
AT_ONCE = ("scalar",)


def takes(call) -> bool:
    """Whether these kernels take a case."""
    return hopper.on_hopper(call.q) and takes_heads(call.k, call.v)


def takes_heads(k, v) -> bool:
    """On a Hopper GPU: 16-bit numbers, heads of 128."""
    return k.element_size() == 2 and k.shape[2] == v.shape[2] == 128


def takes_at_once(call, name: str) -> bool:
    """Whether it takes a `Fused` in a direction: some split is summed, nothing travels, and all heads of a split, which
    sum for each other, are on the GPU at the same time."""
    alone = call.decay in AT_ONCE and not call.splits.linked and len(getattr(call.splits, name).splits) > 0
    return alone and takes(call) and call.heads <= hopper.processors(call.q.device)
