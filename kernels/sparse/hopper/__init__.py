"""The same kernels over a plan for Hopper GPUs, in Gluon: blocks come by TMA while two warpgroups multiply."""

import importlib
import importlib.util
from functools import cache

import torch

ROWS = 64  # of a warpgroup


def takes(q, plan, rows: int, scale: float) -> bool:
    """Whether what walks lists of query blocks takes a case that the others take: tiles of `rows` = 128 queries."""
    return (
        rows == 2 * ROWS
        and on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and plan.queries.size % ROWS == 0
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


def kernels():
    """The module that launches them, loaded where it is first needed: Gluon is not everywhere."""
    return globals().get("run") or importlib.import_module(f"{__name__}.run")
