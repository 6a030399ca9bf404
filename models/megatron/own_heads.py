"""Tensor parallelism of a mixer: a rank has the mixer of its own heads, with their part of the whole one's weights.

Its input is the same on all ranks and its output is a sum over them, so what it is made of need not know.
"""

from dataclasses import replace

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import nn

from longspan.models.config import LINEAR_KINDS
from longspan.models.layers import init_weights
from longspan.models.mixers import build_mixer
from longspan.models.tensor_parallel import split_dim, streams

SHARED = ("o_norm.weight", "decay.in_proj.weight", "linear_weight", "linear_bias")  # by the heads of all ranks
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")  # of softmax and sparse mixers


class Whole(nn.Module):
    """All heads of a mixer, initialised; `projections` are left out where Megatron has its own."""

    def __init__(self, model, layer: int, kind: str, projections: bool):
        super().__init__()
        self.mixer = _build(model, layer, kind, projections)
        init_weights(self, model)


def own_mixer(model, layer: int, kind: str, group, *, projections: bool, device, dtype) -> nn.Module:
    """The mixer of a layer with the heads of this rank of a tensor-parallel group.

    It starts as a part of the mixer with all heads, drawn from torch's default generator, which must be in the same
    state on all ranks of the group: initial weights do not depend on their number. Parameters carry Megatron's
    attributes; gradients of those that all heads share are summed over the group. ValueError where heads do not divide.
    """
    rank, ranks = group.rank(), group.size()
    check_heads(model, kind, ranks)
    with torch.device(device):
        whole = Whole(model, layer, kind, projections).mixer
    if ranks == 1:
        return whole.to(dtype)
    with torch.device("meta"):
        local = _build(_with_heads_of_one(model, ranks), layer, kind, projections)
    state = {name: own_part(name, x, rank, ranks, streams(whole)) for name, x in whole.state_dict().items()}
    local.load_state_dict(state, assign=True)
    if kind in LINEAR_KINDS and model.family(kind).decay == "fixed":
        local.decay = _OwnRates(whole.decay, rank * local.num_heads, local.num_heads)
    local.to(dtype)
    for name, parameter in local.named_parameters():
        dim = own_dim(name)
        if dim is None:
            parameter.register_hook(lambda grad: reduce_from_tensor_model_parallel_region(grad.clone(), group))
        else:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return local


def own_dim(name: str) -> int | None:
    """The dimension of a mixer's parameter in which ranks have parts; None where all have the whole. What is no
    projection has heads first."""
    return None if name in SHARED else split_dim(name.rpartition(".")[0]) or 0


def own_part(name: str, whole: torch.Tensor, rank: int, ranks: int, streams) -> torch.Tensor:
    """A rank's part of a mixer's parameter. streams: as models.tensor_parallel has them."""
    dim = own_dim(name)
    if dim is None:
        return whole.clone()
    pieces = whole.split(streams) if name.startswith("conv.") else (whole,)
    return torch.cat([piece.chunk(ranks, dim)[rank] for piece in pieces], dim)


def check_heads(model, kind: str, ranks: int) -> None:
    if ranks > 1 and kind == "linear:mamba2":
        raise ValueError(
            f"linear:mamba2 layers have one key and query for all heads and cannot be shared by {ranks} tensor-parallel"
            " ranks; use another family, such as linear:gated_delta, or tensor_model_parallel_size=1"
        )
    heads = {"num_attention_heads": model.num_heads}
    if kind in LINEAR_KINDS:
        heads = {"linear_num_heads": model.linear_heads}
    elif kind == "sla":  # its feature map may have weights for every head of keys
        heads["num_query_groups"] = model.kv_heads
    for name, count in heads.items():
        if count % ranks:
            raise ValueError(f"{name}={count} of {kind} layers cannot be shared by {ranks} tensor-parallel ranks")


def _with_heads_of_one(model, ranks: int):
    return replace(
        model,
        head_dim=model.head_size,
        num_heads=model.num_heads // ranks,
        num_kv_heads=max(1, model.kv_heads // ranks),
        linear_num_heads=model.linear_heads // ranks,
    )


def _build(model, layer, kind, projections):
    mixer = build_mixer(model, layer, kind)
    for name in () if projections else PROJECTIONS:
        delattr(mixer, name)
    return mixer


class _OwnRates(nn.Module):
    """The part of fixed decay rates that is of a rank's heads: rates depend on the number of all heads."""

    def __init__(self, decay: nn.Module, first: int, count: int):
        super().__init__()
        self.decay, self.heads = decay, slice(first, first + count)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.decay(x_TD)[self.heads]
