"""Triton, with a ptxas that compiles the kernels right. Kernels import `triton` and `tl` from here.

ptxas 12.8, which Triton 3.6 and 3.7 use for Hopper, miscompiles some of them: gradients were wrong by 0.02 to 1e3, and
memory was read that is not there. 12.9 does not, nor 12.8 where it does not optimise. Both releases also carry a newer
ptxas, for Blackwell; it compiles for older GPUs as well.
"""

import os

import triton
import triton.language as tl  # noqa: TID251
from triton import knobs

__all__ = ["tl", "triton"]

OLDEST_PTXAS = (12, 9)


def require_ptxas() -> None:
    """Makes this process, and those it starts, compile with OLDEST_PTXAS or newer: sets TRITON_PTXAS_PATH where what
    Triton takes by itself is older. Raises RuntimeError if that variable does not name one that is new enough, or if
    Triton brings none."""
    if knobs.runtime.interpret or _version(knobs.nvidia.ptxas) >= OLDEST_PTXAS:
        return
    wanted = ".".join(map(str, OLDEST_PTXAS))
    given, newer = os.environ.get("TRITON_PTXAS_PATH"), knobs.nvidia.ptxas_blackwell
    if given:
        raise RuntimeError(f"TRITON_PTXAS_PATH={given} is no ptxas {wanted} or newer; unset it")
    if _version(newer) < OLDEST_PTXAS:
        raise RuntimeError(f"Triton {triton.__version__} brings no ptxas {wanted}; name one in TRITON_PTXAS_PATH")
    os.environ["TRITON_PTXAS_PATH"] = newer.path


def _version(tool) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))


require_ptxas()
