"""Triton, with a ptxas that compiles the kernels right. Kernels import `triton` and `tl` from here.

ptxas 12.8, which Triton 3.6 and 3.7 use for Hopper, miscompiles some of them: gradients were wrong by 0.02 to 1e3, and
memory was read that is not there. 12.9 does not, nor 12.8 where it does not optimise. Both releases also carry a newer
ptxas for Blackwell, which compiles for Ampere and Hopper as well: 12.9 (Triton 3.6) or 13.1 (3.7).
"""

import ctypes
import os

import torch
import triton
import triton.language as tl  # noqa: TID251
from triton import knobs
from triton.backends.nvidia import compiler as backend

__all__ = ["cdiv", "knobs", "next_power_of_2", "tl", "triton"]

OLDEST_PTXAS = (12, 9)


# Triton's own, made for kernels as well, take the host 2 microseconds.
def cdiv(number: int, size: int) -> int:
    """number / size, rounded up."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def require_ptxas() -> None:
    """Makes this process, and those it starts, compile with OLDEST_PTXAS or newer: sets TRITON_PTXAS_PATH where what
    Triton takes by itself is older. Raises RuntimeError if that variable names none that is new enough, or if Triton
    brings none that the GPU's driver can run code of."""
    if knobs.runtime.interpret or torch.version.hip or _version("ptxas") >= OLDEST_PTXAS:
        return
    wanted, given = ".".join(map(str, OLDEST_PTXAS)), os.environ.get("TRITON_PTXAS_PATH")
    if given is not None:
        raise RuntimeError(f"TRITON_PTXAS_PATH={given} is no ptxas {wanted} or newer; unset it")
    newer, driver = _version("ptxas_blackwell"), _driver_version()
    if newer < OLDEST_PTXAS or (driver and newer[0] > driver[0]):
        brings = f"Triton {triton.__version__} brings ptxas {'.'.join(map(str, newer)) or 'in no other version'}"
        drives = f", the driver runs code of CUDA {'.'.join(map(str, driver))}" if driver else ""
        raise RuntimeError(f"{brings}{drives}; name a ptxas {wanted} in TRITON_PTXAS_PATH, see docs/installation.md")
    os.environ["TRITON_PTXAS_PATH"] = knobs.nvidia.ptxas_blackwell.path
    # Part of the key under which compiled kernels are found again, and remembered from before.
    backend.get_ptxas_version.cache_clear()


def _version(tool: str) -> tuple[int, ...]:
    """() where there is none that runs."""
    try:
        return tuple(int(part) for part in getattr(knobs.nvidia, tool).version.split("."))
    except (RuntimeError, OSError):
        return ()


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None without a driver. Asks the driver itself, and starts nothing."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


require_ptxas()
