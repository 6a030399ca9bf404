"""Sparse attention of other libraries as attend(q, k, v) -> out, [B, H, N, D], differentiable.

They are measured where they can be imported: NVIDIA's block-sparse kernels (nvidia-cudnn-frontend 1.32), SLA by its
authors (github.com/thu-ml/SLA) and LLSA by its own (github.com/SingleZombie/LLSA, under a non-commercial licence).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longspan.attention import Hierarchical


@dataclass(frozen=True)
class Problem:
    """What a peer is asked to repeat. lists: integers [B, H, query blocks, kept], the key blocks chosen in each
    document, ascending; weight, bias: of the linear branch, or None."""

    selection: object
    lists: Callable[[], torch.Tensor]
    scale: float
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """package: what must be importable. make(problem) gives the call. same: it attends to what longspan attends to, so
    that outputs can be compared. given_lists: its kernels alone, as against longspan's alone."""

    package: str
    distribution: str
    make: Callable[[Problem], Callable]
    same: bool = True
    given_lists: bool = False

    def missing(self) -> str | None:
        """Why it cannot be measured here, None if it can be tried."""
        found = importlib.util.find_spec(self.package)
        return None if found else f"the package {self.package} is not installed ({self.distribution})"


def peers_of(selection, linear: bool) -> tuple[str, ...]:
    """The names in PEERS that have a counterpart of a selection, with or without a linear branch."""
    if isinstance(selection, Hierarchical):
        return ("official_llsa",)
    if linear:
        return ("official_sla",)
    return ("nvidia_bsa",) if selection.query_block == selection.key_block else ()


def _nvidia_bsa(problem: Problem):
    """Kernels alone, lists given."""
    from cudnn.block_sparse_attention import block_sparse_attention_backward, block_sparse_attention_forward

    lists = problem.lists().int().contiguous()
    options = {"sparse_block_size": problem.selection.key_block, "softmax_scale": problem.scale}

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = tuple(block_sparse_attention_forward(q, k, v, lists, **options).values())[:2]
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, d_out):
            found = block_sparse_attention_backward(d_out, *ctx.saved_tensors, lists, **options)
            return tuple(found.values())[:3]

    return Attention.apply


def _official_sla(problem: Problem):
    from sparse_linear_attention import SparseLinearAttention

    blocks = {"BLKQ": problem.selection.query_block, "BLKK": problem.selection.key_block}
    module = SparseLinearAttention(problem.weight.shape[0], problem.selection.keep, "softmax", **blocks)
    module.to(problem.weight.device)
    with torch.no_grad():
        module.proj_l.weight.copy_(problem.weight)
        module.proj_l.bias.copy_(problem.bias)
    return module


def _official_llsa(problem: Problem):
    """Of more than two levels its two, the most that are published."""
    from llsa.kernel.torch_op import flash_sparse_attention_res_1, flash_sparse_attention_res_2

    selection = problem.selection
    if selection.levels == 1:
        return lambda q, k, v: flash_sparse_attention_res_1.llsa_l1(q, k, v, selection.keep, selection.block)
    keep = selection.keep, selection.keep
    return lambda q, k, v: flash_sparse_attention_res_2.llsa_l2(q, k, v, *keep, selection.block)


PEERS = {
    "nvidia_bsa": Peer("cudnn", "nvidia-cudnn-frontend", _nvidia_bsa, given_lists=True),
    "official_sla": Peer("sparse_linear_attention", "github.com/thu-ml/SLA", _official_sla),
    # Its entry weights means of the two levels the other way round: as fast, but another result.
    "official_llsa": Peer("llsa", "github.com/SingleZombie/LLSA", _official_llsa, same=False),
}
