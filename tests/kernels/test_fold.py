"""Folds of states along chains: against a loop over one chain at a time, for every kind of transition, both twins."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from longspan.kernels.fold import compose, fold_chains, fold_chains_naive, step, summarize

TRANSITIONS = ["none", "scalar", "vector", "matrix", "transposed matrix"]
ROWS, HEADS = 9, 3


def apply(transition, row, reached):
    """A(reached), in the words of the definition."""
    if transition is None:
        return reached
    one = transition[row]
    return one @ reached if one.ndim == 3 else one.exp().reshape(HEADS, -1, 1) * reached


def fold_loop(states, transition, chains, initial):
    """The definition: one chain after another, one row after another."""
    out = torch.full((chains.num_out, *states.shape[1:]), float("nan"), dtype=states.dtype)
    for sources, targets, first in zip(chains.sources.tolist(), chains.targets.tolist(), chains.initial.tolist()):
        reached = torch.zeros_like(states[0]) if first < 0 else initial[first]
        for source, target in zip(sources, targets):
            if target >= 0:
                out[target] = reached
            if source >= 0:
                reached = apply(transition, source, reached) + states[source]
    return out


def random_chains(num_chains, length, num_initial, seed):
    """Chains with holes; every source but row 0 of the states may occur; two rows of the result are never written."""
    rng = random.Random(seed)
    places = [(n, column) for n in range(num_chains) for column in range(length) if rng.random() < 0.6]
    rng.shuffle(places)
    sources, targets = torch.full((2, num_chains, length), -1, dtype=torch.int32)
    for target, place in enumerate(places):
        targets[place] = target
    for n in range(num_chains):
        for column in range(length):
            sources[n, column] = rng.choice([-1, *range(1, ROWS)])
    initial = torch.tensor([rng.randrange(-1, num_initial) for _ in range(num_chains)], dtype=torch.int32)
    return SimpleNamespace(sources=sources, targets=targets, initial=initial, num_out=len(places) + 2)


def random_transition(kind, keys, generator, dtype=torch.float64):
    if kind == "none":
        return None
    if "matrix" in kind:
        matrix = torch.randn(ROWS, HEADS, keys, keys, generator=generator, dtype=dtype) / keys**0.5
        return matrix.mT if kind.startswith("transposed") else matrix
    shape = (ROWS, HEADS) if kind == "scalar" else (ROWS, HEADS, keys)
    decay = -torch.rand(shape, generator=generator, dtype=dtype)
    decay[2], decay[3] = -1000.0, 0.0
    return decay


def problem(kind, num_chains, length, keys, values, seed=0):
    """(states, transition, chains, initial) in fp64; row 0 of states and transition is NaN and never named."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(ROWS, HEADS, keys, values, generator=generator, dtype=torch.float64)
    transition = random_transition(kind, keys, generator)
    states[0] = float("nan")
    if transition is not None:
        transition[0] = float("nan")
    initial = torch.randn(2, HEADS, keys, values, generator=generator, dtype=torch.float64)
    return states, transition, random_chains(num_chains, length, 2, seed), initial


def named(chains, x):
    return x[chains.targets[chains.targets >= 0].long()]


def error(actual, expected):
    """The largest difference relative to the largest number; NaN is no match."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_chains_in_plain_pytorch(kind):
    for num_chains, length in [(4, 6), (1, 1), (0, 3), (3, 0)]:
        states, transition, chains, initial = problem(kind, num_chains, length, 4, 5)
        expected = fold_loop(states, transition, chains, initial)
        actual = fold_chains(states, transition, chains, initial)
        assert actual.shape == (chains.num_out, HEADS, 4, 5) and actual.dtype == torch.float64
        torch.testing.assert_close(named(chains, actual), named(chains, expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_one_hop_and_the_transition_of_many(kind):
    """Composed transitions and states of two halves of a chain give what the whole chain gives."""
    states, transition, _, initial = problem(kind, 1, 1, 4, 5)
    sources = torch.tensor([[1, 2, -1, 4], [-1, -1, 5, 3], [-1, -1, -1, -1]], dtype=torch.int32)
    ends = SimpleNamespace(
        sources=torch.nn.functional.pad(sources, (0, 1), value=-1),
        targets=torch.tensor([[-1, -1, -1, -1, n] for n in range(3)], dtype=torch.int32),
        initial=torch.full((3,), -1, dtype=torch.int32),
        num_out=3,
    )
    passed, composed = summarize(states, transition, ends)
    ends.initial = torch.zeros(3, dtype=torch.int32)
    whole = fold_chains(states, transition, ends, initial)
    torch.testing.assert_close(step(passed, composed, initial[:1].expand(3, -1, -1, -1)), whole, rtol=0, atol=1e-12)
    for n in range(3):
        one = None if composed is None else composed[n, 1:]
        torch.testing.assert_close(step(passed[n, 1:, :, :2], one, initial[0, 1:, :, :2]), whole[n, 1:, :, :2])
        assert step(passed[n], one, None) is passed[n] or torch.equal(step(passed[n], one, None), passed[n])


def check_twins(fold_fused, summarize_fused, kind, device, shapes):
    """The fused kernels in fp32 equal the plain forms in fp64."""
    for num_chains, length, keys, values in shapes:
        states, transition, chains, initial = problem(kind, num_chains, length, keys, values, seed=length)
        expected = fold_chains_naive(states, transition, chains, initial)
        single = [None if x is None else x.float().to(device) for x in (states, transition, initial)]
        if kind.startswith("transposed"):
            single[1] = single[1].mT.contiguous().mT
        wide = torch.cat([single[0].flatten(1), single[0].flatten(1)], dim=1)  # rows of a gathered table lie apart
        single[0] = wide[:, : single[0][0].numel()].unflatten(1, states.shape[1:])
        moved = SimpleNamespace(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in vars(chains).items()})
        actual = fold_fused(single[0], single[1], moved, single[2]).cpu().double()
        assert error(named(chains, actual), named(chains, expected)) < 5e-6, (num_chains, length, keys, values)
        if transition is not None:
            actual, composed = (x.cpu().double() for x in summarize_fused(single[0], single[1], moved))
            expected = fold_chains_naive(states, transition, chains)
            assert error(named(chains, actual), named(chains, expected)) < 5e-6, (num_chains, length, keys, values)
            assert error(composed, compose(transition, chains.sources)) < 5e-6, (num_chains, length, keys, values)
        if kind == "none":  # what is rounded is added up in fp32
            rounded = states.bfloat16()
            expected = fold_chains_naive(rounded.double(), None, chains, initial)
            for fold, where in ((fold_fused, device), (fold_chains_naive, "cpu")):
                actual = fold(
                    rounded.to(where), None, moved if fold is fold_fused else chains, initial.float().to(where)
                )
                assert actual.dtype == torch.float32
                assert error(named(chains, actual.cpu().double()), named(chains, expected)) < 5e-6
        if kind.endswith("matrix"):
            start = initial[:, :, :, :keys] if values >= keys else initial[..., :1].expand(-1, -1, -1, keys)
            start = start.contiguous()
            expected = fold_chains_naive(None, transition, chains, start)
            actual = fold_fused(None, single[1], moved, start.float().to(device)).cpu().double()
            assert error(named(chains, actual), named(chains, expected)) < 5e-6, (num_chains, length, keys, values)


def check_parts(fold, device):
    """A state in parts, of which those that are not named hold NaN, is their sum."""
    generator = torch.Generator().manual_seed(1)
    for kind, length in (("none", 3), ("scalar", 19), ("vector", 2)):
        states, transition, chains, initial = problem(kind, 3, length, 5, 7)
        parts = torch.randint(1, 4, (ROWS, HEADS), generator=generator, dtype=torch.int32)
        divided = torch.randn(ROWS, 3, *states.shape[1:], generator=generator, dtype=torch.float64)
        used = torch.arange(3)[None, :, None] < parts[:, None]
        divided = torch.where(used[..., None, None], divided, torch.nan)
        expected = fold_loop(divided.nan_to_num(0).sum(1), transition, chains, initial)
        moved = SimpleNamespace(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in vars(chains).items()})
        tables = None if transition is None else transition.float().to(device)
        found = fold(divided.float().to(device), tables, moved, initial.float().to(device), parts.to(device))
        assert error(named(chains, found.cpu().double()), named(chains, expected)) < 5e-6, (kind, length)


def test_states_in_parts():
    check_parts(fold_chains, "cpu")


def test_states_in_parts_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    from longspan.kernels.fold_triton import fold_chains_triton

    check_parts(lambda *arguments: fold_chains_triton(*arguments)[0], "cpu")


@pytest.mark.gpu
def test_states_in_parts_on_a_gpu():
    check_parts(fold_chains, "cuda")


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_fused_in_the_interpreter(kind):
    pytest.importorskip("triton", reason="Triton is not installed")
    from longspan.kernels.fold_triton import fold_chains_triton

    def fold(*arguments):
        return fold_chains_triton(*arguments)[0]

    fused = partial(fold_chains_triton, compose=True)
    check_twins(fold, fused, kind, "cpu", [(3, 4, 5, 7), (2, 3, 40, 33), (1, 1, 64, 20), (0, 2, 4, 4), (2, 19, 4, 4)])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TRANSITIONS)
def test_fused_on_a_gpu(kind):
    shapes = [(5, 9, 16, 16), (1, 33, 64, 64), (7, 6, 128, 128), (2, 17, 128, 129), (3, 8, 192, 100), (2, 9, 256, 256)]
    check_twins(fold_chains, summarize, kind, "cuda", [*shapes, (300, 3, 32, 48)])
