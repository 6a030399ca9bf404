"""Errors of fp32 states do not add up along a sequence: over 1,024 chunks every part is as exact as the first."""

import pytest
import torch

from longspan.attention import linear_attention
from longspan.kernels.linear.groups import CHUNK

NUM_TOKENS, HEADS, KEY_SIZE, VALUE_SIZE = 1024 * CHUNK, 1, 4, 4
PARTS = 8
LIMIT, GROWTH = 2e-6, 3.0

# (decay, whether the delta rule): memories of thousands of tokens and without end, where errors could add up.
FAMILIES = {
    "none": (None, False),
    "fixed": ("fixed", False),
    "scalar": ("scalar", False),
    "channel": ("channel", False),
    "delta": (None, True),
    "gated_delta": ("scalar", True),
    "kda": ("channel", True),
}


def outputs_and_gradients(family, dtype):
    decay, delta = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)

    def normal(size):
        return torch.randn(NUM_TOKENS, HEADS, size, generator=generator)

    inputs = {"q": normal(KEY_SIZE), "k": torch.nn.functional.normalize(normal(KEY_SIZE), dim=-1)}
    inputs["v"] = 0.5 + normal(VALUE_SIZE)
    grad_out = normal(VALUE_SIZE)
    uniform = torch.rand(NUM_TOKENS, HEADS, KEY_SIZE, generator=generator)
    if decay == "scalar":
        inputs["log_decay"] = -2e-3 * uniform[..., 0]
    elif decay == "channel":
        inputs["log_decay"] = -2e-3 * uniform
    if delta:
        inputs["beta"] = 0.1 * torch.rand(NUM_TOKENS, HEADS, generator=generator)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    fixed = {"log_decay": torch.tensor([-1e-4], dtype=dtype)} if decay == "fixed" else {}
    out = linear_attention(**leaves, **fixed)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.to(dtype))
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_part_of_a_long_sequence_is_less_exact(family):
    exact = outputs_and_gradients(family, torch.float64)
    for name, x in outputs_and_gradients(family, torch.float32).items():
        parts = zip(x.double().chunk(PARTS), exact[name].chunk(PARTS))
        errors = [((found - wanted).norm() / wanted.norm()).item() for found, wanted in parts]
        # Gradients run backward in time: their first part is the last one.
        limit = min(LIMIT, GROWTH * errors[0 if name in ("out", "dq") else -1])
        assert all(error <= limit for error in errors), (name, errors)
