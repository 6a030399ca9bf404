"""The same kernels over a plan for Hopper GPUs, in Gluon: blocks come by TMA while two warpgroups multiply."""

import importlib.util
from functools import cache

import torch

CHUNK_ROWS = 64  # rows of a warpgroup


@cache
def _runs(device_index: int) -> bool:
    if torch.cuda.get_device_capability(device_index) != (9, 0):
        return False
    return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None


def takes(q, plan, rows: int, scale: float) -> bool:
    """Whether these kernels take a case that the others take: tiles of 128 queries, whole blocks, one Hopper GPU."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and rows == 2 * CHUNK_ROWS
        and plan.queries.size % CHUNK_ROWS == 0
        and plan.keys.size % CHUNK_ROWS == 0
        and plan.rule is None
        and scale > 0
        and 0 < q.shape[0] * q.shape[1] < 2**31
        and _runs(q.device.index)
    )


def forward(q, k, v, plan, scale, pack):
    """As kernels.sparse.fused.forward; pack: heads side by side in a tile of queries."""
    from longspan.kernels.sparse.hopper import run

    return run.forward(q, k, v, plan, scale, pack)


def backward(d_out, d_lse, q, k, v, out, lse, plan, scale, pack):
    """As kernels.sparse.fused.backward."""
    from longspan.kernels.sparse.hopper import run

    return run.backward(d_out, d_lse, q, k, v, out, lse, plan, scale, pack)
