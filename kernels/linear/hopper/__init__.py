"""Kernels of linear attention for Hopper GPUs, in Gluon: tiles come by TMA while warpgroups multiply."""

from longspan.kernels.sparse import hopper


def takes(call) -> bool:
    """Whether these kernels take a case: 16-bit numbers, heads of 128."""
    return hopper.on_hopper(call.q) and call.q.element_size() == 2 and call.k.shape[2] == call.v.shape[2] == 128
