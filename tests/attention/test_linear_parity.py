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
from parity import WORLD_SIZES, disagreements, relative_error, run_share, taking_turns
from spawn import run_ranks

from longspan.attention import linear_attention
from longspan.parallel import SequenceParallel, Topology, contiguous
from longspan.parallel.scan import TRANSPORTS

NUM_HEADS, KEY_SIZE, VALUE_SIZE = 2, 4, 3

# name: (decay, largest beta, keyword arguments). The decays are described in make_inputs.
FAMILIES = {
    "none": (None, 0, {}),
    "none_normalized": (None, 0, {"normalize": True}),
    "none_full": (None, 0, {"causal": False}),
    "none_full_normalized": (None, 0, {"causal": False, "normalize": True}),
    "none_scale": (None, 0, {"scale": 0.7}),
    "fixed": ("fixed", 0, {}),
    "fixed_normalized": ("fixed", 0, {"normalize": True}),
    "scalar": ("scalar", 0, {}),
    "scalar_normalized": ("scalar", 0, {"normalize": True}),
    "scalar_strong": ("scalar_strong", 0, {}),
    "scalar_weak": ("scalar_weak", 0, {}),
    "scalar_spiky": ("scalar_spiky", 0, {}),
    "scalar_closed": ("scalar_closed", 0, {}),
    "channel": ("channel", 0, {}),
    "channel_normalized": ("channel", 0, {"normalize": True}),
    "channel_strong": ("channel_strong", 0, {}),
    "channel_weak": ("channel_weak", 0, {}),
    "channel_spiky": ("channel_spiky", 0, {}),
    "channel_closed": ("channel_closed", 0, {}),
    "delta": (None, 1, {}),
    "delta_reflecting": (None, 2, {"scale": 0.7}),
    "gated_delta": ("scalar", 1, {}),
    "gated_delta_fixed": ("fixed", 1, {}),
    "gated_delta_spiky": ("scalar_spiky", 1, {}),
    "kda": ("channel", 1, {}),
    "kda_strong": ("channel_strong", 1, {}),
    "kda_spiky": ("channel_spiky", 1, {}),
}


def all_cases(world_size):
    strategies = {}
    for family, (_, _, kwargs) in FAMILIES.items():
        # Strategies that pass states on in causal order refuse anything else.
        causal = kwargs.get("causal", True)
        strategies[family] = [name for name, transport in TRANSPORTS.items() if causal or not transport.causal_only]
        strategies[family] += ["auto"] * (family in ("scalar", "none_full", "kda"))
    return list(taking_turns(strategies, world_size))


def make_inputs(family, lengths, dtype=torch.float64):
    """(differentiable inputs, gradient of the output, fixed keyword arguments): global and the same on every rank."""
    decay, largest_beta, kwargs = FAMILIES[family]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{family}{lengths}".encode()))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    num_tokens = sum(lengths)
    q, k = (normal(num_tokens, NUM_HEADS, KEY_SIZE) for _ in range(2))
    if kwargs.get("normalize"):  # Weights that sum to nearly nothing have no well-defined mean.
        q, k = q.abs() + 0.1, k.abs() + 0.1
    if largest_beta:
        k = torch.nn.functional.normalize(k, dim=-1)
    inputs = {"q": q, "k": k, "v": normal(num_tokens, NUM_HEADS, VALUE_SIZE)}
    if largest_beta:
        inputs["beta"] = largest_beta * uniform(num_tokens, NUM_HEADS)
    fixed = {}
    gate_dtype = torch.promote_types(dtype, torch.float32)  # Gates are computed in fp32, in bf16 layers too.
    if decay == "fixed":
        fixed["log_decay"] = torch.tensor([-0.001, -0.3], dtype=gate_dtype)
    elif decay is not None:
        kind, _, strength = decay.partition("_")
        draw = uniform(num_tokens, NUM_HEADS, *([KEY_SIZE] if kind == "channel" else []))
        inputs["log_decay"] = {
            "": -0.2 * draw,
            "strong": -20 - draw,
            "weak": -1e-4 * draw,
            # Forgets nearly everything every tenth token or so, exactly nothing at others.
            "spiky": torch.where(draw < 0.1, -20.0, torch.where(draw > 0.5, 0.0, -0.05)),
            "closed": torch.where(draw < 0.05, -torch.inf, -0.05 * draw),
        }[strength]
    inputs = {name: x.to(gate_dtype if name in ("log_decay", "beta") else dtype) for name, x in inputs.items()}
    return inputs, normal(num_tokens, NUM_HEADS, VALUE_SIZE).to(dtype), kwargs | fixed


def attend(*args, layout, group, strategy, **kwargs):
    """linear_attention; the strategy in two levels on machines of two ranks, where there are several of them."""
    if strategy != "hierarchical" or layout.world_size % 2:
        return linear_attention(*args, layout=layout, group=group, strategy=strategy, **kwargs)
    topology = Topology(layout.world_size // 2, 2)
    seq = SequenceParallel(group, topology=topology, linear=strategy).context(layout)
    return linear_attention(*args, seq=seq, **kwargs)


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, attend, make_inputs)


@cache
def expected(family, lengths, dtype):
    """The recurrence's outputs and gradients."""
    inputs, grad_out, kwargs = make_inputs(family, LENGTHS[lengths], dtype)
    if "log_decay" in kwargs:
        kwargs["log_decay"] = kwargs["log_decay"].double()
    return with_gradients(recurrence, inputs, grad_out, LENGTHS[lengths], **kwargs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_recurrence(world_size):
    cases = all_cases(world_size)
    ranks = run_ranks(run_cases, world_size, cases, timeout=180)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


# bf16: sequence parallelism may not add to the error that one rank has.


def run_bf16(rank, world_size, families):
    lengths = LENGTHS["mixed"]
    results = {}
    for family in families:
        inputs, grad_out, kwargs = make_inputs(family, lengths, torch.bfloat16)
        alone = None
        if rank == 0:
            alone = run_share(linear_attention, inputs, grad_out, contiguous(lengths, 1), 0, **kwargs)
        for name in ("zigzag", "random", "holes"):
            layout = layouts(lengths, world_size)[name]
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
