"""Splits a decoder over tensor-parallel ranks from outside: each gets its share of the heads of every mixer, of the
channels of every MLP and of the vocabulary. No layer knows of it.

Projections out of the residual stream are split by rows of their weights, projections into it by columns (Megatron-LM,
arXiv 1909.08053). All other weights are whole on every rank and read in part where they belong to heads. Around mixers
and MLPs `ranks` (parallel.tensor.TensorParallel) gathers tokens and scatters sums, so that between them, in norms and
the residual stream, a rank has 1 / ranks of the tokens; gradients of what it reads are its part of a sum over ranks.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from longspan.kernels.loss import chunked_cross_entropy
from longspan.kernels.wide import wide_dtype
from longspan.models.decay import ChannelDecay, FixedDecay, Gate
from longspan.models.feature_maps import Hedgehog
from longspan.models.layers import RMSNorm
from longspan.models.mixers import LinearMixer, Mamba2Mixer

BY_ROWS = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "gate_proj", "up_proj", "embedding", "head")
BY_COLUMNS = ("o_proj", "down_proj")


def split_model(model: nn.Module, ranks) -> None:
    """Splits `model`, a Decoder whose parameters are whole and the same on all ranks, in place. ValueError where its
    config does not allow it."""
    model.config.validate_split(ranks.size)
    parts = {}
    for block in model.blocks:
        parts |= _parts_of_heads(block.mixer, ranks)
        block.mixer.register_forward_pre_hook(partial(_gather_tokens, ranks))
        block.mlp.register_forward_pre_hook(partial(_gather_all, ranks))
        for module in (block.mixer, block.mlp):
            module.register_forward_hook(partial(_scatter, ranks))
    for path, module in model.named_modules():
        _place(module, ranks, split_dim(path), parts.get(module, {}))
    model.embedding.forward = partial(_embed, model.embedding, ranks)
    model.cross_entropy = partial(_cross_entropy, ranks, model.config.vocab_size)
    model.logits = partial(_logits, model, ranks)


def split_dim(path: str) -> int | None:
    """The dimension in which ranks share the weight of the module with this path; None where it is no projection."""
    name = path.rpartition(".")[2]
    return 0 if name in BY_ROWS else 1 if name in BY_COLUMNS else None


def streams(mixer: nn.Module) -> list[int]:
    """Channels of queries, keys and values of all heads, which a mixer's convolution has end to end; none without."""
    if not isinstance(mixer, LinearMixer) or mixer.conv is None:
        return []
    return [project.out_features for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]


def _parts_of_heads(mixer: nn.Module, ranks) -> dict[nn.Module, dict[str, Sequence[tuple[int, int]]]]:
    """Tells what counts heads how many there are here; of modules with whole parameters, the rows that they read."""
    parts = {}
    for module in mixer.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, Gate) or (isinstance(module, Hedgehog) and len(module.weight) > 1):  # 1: for all heads
            parts[module] = {name: [ranks.share(len(parameter))] for name, parameter in own.items()}
        if isinstance(module, ChannelDecay):  # from few dimensions, too few to be shared by many ranks
            parts[module.out_proj] = {"weight": [ranks.share(module.out_proj.out_features)]}
        if isinstance(module, FixedDecay):
            module.register_forward_hook(partial(_own, ranks.share(module.num_heads)))
        elif hasattr(module, "num_heads"):
            module.num_heads //= ranks.size
    if channels := streams(mixer):
        parts[mixer.conv] = dict.fromkeys(("weight", "bias"), _shares(ranks, channels))
    if isinstance(mixer, Mamba2Mixer):
        parts |= _parts_of_mamba2(mixer, ranks)
    return parts


def _parts_of_mamba2(mixer: Mamba2Mixer, ranks):
    """Of z, x and dt a share, B and C whole. The norm is over all heads."""
    width, *shared = mixer.parts
    z, _, heads = mixer.widths
    parts = {mixer: {"D": [ranks.share(heads)]}}
    streams = [*_shares(ranks, [width]), (width, width + sum(shared))]
    if mixer.conv is not None:
        parts[mixer.conv] = dict.fromkeys(("weight", "bias"), streams)
    streams = [(z + first, z + last) for first, last in streams]
    first, last = ranks.share(heads)
    behind = z + width + sum(shared)
    parts[mixer.in_proj] = {"weight": [ranks.share(z), *streams, (behind + first, behind + last)]}
    mixer.parts = [width // ranks.size, *shared]
    mixer.widths = [z // ranks.size, sum(mixer.parts), heads // ranks.size]
    parts[mixer.o_norm] = {"weight": [ranks.share(width)]}
    mixer.o_norm.forward = partial(_norm_over_ranks, mixer.o_norm, ranks, width)
    return parts


def _shares(ranks, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Of rows that consist of parts of these sizes, this rank's share of each part."""
    found, start = [], 0
    for size in sizes:
        first, last = ranks.share(size)
        found.append((start + first, start + last))
        start += size
    return found


def _place(module: nn.Module, ranks, dim: int | None, parts: dict[str, Sequence[tuple[int, int]]]) -> None:
    """Splits the module's own parameters along `dim`, or keeps them whole and lets the module read `parts` of rows."""
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        setattr(module, name, ranks.split(parameter, dim))
    if own:
        rows = tuple((name, tuple(parts.get(name, ()))) for name in own)
        module.__class__ = _reading(type(module), ranks, rows)


@cache
def _reading(kind: type, ranks, parts: tuple) -> type:
    """`kind` whose parameters are read as what this rank has of them; one class for modules that are alike, so that the
    compiler takes them as one."""
    return type(kind.__name__, (kind,), {name: property(partial(_read, name, ranks, rows)) for name, rows in parts})


def _read(name, ranks, rows, module):
    parameter = module._parameters[name]
    if not ranks.readable(parameter):
        return parameter
    held = ranks.local(parameter)
    if not rows:
        return held
    pieces = [held[first:last] for first, last in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _own(heads, module, inputs, output):
    return output[slice(*heads)]


def _gather_tokens(ranks, mixer, inputs):
    x_TD, *others, seq = inputs
    return ranks.gather(x_TD, seq.num_tokens_local), *others, seq


def _gather_all(ranks, mlp, inputs):
    # Of a tile of tokens the number is not known; rows that are padding stay it.
    return (ranks.gather(*inputs),)


def _scatter(ranks, module, inputs, output):
    return ranks.scatter(output)


def _norm_over_ranks(norm, ranks, size, x_TD):
    """Divides by the root mean square of what all ranks have of a token."""
    wide_TD = x_TD.to(wide_dtype(x_TD.dtype))
    square_T1 = ranks.sum(wide_TD.square().sum(-1, keepdim=True)) / size
    x_TD = (wide_TD * torch.rsqrt(square_T1 + norm.eps)).to(x_TD.dtype)
    return x_TD * norm.weight if isinstance(norm, RMSNorm) else x_TD


def _embed(embedding, ranks, tokens):
    first, last = ranks.share(embedding.num_embeddings)
    foreign_T = (tokens < first) | (tokens >= last)
    x_TD = F.embedding((tokens - first).masked_fill(foreign_T, 0), embedding.weight)
    return ranks.scatter(x_TD.masked_fill(foreign_T[:, None], 0))


def _cross_entropy(ranks, vocab_size, hidden_TD, weight, labels, chunk):
    hidden_TD = ranks.gather(hidden_TD, len(labels))
    return chunked_cross_entropy(hidden_TD, weight, labels, chunk, ranks.share(vocab_size)[0], ranks.stack)


@torch.no_grad()  # a loss of them would be the same on every rank, not a part of a sum
def _logits(model, ranks, tokens, seq):
    hidden_TD = ranks.gather(model.hidden(tokens, seq), len(tokens))
    return ranks.gather(model.head_weight() @ hidden_TD.t(), model.config.vocab_size).t()
