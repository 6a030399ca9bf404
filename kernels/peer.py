"""Kernels of memory that GPUs share, imported where there is such memory: on CPUs there may be no Triton."""


def peer_kernels():
    """longspan.kernels.peer_triton."""
    from longspan.kernels import peer_triton

    return peer_triton
