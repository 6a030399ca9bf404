"""The same kernels over a plan for Hopper GPUs, in Gluon: blocks come by TMA while two warpgroups multiply."""

import importlib.util
from functools import cache

import torch

ROWS = 64  # of a warpgroup


def takes(q, plan, rows: int, scale: float) -> bool:
    """Whether what walks lists of query blocks takes a case that the others take: tiles of `rows` = 128 queries."""
    return (
        on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and rows == 2 * ROWS
        and plan.queries.size % ROWS == 0
        and (plan.keys.size % ROWS == 0 or q.shape[2] == 64)  # small blocks beside wide heads have not been measured
        and plan.rule is None
        and scale > 0
        and 0 < len(plan.queries) * plan.queries.size * q.shape[1] < 2**31
    )


def takes_keys(plan) -> bool:
    """Whether gradients of keys take a plan too."""
    return plan.keys.size % ROWS == 0


def on_hopper(x: torch.Tensor) -> bool:
    return x.is_cuda and _runs(x.device.index)


@cache
def _runs(device_index: int) -> bool:
    if torch.cuda.get_device_capability(device_index) != (9, 0):
        return False
    try:
        return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None
    except ModuleNotFoundError:  # Triton before 3.5
        return False


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(q, k, v, out, lse, plan, scale, tile, onto):
    """Writes out and lse, see kernels.sparse.fused.forward; tile: numbers of heads and lists that tensors have, and
    PACK, heads side by side in a tile of queries."""
    from longspan.kernels.sparse.hopper import run

    run.forward(q, k, v, out, lse, plan, scale, tile, onto)


def query_gradients(d_out, q, k, v, out, lse, makes_rows, log, delta, dq, plan, scale, pack, onto):
    """Writes dq, see kernels.sparse.fused.backward, and with makes_rows log and delta."""
    from longspan.kernels.sparse.hopper import run

    run.query_gradients(d_out, q, k, v, out, lse, makes_rows, log, delta, dq, plan, scale, pack, onto)


def key_gradients(d_out, q, k, v, of_rows, dk, dv, plan, scale, states=None):
    """Writes dk and dv. states: see kernels.sparse.fused.backward."""
    from longspan.kernels.sparse.hopper import run

    run.key_gradients(d_out, q, k, v, *of_rows, dk, dv, plan, scale, states)
