"""sparse_attention with a linear branch on 1 to 8 ranks against its definition, token by token in fp64."""

import zlib
from functools import cache

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from parity import Case
from sparse_oracle import linear_branch
from sparse_oracle import sparse_attention as definition
from spawn import run_ranks

from longspan.attention import LinearBranch, TopBlocks, sparse_attention

HEAD_SIZE = 6
SMALL = {"query_block": 16, "key_block": 8}
# name: (query heads, key heads, over, feature map, keyword arguments)
VARIANTS = {
    "all": (2, 2, "all", "softmax", {"selection": TopBlocks(2, **SMALL)}),
    "all_gqa": (4, 2, "all", "identity", {"selection": TopBlocks(0.3, **SMALL)}),
    "all_odd": (2, 1, "all", "elu1", {"selection": TopBlocks(3, query_block=12, key_block=7)}),
    "all_full": (4, 2, "all", "softmax", {"selection": TopBlocks(2, **SMALL), "causal": False}),
    "rest": (2, 2, "rest", "softmax", {"selection": TopBlocks(2, **SMALL)}),
    "rest_gqa": (4, 2, "rest", "elu1", {"selection": TopBlocks(0.3, **SMALL)}),
    "rest_forced": (2, 1, "rest", "softmax", {"selection": TopBlocks(3, 14, 7, first=1, recent=1)}),
    "rest_full": (2, 2, "rest", "softmax", {"selection": TopBlocks(3, **SMALL), "causal": False}),
    "rest_full_gqa": (4, 2, "rest", "elu1", {"selection": TopBlocks(0.2, 12, 7), "causal": False}),
}  # fmt: skip


def make_inputs(variant, lengths, dtype=torch.float64):
    """(tensors by name, gradient of the output, keyword arguments)."""
    heads, key_heads, over, feature_map, kwargs = VARIANTS[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {name: normal(sum(lengths), n, HEAD_SIZE) for name, n in zip("qkv", (heads, key_heads, key_heads))}
    inputs |= {"weight": normal(HEAD_SIZE, HEAD_SIZE), "bias": normal(HEAD_SIZE)}
    if feature_map == "identity":
        inputs |= {f"own_{name}": normal(sum(lengths), n, 9).exp() for name, n in zip("qk", (heads, key_heads))}
    return inputs, normal(sum(lengths), heads, HEAD_SIZE), {"over": over, "feature_map": feature_map} | kwargs


def layer(q, k, v, weight, bias, own_q=None, own_k=None, *, over, feature_map, **kwargs):
    branch = LinearBranch(weight, bias, over, feature_map, own_q, own_k)
    return sparse_attention(q, k, v, linear=branch, **kwargs)


def reference(q, k, v, weight, bias, own_q=None, own_k=None, *, lengths, over, feature_map, **kwargs):
    own_q, own_k = (q, k) if own_q is None else (own_q, own_k)
    if over == "all":  # blocks do not matter
        branch = linear_branch(own_q, own_k, v, weight, bias, lengths, over=over, feature_map=feature_map, **kwargs)
    else:
        branch = linear_branch(q, k, v, weight, bias, lengths, over=over, feature_map=feature_map, **kwargs)
    return definition(q, k, v, lengths, **kwargs) + branch


def with_gradients(function, inputs, grad_out, **kwargs):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **kwargs)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


@cache
def expected(variant, lengths):
    inputs, grad_out, kwargs = make_inputs(variant, LENGTHS[lengths])
    return with_gradients(reference, inputs, grad_out, lengths=LENGTHS[lengths], **kwargs)


def all_cases(world_size):
    """Every variant on one long document and on mixed lengths; layouts and strategies take turns."""
    turn = world_size
    for variant in VARIANTS:
        for lengths in ("one", "mixed"):
            yield Case(variant, lengths, ["contiguous", "zigzag", "random", "holes", "balanced"][turn % 5],
                       ["fetch", "ring", "auto"][turn % 3])  # fmt: skip
            turn += 1
    yield Case("rest", "ones", "contiguous", "auto")
    yield Case("rest_full", "few", "holes", "fetch")
    yield Case("rest", "mixed", "zigzag", "auto", torch.float32)
    yield Case("all_full", "mixed", "zigzag", "auto", torch.float32)


def shares(inputs, rows):
    return {name: x[rows] if x.ndim == 3 else x for name, x in inputs.items()}


def run_cases(rank, world_size, cases):
    found = []
    for case in cases:
        layout = layouts(LENGTHS[case.lengths], world_size)[case.layout]
        rows = torch.from_numpy(layout.global_indices(rank))
        inputs, grad_out, kwargs = make_inputs(case.variant, LENGTHS[case.lengths], case.dtype)
        kwargs |= {"layout": layout, "group": dist.group.WORLD, "strategy": case.strategy}
        found.append(with_gradients(layer, shares(inputs, rows), grad_out[rows], **kwargs))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_definition(world_size):
    cases = list(all_cases(world_size))
    problems = []
    for case, *found in zip(cases, *run_ranks(run_cases, world_size, cases, timeout=180), strict=True):
        layout = layouts(LENGTHS[case.lengths], world_size)[case.layout]
        wanted = expected(case.variant, case.lengths)
        summed = {name: sum(share.pop(name) for share in found) for name in ("dweight", "dbias")}
        problems += parity.disagreements(
            case, found, layout, {name: x for name, x in wanted.items() if name not in summed}, case.dtype
        )
        for name, x in summed.items():
            if not (error := parity.relative_error(x, wanted[name])) <= parity.TOLERANCE[case.dtype]:
                problems.append(f"{case}: {name} is off by {error:.1e}")
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)
