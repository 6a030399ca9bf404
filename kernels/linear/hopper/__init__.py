"""Kernels of linear attention for Hopper GPUs, in Gluon: tiles come by TMA while warpgroups multiply."""

from longspan.kernels.sparse import hopper


def takes(call) -> bool:
    """Whether these kernels take a case."""
    return hopper.on_hopper(call.q) and takes_heads(call.k, call.v)


def takes_heads(k, v) -> bool:
    """On a Hopper GPU: 16-bit numbers, heads of 128."""
    return k.element_size() == 2 and k.shape[2] == v.shape[2] == 128
