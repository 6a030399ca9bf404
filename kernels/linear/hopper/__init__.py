"""Kernels of linear attention for Hopper GPUs, in Gluon: tiles come by TMA while warpgroups multiply."""

from longspan.kernels.sparse import hopper

# Which of them are used where they can be. SWEEPS: of no, fixed and scalar decay, "sum", "output", "dq" and "reverse"
# (dk and dv); off until they have run on a GPU. The delta rule: FORWARD, BACKWARD, modes of its sweeps; GRADIENTS,
# "sweep" (`reverse`: dS passes through the chunks in the kernel that makes the gradients), "chunks" (`gradients`: after
# it) or None.
SWEEPS = ()
FORWARD = ("sum", "states", "output")
BACKWARD = ("sum", "states")
GRADIENTS = "sweep"


def takes(call) -> bool:
    """Whether these kernels take a case: 16-bit numbers, heads of 128."""
    return hopper.on_hopper(call.q) and call.q.element_size() == 2 and call.k.shape[2] == call.v.shape[2] == 128
