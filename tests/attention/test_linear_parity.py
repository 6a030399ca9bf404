"""linear_attention on 1 to 8 ranks against the token-by-token recurrence: outputs and every gradient."""

import zlib
from functools import cache

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from oracles import linear_attention as recurrence
from oracles import with_gradients
from parity import Case, disagreements, relative_error, run_share
from spawn import run_ranks

from longspan.attention import linear_attention
from longspan.parallel import contiguous

WORLD_SIZES = [1, 2, 3, 4, 8]
NUM_HEADS, KEY_SIZE, VALUE_SIZE = 2, 4, 3

# name: (decay, keyword arguments). The decays are described in make_inputs.
FAMILIES = {
    "none": (None, {}),
    "none_normalized": (None, {"normalize": True}),
    "none_full": (None, {"causal": False}),
    "none_full_normalized": (None, {"causal": False, "normalize": True}),
    "none_scale": (None, {"scale": 0.7}),
    "fixed": ("fixed", {}),
    "fixed_normalized": ("fixed", {"normalize": True}),
    "scalar": ("scalar", {}),
    "scalar_normalized": ("scalar", {"normalize": True}),
    "scalar_strong": ("strong", {}),
    "scalar_weak": ("weak", {}),
    "scalar_spiky": ("spiky", {}),
}
SMALL = ["two", "ones", "few", "single_token"]
STRATEGIES = ["lasp2", "lasp", "auto"]


def all_cases():
    """Every family x layout x strategy on one long document and on mixed lengths; the small batches take turns."""
    for i, (family, (_, kwargs)) in enumerate(FAMILIES.items()):
        # lasp passes states in causal order and refuses anything else.
        strategies = STRATEGIES if kwargs.get("causal", True) else ["lasp2", "auto"]
        for j, layout in enumerate(["contiguous", "zigzag", "random", "holes"]):
            for strategy in strategies[:-1]:
                yield Case(family, "one", layout, strategy)
                yield Case(family, "mixed", layout, strategy)
            for n in range(2):
                yield Case(family, SMALL[(i + j + 2 * n) % 4], layout, strategies[(i + j + n) % len(strategies)])
            yield Case(family, "mixed", layout, strategies[(i + j) % len(strategies)], torch.float32)


def make_inputs(family, lengths, dtype=torch.float64):
    """(differentiable inputs, gradient of the output, fixed keyword arguments): global and the same on every rank."""
    decay, kwargs = FAMILIES[family]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{family}{lengths}".encode()))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_tokens = sum(lengths)
    q, k = (normal(num_tokens, NUM_HEADS, KEY_SIZE) for _ in range(2))
    if kwargs.get("normalize"):  # Weights that sum to nearly nothing have no well-defined mean.
        q, k = q.abs() + 0.1, k.abs() + 0.1
    inputs = {"q": q, "k": k, "v": normal(num_tokens, NUM_HEADS, VALUE_SIZE)}
    uniform = torch.rand(num_tokens, NUM_HEADS, generator=generator, dtype=torch.float64)
    fixed = {}
    decay_dtype = torch.promote_types(dtype, torch.float32)  # A gate computes its decays in fp32, in bf16 layers too.
    if decay == "fixed":
        fixed["log_decay"] = torch.tensor([-0.001, -0.3], dtype=decay_dtype)
    elif decay == "scalar":
        inputs["log_decay"] = -0.2 * uniform
    elif decay == "strong":
        inputs["log_decay"] = -20 - uniform
    elif decay == "weak":
        inputs["log_decay"] = -1e-4 * uniform
    elif decay == "spiky":  # Forgets nearly everything every tenth token or so, exactly nothing at others.
        inputs["log_decay"] = torch.where(uniform < 0.1, -20.0, torch.where(uniform > 0.5, 0.0, -0.05))
    inputs = {name: x.to(decay_dtype if name == "log_decay" else dtype) for name, x in inputs.items()}
    return inputs, normal(num_tokens, NUM_HEADS, VALUE_SIZE).to(dtype), kwargs | fixed


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, linear_attention, make_inputs)


@cache
def expected(family, lengths, dtype):
    """The recurrence's outputs and gradients."""
    inputs, grad_out, kwargs = make_inputs(family, LENGTHS[lengths], dtype)
    if "log_decay" in kwargs:
        kwargs["log_decay"] = kwargs["log_decay"].double()
    return with_gradients(recurrence, inputs, grad_out, LENGTHS[lengths], **kwargs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_recurrence(world_size):
    cases = list(all_cases())
    ranks = run_ranks(run_cases, world_size, cases, timeout=180)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


# bf16: sequence parallelism may not add to the error that one rank has.


def run_bf16(rank, world_size, families):
    lengths = LENGTHS["mixed"]
    results = {}
    for family in families:
        inputs, grad_out, kwargs = make_inputs(family, lengths, torch.bfloat16)
        alone = run_share(linear_attention, inputs, grad_out, contiguous(lengths, 1), 0, **kwargs)
        for name, layout in layouts(lengths, world_size).items():
            share = run_share(linear_attention, inputs, grad_out, layout, rank, group=dist.group.WORLD, **kwargs)
            results[family, name] = share, alone
    return results


def test_bf16_is_as_close_to_fp64_as_one_rank():
    world_size = 4
    ranks = run_ranks(run_bf16, world_size, list(FAMILIES))
    problems = []
    for family, layout_name in ranks[0]:
        exact = expected(family, "mixed", torch.bfloat16)
        alone = ranks[0][family, layout_name][1]
        # Errors far below one bf16 rounding (2^-9) are noise, on one rank too.
        limits = {name: 1.5 * max(relative_error(alone[name], x), 1e-3) for name, x in exact.items()}
        assert max(limits.values()) < 0.05, limits
        layout = layouts(LENGTHS["mixed"], world_size)[layout_name]
        shares = [results[family, layout_name][0] for results in ranks]
        problems += disagreements(f"{family}-{layout_name}", shares, layout, exact, torch.bfloat16, limits)
    assert not problems, "\n".join(problems)
