"""What a layer does beside products and attention: in eager PyTorch, as longspan has it, and numbers to move."""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from longspan.kernels import channel_gates, elu, loss, norm, rotation, scalar_gate, swiglu
from longspan.models import decay, feature_maps, layers, mixers, rope

EPS = 1e-6
LOSS_TOKENS = 4096  # of a chunk


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @property
    def heads_width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Case:
    """shapes: of the inputs, whose gradients are wanted but for those at the places `fixed`. moved: numbers that are
    read or written if every tensor is once, forward and in the backward."""

    eager: Callable
    longspan: Callable
    shapes: Callable[[Sizes], list[tuple[int, ...]]]
    moved: Callable[[Sizes], tuple[int, int]]
    fixed: tuple[int, ...] = ()
    differentiable: bool = True

    def inputs(self, sizes: Sizes, dtype, device) -> list[torch.Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(shape, dtype=dtype, device=device) for shape in self.shapes(sizes)]
        return [x.requires_grad_(n not in self.fixed) for n, x in enumerate(tensors)]


def eager_norm(x, weight, eps=EPS, gate=None):
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if gate is None else out * F.silu(gate)


def eager_residual_norm(x, branch, weight, eps=EPS):
    stream = x if branch is None else x + branch
    return stream, F.rms_norm(stream, x.shape[-1:], weight, eps)


def eager_l2_norm(x, eps=EPS):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def eager_rotate(x, cos, sin, weight=None, eps=EPS):
    if weight is not None:
        x = eager_norm(x, weight, eps)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def eager_biased_gate(a, bias, factor=1 / 16):
    return F.logsigmoid(a.to(torch.promote_types(a.dtype, torch.float32)) + bias) * factor


def eager_bounded_gate(a, factor=0.5):
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    log_decay = torch.log1p(-factor * torch.sigmoid(-wide))
    return log_decay, -torch.expm1(log_decay).to(a.dtype)


def eager_elu1(x):
    return torch.where(x < 0, x.clamp(max=0).exp(), x + 1)


def eager_swiglu(gate, up):
    return F.silu(gate) * up


def angles(x):
    """Cosines and sines for the tokens of heads x, in at least fp32."""
    angle = torch.arange(len(x), device=x.device)[:, None, None] / torch.arange(1, x.shape[2] // 2 + 1, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


def logits_of(logits):
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), labels


def scores_and_gradient(scores, gradient, logits, labels):
    lse, logit = scores(logits, labels)
    return lse - logit, gradient(logits, lse, labels, torch.bfloat16)


def stream(s):
    return s.tokens, s.hidden


def heads(s):
    return s.tokens, s.heads, s.head_dim


def numbers(count, back):
    """moved, as multiples of a stream's numbers."""
    return lambda s: (count * s.tokens * s.hidden, back * s.tokens * s.hidden)


def head_numbers(count, back, shared=0):
    return lambda s: tuple(s.tokens * (n * s.heads_width + shared * s.head_dim) for n in (count, back))


CASES = {
    "norm": Case(
        eager_norm, lambda x, w: norm.rms_norm(x, w, EPS), lambda s: [stream(s), (s.hidden,)], numbers(2, 3)
    ),
    "residual, norm": Case(
        eager_residual_norm, lambda x, branch, w: norm.residual_rms_norm(x, branch, w, EPS),
        lambda s: [stream(s), stream(s), (s.hidden,)], numbers(4, 4),
    ),
    "norm, gate": Case(
        lambda x, w, gate: eager_norm(x, w, EPS, gate), lambda x, w, gate: norm.rms_norm(x, w, EPS, gate),
        lambda s: [heads(s), (s.head_dim,), heads(s)], head_numbers(3, 5),
    ),
    "l2 norm": Case(
        eager_l2_norm, lambda x: norm.l2_norm(x, EPS), lambda s: [heads(s)], head_numbers(2, 3),
    ),
    "rotation": Case(
        eager_rotate, rotation.rotate,
        lambda s: [heads(s), (s.tokens, 1, s.head_dim // 2), (s.tokens, 1, s.head_dim // 2)],
        head_numbers(2, 2, shared=2), fixed=(1, 2),
    ),
    "norm, rotation": Case(
        eager_rotate, lambda x, cos, sin, w: rotation.rotate(x, cos, sin, w, EPS),
        lambda s: [heads(s), (s.tokens, 1, s.head_dim // 2), (s.tokens, 1, s.head_dim // 2), (s.head_dim,)],
        head_numbers(2, 3, shared=2), fixed=(1, 2),
    ),
    "swiglu": Case(
        eager_swiglu, swiglu.swiglu, lambda s: 2 * [(s.tokens, s.mlp)],
        lambda s: (3 * s.tokens * s.mlp, 5 * s.tokens * s.mlp),
    ),
    "elu1": Case(eager_elu1, elu.elu1, lambda s: [heads(s)], head_numbers(2, 3)),
    # Log decay is fp32: two numbers of bf16.
    "channel gate": Case(
        eager_biased_gate, lambda a, bias: channel_gates.biased_gate(a, bias, 1 / 16),
        lambda s: [(s.tokens, s.heads_width), (s.heads_width,)], head_numbers(3, 4),
    ),
    "bounded gate": Case(
        eager_bounded_gate, lambda a: channel_gates.bounded_gate(a, 0.5), lambda s: [(s.tokens, s.heads_width)],
        head_numbers(4, 5),
    ),
    # Forward alone, with the gradient in it: reads fp32 (2 numbers of bf16) twice and writes bf16.
    "loss": Case(
        partial(scores_and_gradient, loss.label_scores_naive, loss.logits_gradient_naive),
        partial(scores_and_gradient, loss.label_scores, loss.logits_gradient),
        lambda s: [(min(s.tokens, LOSS_TOKENS), s.vocabulary)],
        lambda s: (5 * min(s.tokens, LOSS_TOKENS) * s.vocabulary, 0), differentiable=False,
    ),
}  # fmt: skip


def ready(name: str, sizes: Sizes, dtype, device) -> list[torch.Tensor]:
    """The inputs of a case: angles and labels in the place of what is not random."""
    inputs = CASES[name].inputs(sizes, dtype, device)
    if "rotation" in name:
        inputs[1:3] = angles(inputs[0])
    return list(logits_of(inputs[0])) if name == "loss" else inputs


@contextmanager
def eager_layers():
    """Models run what is written in eager PyTorch here, in the place of kernels."""
    with ExitStack() as stack:
        for place, name, function in [
            (layers, "rms_norm", eager_norm),
            (layers, "residual_rms_norm", eager_residual_norm),
            (layers, "swiglu", eager_swiglu),
            (mixers, "swiglu", eager_swiglu),
            (decay, "biased_gate", eager_biased_gate),
            (decay, "bounded_gate", eager_bounded_gate),
            (decay, "scalar_gate", scalar_gate.scalar_gate_naive),
            (feature_maps, "elu1", eager_elu1),
            (feature_maps, "l2_norm", eager_l2_norm),
            (rope.kernel, "rotate", eager_rotate),
        ]:
            stack.enter_context(mock.patch.object(place, name, function))
        yield
