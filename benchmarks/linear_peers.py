"""Linear attention of longspan and of other libraries behind one call: (Inputs) -> out [T, H, D], differentiable."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from longspan.attention import linear_attention
from longspan.benchmarks.linear_cases import FAMILIES, LAYERS, Inputs, Problem
from longspan.parallel import SequenceParallel


@dataclass(frozen=True)
class Implementation:
    """package: what must be importable. make(problem) gives the call. prepare: what it wants done to the inputs first,
    outside of what is timed."""

    families: tuple[str, ...]
    package: str
    distributions: tuple[str, ...]  # whose versions are recorded
    make: Callable[[Problem], Callable[[Inputs], torch.Tensor]]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs

    def missing(self) -> str | None:
        """Why it cannot be measured here, None if it can be tried."""
        found = importlib.util.find_spec(self.package)
        return None if found else f"the package {self.package} is not installed"


def _longspan(problem: Problem):
    seq = SequenceParallel(device=problem.device).context((problem.tokens,))
    return lambda x: linear_attention(x.q, x.k, x.v, log_decay=x.log_decay, beta=x.beta, seq=seq)


# Module of fla.ops, function, its other arguments.
_FLA = {
    "none": ("linear_attn", "chunk_linear_attn", {"normalize": False}),
    "fixed": ("lightning_attn", "chunk_lightning_attn", {"layer_idx": 0, "num_layers": LAYERS}),
    "scalar": ("simple_gla", "chunk_simple_gla", {}),
    "channel": ("gla", "chunk_gla", {}),
    "delta": ("delta_rule", "chunk_delta_rule", {}),
    "gated_delta": ("gated_delta_rule", "chunk_gated_delta_rule", {}),
    "kda": ("kda", "chunk_kda", {}),
}


def _batched(x: Inputs) -> dict[str, torch.Tensor]:
    """Arguments [1, T, H, ...] as fla and FlashQLA name them."""
    arguments = {"q": x.q[None], "k": x.k[None], "v": x.v[None]}
    if x.log_decay is not None and x.log_decay.ndim > 1:
        arguments["g"] = x.log_decay[None]
    if x.beta is not None:
        arguments["beta"] = x.beta[None]
    return arguments


def _fla(problem: Problem):
    os.environ["FLA_FLASH_QLA"] = "0"  # where FlashQLA is installed, fla would hand the gated delta rule to it
    module, name, options = _FLA[problem.family]
    operation = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    return lambda x: operation(**_batched(x), **options)[0][0]


def _flash_qla(problem: Problem):
    operation = importlib.import_module("flash_qla").chunk_gated_delta_rule
    return lambda x: operation(**_batched(x))[0][0]


def _cudnn_kda(problem: Problem):
    operation = importlib.import_module("cudnn.linear_attention.ops").kimi_delta_attention
    offsets = torch.tensor([0, problem.tokens], dtype=torch.int32, device=problem.device)
    engine = "kda_hopper_cuda"  # the engine for Hopper that has a backward
    return lambda x: operation(x.q, x.k, x.v, x.log_decay, x.beta, offsets, plan_name=engine)[0]


def _decay_per_channel(x: Inputs) -> Inputs:
    if x.log_decay.ndim == 3:
        return x
    return replace(x, log_decay=x.log_decay.detach()[..., None].expand(x.q.shape).contiguous())


IMPLEMENTATIONS = {
    "longspan": Implementation(tuple(FAMILIES), "longspan", (), _longspan),
    "fla": Implementation(tuple(_FLA), "fla", ("fla-core", "tilelang"), _fla),
    "flash_qla": Implementation(("gated_delta",), "flash_qla", ("flash-qla", "tilelang"), _flash_qla),
    "cudnn_kda": Implementation(
        ("gated_delta", "kda"), "cudnn", ("nvidia-cudnn-frontend",), _cudnn_kda, _decay_per_channel
    ),
}
