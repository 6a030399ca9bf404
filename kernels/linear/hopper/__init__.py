"""Kernels of linear attention for Hopper GPUs, in Gluon: tiles come by TMA while warpgroups multiply."""

from longspan.kernels.sparse import hopper


def takes(call) -> bool:
    """Whether these kernels take a case."""
    return hopper.on_hopper(call.q) and takes_heads(call.k, call.v)


def takes_heads(k, v) -> bool:
    """On a Hopper GPU: 16-bit numbers, heads of 128."""
    return k.element_size() == 2 and k.shape[2] == v.shape[2] == 128


def takes_at_once(call, name: str) -> bool:
    """Whether one launch sums and sweeps in a direction of a `Fused`: with a scalar gate (of a fixed decay it takes 1.1
    times as long on H200), where some split is summed and nothing travels."""
    alone = not call.splits.linked and len(getattr(call.splits, name).splits) > 0
    return call.decay == "scalar" and alone and takes(call)
