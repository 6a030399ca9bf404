"""softmax_attention on 1 to 8 ranks against the full masked matrix: outputs and every gradient."""

import zlib
from functools import cache

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from parity import SMALL, WORLD_SIZES, disagreements, relative_error, run_share, taking_turns
from spawn import run_ranks

from longspan.attention import softmax_attention
from longspan.benchmarks.routing import lopsided, uneven
from longspan.parallel import Costs, Layout, SequenceParallel, Span, Topology, contiguous, plan_attention, zigzag

HEAD_SIZE = 8

# name: (query heads, key heads, keyword arguments)
VARIANTS = {
    "causal": (2, 2, {}),
    "full": (2, 2, {"causal": False}),
    "causal_gqa": (4, 2, {}),
    "full_gqa": (4, 2, {"causal": False}),
    "causal_mqa": (3, 1, {"scale": 0.9}),
    "causal_peaked": (2, 2, {"scale": 20.0}),
}
WINDOWS = {  # of one token, short, as long as a part or a shard, longer than any document
    f"window_{window}": (heads, kv_heads, {"window": window})
    for window, heads, kv_heads in ((1, 2, 2), (2, 4, 2), (7, 3, 1), (31, 4, 2), (64, 2, 2), (1000, 4, 2))
}
WIDE = {"causal_wide": (8, 2, {}), "window_wide": (8, 2, {"window": 13})}  # for strategies that share out heads
STRATEGIES = ["ring", "grouped_ring", "all_gather", "auto"]
MOVED = ["zeppelin", "zeppelin_even", "hybrid", "usp"]


def all_cases(world_size):
    strategies = dict.fromkeys(VARIANTS | WINDOWS, [*STRATEGIES, *MOVED])
    # Scores of around 100 lose two of fp32's digits in the exponential.
    return list(taking_turns(strategies, world_size, double_only=["causal_peaked"]))


def make_inputs(variant, lengths, dtype=torch.float64):
    """(differentiable inputs, gradient of the output, keyword arguments): global and the same on every rank."""
    num_heads, num_kv_heads, kwargs = (VARIANTS | WINDOWS | WIDE)[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(heads):
        return torch.randn(sum(lengths), heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"q": normal(num_heads), "k": normal(num_kv_heads), "v": normal(num_kv_heads)}
    return inputs, normal(num_heads), kwargs


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, softmax_attention, make_inputs)


@cache
def expected(variant, lengths, dtype):
    """Outputs and gradients of the full masked matrix."""
    inputs, grad_out, kwargs = make_inputs(variant, LENGTHS[lengths], dtype)
    return with_gradients(full_matrix, inputs, grad_out, LENGTHS[lengths], **kwargs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_full_matrix(world_size):
    cases = all_cases(world_size)
    ranks = run_ranks(run_cases, world_size, cases, timeout=240)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


# bf16: sequence parallelism may not add to the error that one rank has.


def run_bf16(rank, world_size, strategies):
    lengths = LENGTHS["mixed"]
    inputs, grad_out, kwargs = make_inputs("causal_gqa", lengths, torch.bfloat16)
    alone = run_share(softmax_attention, inputs, grad_out, contiguous(lengths, 1), 0, **kwargs)
    results = {}
    for name, layout in layouts(lengths, world_size).items():
        for strategy in strategies:
            share = run_share(
                softmax_attention, inputs, grad_out, layout, rank, group=dist.group.WORLD, strategy=strategy, **kwargs
            )
            results[name, strategy] = share, alone
    return results


def test_bf16_is_as_close_to_fp64_as_one_rank():
    world_size = 4
    ranks = run_ranks(run_bf16, world_size, [*STRATEGIES[:3], "zeppelin", "usp"])
    exact = expected("causal_gqa", "mixed", torch.bfloat16)
    problems = []
    for layout_name, strategy in ranks[0]:
        alone = ranks[0][layout_name, strategy][1]
        # Errors far below one bf16 rounding (2^-9) are noise, on one rank too.
        limits = {name: 1.5 * max(relative_error(alone[name], x), 1e-3) for name, x in exact.items()}
        assert max(limits.values()) < 0.05, limits
        layout = layouts(LENGTHS["mixed"], world_size)[layout_name]
        shares = [results[layout_name, strategy][0] for results in ranks]
        problems += disagreements(f"{layout_name}-{strategy}", shares, layout, exact, torch.bfloat16, limits)
    assert not problems, "\n".join(problems)


# Plans given by hand, or made by the context: queries, keys and values move and come back.


ROUTED = Costs(key_s=1e-3, remote_key_s=1e-2)  # every row that crosses counts


def placed(name, lengths, topology):
    """A layout of cases.py, or one that loads the links between nodes unevenly; giant: the longest document on one rank
    of the first node, the others lopsided."""
    if name in ("lopsided", "uneven"):
        return {"lopsided": lopsided, "uneven": uneven}[name](lengths, topology)
    if name != "giant":
        return layouts(lengths, topology.world_size)[name]
    longest = lengths.index(max(lengths))
    spans = [[s for s in held if s.document != longest] for held in lopsided(lengths, topology).spans]
    spans[topology.ranks_per_node - 1].append(Span(longest, 0, lengths[longest]))
    return Layout(lengths, tuple(map(tuple, spans)))


def run_nodes(rank, world_size, cases):
    """The share of every (lengths, layout, nodes, mask) over a double ring."""
    results = []
    for name, layout_name, nodes, variant in cases:
        lengths = LENGTHS[name]
        inputs, grad_out, kwargs = make_inputs(variant, lengths)
        topology = Topology(nodes, world_size // nodes)
        layout = placed(layout_name, lengths, topology)
        parallel = SequenceParallel(dist.group.WORLD, topology=topology, softmax="double_ring", costs=ROUTED)
        seq = parallel.context(layout)

        def on_nodes(*tensors, layout, group, seq=seq, **options):
            return softmax_attention(*tensors, seq=seq, **options)

        results.append(run_share(on_nodes, inputs, grad_out, layout, rank, group=dist.group.WORLD, **kwargs))
    return results


def node_cases(world_size):
    nodes = [n for n in range(2, world_size + 1) if world_size % n == 0]
    for i, layout in enumerate(["contiguous", "zigzag", "random", "holes"]):
        for j, variant in enumerate(["causal_gqa", "full", "window_31"]):
            for name in (["one", "mixed"][(i + j) % 2], SMALL[(i + 2 * j) % 4]):
                yield name, layout, nodes[(i + j) % len(nodes)], variant
    for layout in ("lopsided", "uneven", "giant"):
        for n in nodes:
            yield "mixed" if layout == "giant" else "one", layout, n, "causal_gqa"
            yield "two", layout, n, "full"


@pytest.mark.parametrize("world_size", [2, 4, 6, 8])
def test_double_ring(world_size):
    cases = list(node_cases(world_size))
    ranks = run_ranks(run_nodes, world_size, cases, timeout=120)
    problems = []
    for n, (name, layout_name, nodes, variant) in enumerate(cases):
        exact = expected(variant, name, torch.float64)
        layout = placed(layout_name, LENGTHS[name], Topology(nodes, world_size // nodes))
        shares, limits = [results[n] for results in ranks], dict.fromkeys(exact, 1e-9)
        problems += disagreements(f"{cases[n]}", shares, layout, exact, torch.float64, limits)
    assert not problems, "\n".join(problems)


def run_plans(rank, world_size, lengths, variant):
    """Shares by a given plan of two nodes that cuts all it can, and by a context on its own base layout."""
    inputs, grad_out, kwargs = make_inputs(variant, lengths)
    plan = plan_attention(lengths, Topology(2, world_size // 2), Costs.pairs_only(), token_cap=3.0)
    start = contiguous(lengths, world_size)
    given = run_share(softmax_attention, inputs, grad_out, start, rank, group=dist.group.WORLD, plan=plan, **kwargs)
    parallel = SequenceParallel(dist.group.WORLD, topology=Topology(2, world_size // 2), softmax="zeppelin")
    seq = parallel.context(lengths)

    def by_context(*tensors, layout, group, **options):
        return softmax_attention(*tensors, seq=seq, **options)

    made = run_share(by_context, inputs, grad_out, seq.layout, rank, group=dist.group.WORLD, **kwargs)
    return given, made, seq.layout, plan.layout != start, seq.attention_layout() != seq.layout


@pytest.mark.parametrize("world_size, variant", [(2, "causal_gqa"), (4, "causal_gqa"), (4, "window_31")])
def test_plans_given_and_made(world_size, variant):
    lengths = LENGTHS["mixed"]
    ranks = run_ranks(run_plans, world_size, lengths, variant)
    exact = expected(variant, "mixed", torch.float64)
    limits = dict.fromkeys(exact, 1e-9)
    given, made = ([results[n] for results in ranks] for n in range(2))
    problems = disagreements("given", given, contiguous(lengths, world_size), exact, torch.float64, limits)
    problems += disagreements("made", made, ranks[0][2], exact, torch.float64, limits)
    assert not problems, "\n".join(problems)
    assert all(results[3] for results in ranks) and len({results[2] for results in ranks}) == 1
    tokens = ranks[0][2].tokens_per_rank
    assert max(tokens) - min(tokens) <= 1


# Ulysses: every rank has all tokens of its heads; of 8 query heads, with 2 key heads, each may go to a rank of its own.


def run_ulysses(rank, world_size, lengths):
    """Shares by variant, and what is said where the heads cannot be shared out."""
    layout, group, shares = zigzag(lengths, world_size), dist.group.WORLD, {}
    for variant in WIDE:
        inputs, grad_out, kwargs = make_inputs(variant, lengths)
        shares[variant] = run_share(
            softmax_attention, inputs, grad_out, layout, rank, group=group, strategy="ulysses", **kwargs
        )
    few = [torch.zeros(layout.tokens_per_rank[rank], 3, HEAD_SIZE) for _ in range(3)]
    with pytest.raises(ValueError) as refused:
        softmax_attention(*few, layout=layout, group=group, strategy="ulysses")
    return shares, str(refused.value)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ulysses(world_size):
    lengths = LENGTHS["mixed"]
    ranks = run_ranks(run_ulysses, world_size, lengths)
    problems = []
    for variant in WIDE:
        exact, shares = expected(variant, "mixed", torch.float64), [r[0][variant] for r in ranks]
        limits = dict.fromkeys(exact, 1e-9)
        problems += disagreements(variant, shares, zigzag(lengths, world_size), exact, torch.float64, limits)
    assert not problems, "\n".join(problems)
    assert {r[1] for r in ranks} == {
        f"strategy 'ulysses' shares 3 query heads among {world_size} ranks; use 'usp' or 'ring'"
    }
