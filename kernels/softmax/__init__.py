"""Dense softmax attention of one rank: several libraries behind one interface.

Shapes are those of packed calls: T rows (sequences laid end to end), H heads, D head dim; Hq is a multiple of Hkv.
"""

from types import ModuleType
from typing import Protocol

import torch

from longspan.kernels.softmax import cpu, cudnn_ragged, fa4, math, torch_cudnn, torch_flash
from longspan.kernels.softmax.pack import Pack

__all__ = ["BACKENDS", "Backend", "Pack", "choose", "refusal"]


class Backend(Protocol):
    """What every module of this package that serves attention provides. Strided inputs are fine."""

    name: str
    device_types: tuple[str, ...]

    def limits(self, dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
        """Why a GPU of this compute capability, or a CPU, which has (0, 0), does not serve such inputs, or None."""

    def missing(self) -> str | None:
        """What else keeps this back end from serving here, or None: a package, or torch's switch for deterministic
        algorithms, as results of some differ from run to run."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D] in q's dtype, lse [Tq, Hq] in fp32 (fp64 for fp64)."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        pack: Pack,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The share of this call's keys in the gradients dq, dk, dv (q's dtype or wider).

        `out` [Tq, Hq, D] (q's dtype) and `lse` [Tq, Hq] are those of the whole attention, merged over all calls that
        the queries took part in: P = exp(scale * q k - lse), delta = rowsum(dout * out).
        """


# In order of preference.
BACKENDS: dict[str, ModuleType] = {
    backend.name: backend for backend in (fa4, cudnn_ragged, torch_cudnn, torch_flash, cpu, math)
}


def refusal(backend: Backend, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `backend` cannot serve such inputs here, or None."""
    if device_type not in backend.device_types:
        return f"runs on {' and '.join(backend.device_types)}, not on {device_type}"
    capability = torch.cuda.get_device_capability() if device_type == "cuda" else (0, 0)
    return backend.limits(dtype, head_dim, capability) or backend.missing()


def choose(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[Backend, tuple[str, ...]]:
    """The back end `name`, or for "auto" the first of BACKENDS that can serve; and why earlier ones could not.

    Raises ValueError for an unknown name and for a named back end that cannot serve.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use auto, {', '.join(BACKENDS)}")
    refusals = []
    candidates = [backend for backend in BACKENDS.values() if device_type in backend.device_types]
    for backend in candidates if name == "auto" else (BACKENDS[name],):
        reason = refusal(backend, device_type, dtype, head_dim)
        if reason is None:
            return backend, tuple(refusals)
        refusals.append(f"{backend.name}: {reason}")
    remedy = "" if name == "auto" else "; use backend=auto to take the fastest one that can"
    raise ValueError(f"backend={name} cannot serve softmax attention here ({'; '.join(refusals)}){remedy}")
