"""short_convolution on 1 to 8 ranks against a loop over documents: outputs, gradients, checkpointing, refusals."""

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts, random_layout
from parity import assemble, relative_error
from shared_windows import shared_windows
from spawn import run_ranks
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from longspan.attention import short_convolution
from longspan.attention.recompute import checkpoint_contexts
from longspan.parallel import Layout, SequenceParallel, Span, contiguous, zigzag

WORLD_SIZES = [1, 2, 3, 4, 8]
CHANNELS = 5
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6}


def by_document(x, weight, bias, lengths, activation):
    """The definition, tap by tap inside each document."""
    width, outs = weight.shape[1], []
    for document in x.split(list(lengths)):
        padded = torch.cat([document.new_zeros(width - 1, x.shape[1]), document])
        out = sum(padded[tap : tap + len(document)] * weight[:, tap] for tap in range(width))
        outs.append(out if bias is None else out + bias)
    out = torch.cat(outs)
    return out * torch.sigmoid(out) if activation else out


def make_inputs(lengths, width, with_bias, dtype=torch.float64):
    """Global (x, weight, bias, gradient of the output), the same on every rank."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    shapes = (sum(lengths), CHANNELS), (CHANNELS, width), (CHANNELS,), (sum(lengths), CHANNELS)
    x, weight, bias, grad_out = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x, weight, bias if with_bias else None, grad_out


def with_gradients(convolution, x, weight, bias, grad_out):
    leaves = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    out = convolution(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def shredded(lengths, world_size):
    """Every token is a span of its own, dealt round robin in an order in which no two neighbours stay neighbours."""
    tokens = [Span(document, t, t + 1) for document, length in enumerate(lengths) for t in range(length)]
    tokens = tokens[::2] + tokens[1::2]
    return Layout(tuple(lengths), tuple(tuple(tokens[rank::world_size]) for rank in range(world_size)))


def all_cases(world_size):
    """(name of the lengths, name of the layout, layout, width, bias, activation, dtype)."""
    for i, (name, lengths) in enumerate(LENGTHS.items()):
        named = layouts(lengths, world_size) | {"shredded": shredded(lengths, world_size)}
        named |= {f"random {seed}": random_layout(lengths, world_size, seed) for seed in (1, 2)}
        for j, (layout_name, layout) in enumerate(named.items()):
            bias, activation = (i + j) % 2 == 0, [None, "silu"][(i // 2 + j) % 2]
            turn = i + j + world_size
            for width in [(2, 4), (3, 8)][turn % 2]:
                yield name, layout_name, layout, width, bias, activation, torch.float64
            if turn % 3 == 0:
                yield name, layout_name, layout, 4, bias, activation, torch.float32


def convolve_everything(rank, world_size):
    results, parallel = [], SequenceParallel(dist.group.WORLD)
    for number, (name, _, layout, width, with_bias, activation, dtype) in enumerate(all_cases(world_size)):
        x, weight, bias, grad_out = make_inputs(LENGTHS[name], width, with_bias, dtype)
        rows = torch.from_numpy(layout.global_indices(rank))
        seq = parallel.context(layout)

        def convolve():
            return with_gradients(
                lambda **leaves: short_convolution(**leaves, activation=activation, seq=seq),
                *(x[rows], weight, bias, grad_out[rows]),
            )

        results.append(convolve())
        if number % 10 == 0:
            for key, again in convolve().items():
                assert torch.equal(results[-1][key], again), f"{key} differs from run to run"
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_the_loop_over_documents(world_size):
    ranks = run_ranks(convolve_everything, world_size)
    problems = []
    for case, *shares in zip(all_cases(world_size), *ranks, strict=True):
        name, layout_name, layout, width, with_bias, activation, dtype = case
        x, weight, bias, grad_out = make_inputs(LENGTHS[name], width, with_bias, dtype)
        exact = (None if a is None else a.double() for a in (x, weight, bias, grad_out))

        def convolution(x, weight, bias=None):
            return by_document(x, weight, bias, LENGTHS[name], activation)

        expected = with_gradients(convolution, *exact)
        found = assemble([{key: share[key] for key in ("out", "dx")} for share in shares], layout)
        found |= {key: sum(share[key] for share in shares) for key in expected if key not in found}
        for key, wanted in expected.items():
            error = relative_error(found[key], wanted)
            if not error <= LIMITS[dtype] or found[key].dtype != dtype or found[key].shape != wanted.shape:
                problems.append(f"{name} {layout_name} width {width} {activation} {dtype}: {key} is off by {error:.1e}")
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


def convolve_in_bf16(rank, world_size):
    """Shares of output and dx in bf16, for every layout of the mixed batch."""
    lengths, shares = LENGTHS["mixed"], {}
    x, weight, bias, grad_out = make_inputs(lengths, 4, True, torch.bfloat16)
    for name, layout in layouts(lengths, world_size).items():
        rows = torch.from_numpy(layout.global_indices(rank))
        where = {"layout": layout, "group": dist.group.WORLD, "activation": "silu"}
        shares[name] = with_gradients(
            lambda **leaves: short_convolution(**leaves, **where), x[rows], weight, bias, grad_out[rows]
        )
    return shares


def test_bf16_is_as_close_to_fp64_as_one_rank():
    lengths = LENGTHS["mixed"]
    inputs = make_inputs(lengths, 4, True, torch.bfloat16)

    def definition(x, weight, bias):
        return by_document(x, weight, bias, lengths, "silu")

    def on_one_rank(**leaves):
        return short_convolution(**leaves, activation="silu", layout=contiguous(lengths, 1))

    exact, alone = with_gradients(definition, *(x.double() for x in inputs)), with_gradients(on_one_rank, *inputs)
    ranks = run_ranks(convolve_in_bf16, 4)
    for name, layout in layouts(lengths, 4).items():
        found = assemble([{key: shares[name][key] for key in ("out", "dx")} for shares in ranks], layout)
        for key, x in found.items():
            assert relative_error(x, exact[key]) <= 1.5 * relative_error(alone[key], exact[key]) < 0.01, (name, key)


# Communication


def traffic_of(convolve, x, weight):
    with Traffic() as forward:
        out = convolve(x, weight)
    with Traffic() as backward:
        grads = torch.autograd.grad(out.sin().sum(), [x, weight])
    return (forward.num_calls, forward.num_bytes), (backward.num_calls, backward.num_bytes), [out, *grads]


def halos_of_two_lengths(rank, world_size, make_layout):
    weight = torch.randn(CHANNELS, 4, requires_grad=True)
    traffic = []
    for length in (400, 4000):
        seq = SequenceParallel(dist.group.WORLD).context(make_layout((length,), world_size))
        x = torch.randn(seq.num_tokens_local, CHANNELS, requires_grad=True)
        traffic.append(traffic_of(lambda x, weight: short_convolution(x, weight, seq=seq), x, weight)[:2])
    return traffic


@pytest.mark.parametrize("make_layout", [contiguous, zigzag])
def test_halos_do_not_grow_with_the_sequence(make_layout):
    ranks = run_ranks(halos_of_two_lengths, 4, make_layout)
    borders = {contiguous: 3, zigzag: 6}[make_layout]  # spans that continue one on another rank; 3 and 4 are neighbours
    for direction, wide in ((0, 4), (1, 4)):
        sent = [sum(rank[length][direction][1] for rank in ranks) for length in (0, 1)]
        assert sent[0] == sent[1] == borders * 3 * CHANNELS * wide


def documents_that_stay(rank, world_size):
    seq = SequenceParallel(dist.group.WORLD).context(contiguous((10,) * world_size, world_size))
    x = torch.randn(10, CHANNELS, requires_grad=True)
    weight = torch.randn(CHANNELS, 4, requires_grad=True)
    return traffic_of(lambda x, weight: short_convolution(x, weight, seq=seq), x, weight)[:2]


def test_documents_that_do_not_cross_ranks_send_nothing():
    assert run_ranks(documents_that_stay, 2) == [((0, 0), (0, 0))] * 2


def recompute(rank, world_size):
    """Lines of what differs between a checkpointed and a plain run."""
    problems, lengths = [], (1, 61, 7, 120, 2)
    weight = torch.randn(CHANNELS, 4, dtype=torch.float64, requires_grad=True)
    for name, layout in layouts(lengths, world_size).items():
        for where in (
            {"seq": SequenceParallel(dist.group.WORLD).context(layout)},
            {"layout": layout, "group": dist.group.WORLD},
        ):
            x = torch.randn(layout.tokens_per_rank[rank], CHANNELS, dtype=torch.float64, requires_grad=True)

            def block(x, weight):  # two calls: what is kept must be matched in order
                x = short_convolution(x, weight, activation="silu", **where).cos()
                return short_convolution(x, weight.sin(), **where).square()

            def checkpointed(x, weight):
                return checkpoint(block, x, weight, use_reentrant=False, context_fn=checkpoint_contexts)

            *once, expected = traffic_of(block, x, weight)
            *again, found = traffic_of(checkpointed, x, weight)
            if once != again:
                problems.append(f"{name} {list(where)}: traffic {once} became {again}")
            if not all(map(torch.equal, expected, found)):
                problems.append(f"{name} {list(where)}: results differ")
    return problems


@pytest.mark.parametrize("world_size", [1, 4])
def test_recomputation_repeats_no_communication(world_size):
    for rank, problems in enumerate(run_ranks(recompute, world_size)):
        assert not problems, f"rank {rank}:\n" + "\n".join(problems)


def through_shared_memory(rank, world_size):
    """Lines of what differs where halos travel through memory that ranks share; calls of the group there."""
    peers, problems, moved = shared_windows(rank, world_size), [], 0
    for name, layout in (layouts((1, 61, 7, 120, 2), world_size) | {"shredded": shredded((9, 30), world_size)}).items():
        weight = torch.randn(CHANNELS, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        x = torch.randn(layout.tokens_per_rank[rank], CHANNELS, requires_grad=True)
        found = []
        for memory in (None, peers):
            seq = SequenceParallel(dist.group.WORLD, peers=memory).context(layout)
            found.append(traffic_of(lambda x, weight: short_convolution(x, weight, seq=seq), x, weight))
        moved += found[0][0][0] > 0
        if any(calls for calls, _ in found[1][:2]):
            problems.append(f"{name}: rank {rank} calls the group")
        if not all(map(torch.equal, found[0][2], found[1][2])):
            problems.append(f"{name}: rank {rank} has other results")
    assert moved and peers.received
    return problems


def test_through_shared_memory_it_is_the_same():
    assert sum(run_ranks(through_shared_memory, 3), []) == []


# Refusals and what is accepted


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


REFUSED = {
    "heads that are not flattened": ({"x": ones(6, 2, 2)}, r"x has shape \(6, 2, 2\).*flatten"),
    "integers": ({"x": ones(6, 4, dtype=torch.int64)}, r"x has dtype torch.int64"),
    "weight of other channels": ({"weight": ones(5, 4)}, r"weight has shape \(5, 4\); use \[4, width\]"),
    "weight of one tap": ({"weight": ones(4, 1)}, r"weight.*2 to 8"),
    "weight of nine taps": ({"weight": ones(4, 9)}, r"weight.*2 to 8"),
    "weight as of conv1d": ({"weight": ones(4, 1, 4)}, r"weight has shape \(4, 1, 4\)"),
    "bias of other channels": ({"bias": ones(3)}, r"bias has shape \(3,\); use \[4\]"),
    "weight of another dtype": ({"weight": ones(4, 4).double()}, r"weight has dtype torch.float64 but x has"),
    "bias of another dtype": ({"bias": ones(4).double()}, r"bias has dtype torch.float64 but x has"),
    "weight on another device": ({"weight": ones(4, 4).to("meta")}, r"weight is on meta but x is on cpu"),
    "unknown activation": ({"activation": "swish"}, r"activation 'swish' is unknown; use None or 'silu'"),
    "tokens that are not those of the layout": ({"layout": contiguous((9,), 1)}, r"6.*9"),
    "a layout of two ranks without a group": ({"layout": contiguous((12,), 2)}, r"2 ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changes, names = REFUSED[case]
    with pytest.raises(ValueError, match=names) as raised:
        short_convolution(**({"x": ones(6, 4), "weight": ones(4, 4)} | changes))
    assert "\n" not in str(raised.value)


def refused_by_all(rank, world_size):
    """The message on every rank when only rank 1 is wrong, or when ranks differ in what is right by itself."""
    messages = []
    for weight, activation in ((ones(4, 4 if rank == 0 else 9), None), (ones(4, 4), ["silu", None][rank])):
        with pytest.raises(ValueError) as raised:
            short_convolution(
                ones(5, 4), weight, activation=activation, layout=contiguous((10,), 2), group=dist.group.WORLD
            )
        messages.append(str(raised.value))
    return messages


def test_all_ranks_refuse_together():
    for weight, activation in run_ranks(refused_by_all, 2):
        assert "weight has shape (4, 9)" in weight and "ranks disagree" in activation


def test_strided_inputs_and_gradients():
    wide = torch.randn(30, 3 * CHANNELS, dtype=torch.float64)
    weight = torch.randn(4, CHANNELS, dtype=torch.float64).t()
    grad_out = torch.randn(CHANNELS, 30, dtype=torch.float64).t()
    strided = wide[:, CHANNELS : 2 * CHANNELS]
    results = [
        with_gradients(lambda **leaves: short_convolution(**leaves, layout=contiguous((11, 19), 1)), x, w, None, grad)
        for x, w, grad in ((strided, weight, grad_out), [a.contiguous() for a in (strided, weight, grad_out)])
    ]
    for key, x in results[0].items():
        torch.testing.assert_close(x, results[1][key], rtol=1e-12, atol=1e-12, msg=key)


def test_another_document_with_infinities_stays_out():
    x, weight = torch.randn(12, CHANNELS), torch.randn(CHANNELS, 4)
    x[3:6] = float("inf")
    out = short_convolution(x, weight, layout=contiguous((3, 3, 6), 1))
    assert out[:3].isfinite().all() and out[6:].isfinite().all()


def test_compiled_models_may_call_it():
    def block(x, weight):
        return short_convolution(x.sin(), weight, activation="silu").cos()

    x, weight = torch.randn(9, CHANNELS), torch.randn(CHANNELS, 4)
    assert torch.equal(block(x, weight), torch.compile(block, backend="eager")(x, weight))
