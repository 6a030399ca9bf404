"""Programmatic dependent launch (CUDA C++ programming guide): on Hopper GPUs the programs of a kernel are set up while
those of the kernel before it in the stream end. Each first waits until that kernel is done and lets the next be set up;
so every kernel launched with `options` is done after all that came before it."""

from longspan.kernels.sparse import hopper

ENABLED = False


def options(x) -> dict:
    """Launch options of a kernel that waits as above, on the device of x."""
    return {"launch_pdl": True} if ENABLED and hopper.on_hopper(x) else {}
