"""Every softmax back end against the full masked matrix in fp64, forward and backward, whole and merged from parts."""

import pytest
import torch
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from softmax_cases import (
    CPU_CASES,
    GPU_CASES,
    assert_as_good_as_sdpa,
    gpu_backend,
    in_a_window,
    in_two_halves,
    make_inputs,
    reference,
    relative_errors,
    run,
    run_in_calls,
    square,
)

from longspan.attention import softmax
from longspan.kernels.softmax import BACKENDS, choose, cudnn_ragged, fa4
from longspan.kernels.softmax import math as math_backend

GPU_BACKENDS = ("fa4", "cudnn_ragged", "cudnn", "flash", "math")
HEAD_DIMS = (8, 80, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (24, 40, 72, 96, 104, 112, 144, 192, 256)))


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", ["cpu", "math"])
def test_cpu_backend_equals_definition(name, case, dtype, bound):
    inputs = make_inputs(case, dtype)
    errors = relative_errors(run(BACKENDS[name], case.pack, *inputs, 0.3), reference(case, *inputs, 0.3))
    assert all(error <= bound for error in errors), errors


@pytest.mark.parametrize("case", [CPU_CASES[0], CPU_CASES[2]], ids=lambda case: case.id)
@pytest.mark.parametrize("name", ["cpu", "math"])
def test_halves_merge_to_the_whole(name, case):
    inputs = make_inputs(case, torch.float64)
    errors = relative_errors(
        run_in_calls(BACKENDS[name], in_two_halves(case), *inputs, 0.3), reference(case, *inputs, 0.3)
    )
    assert all(error <= 1e-10 for error in errors), errors


def window_errors(backend, length, window, heads, head_dim, dtype, device):
    """Of out and gradients, against the full masked matrix in fp64."""
    inputs = make_inputs(square("", (length,), heads, head_dim), dtype, device)
    out, _, *gradients = run_in_calls(backend, in_a_window(length, window, device), *inputs, 0.1)
    *differentiable, dout = (x.cpu() for x in inputs)
    expected = with_gradients(full_matrix, dict(zip("qkv", differentiable)), dout, [length], window=window, scale=0.1)
    return relative_errors([x.cpu() for x in (out, *gradients)], [*expected.values()])


@pytest.mark.parametrize("name", ["cpu", "math"])
def test_a_window_is_two_causal_calls(name):
    errors = window_errors(BACKENDS[name], 60, 12, (4, 2), 8, torch.float64, "cpu")
    assert all(error <= 1e-10 for error in errors), errors


def test_math_is_the_same_in_small_blocks(monkeypatch):
    case = CPU_CASES[1]
    inputs = make_inputs(case, torch.float64)
    monkeypatch.setattr(math_backend, "_BLOCK_ELEMENTS", 4 * 64 * 3)
    errors = relative_errors(run(math_backend, case.pack, *inputs, 0.3), reference(case, *inputs, 0.3))
    assert all(error <= 1e-10 for error in errors), errors


@pytest.mark.parametrize(
    "dtype, name", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "math")], ids=str
)
def test_choice_on_cpu(dtype, name):
    backend, refusals = choose("auto", "cpu", dtype, 64)
    assert backend.name == name
    assert [refusal.split(":")[0] for refusal in refusals] == (["cpu"] if name == "math" else [])  # not those for GPUs


@pytest.mark.parametrize(
    "name, message",
    [("flash", "backend=flash cannot serve.*flash: runs on cuda, not on cpu.*backend=auto"), ("fa5", "use auto, fa4")],
)
def test_choice_refuses(name, message):
    with pytest.raises(ValueError, match=message):
        choose(name, "cpu", torch.float32, 64)


def test_cudnn_refuses_where_results_must_repeat(monkeypatch, request):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for optional in (fa4, cudnn_ragged):
        monkeypatch.setattr(optional, "_load", lambda: (None, "absent"))
    assert choose("auto", "cuda", torch.bfloat16, 128)[0].name == "cudnn"
    assert softmax._backend("auto", "cuda", torch.bfloat16, 128, False).name == "cudnn"
    request.getfixturevalue("deterministic")
    assert softmax._backend("auto", "cuda", torch.bfloat16, 128, True).name == "flash"
    with pytest.raises(ValueError, match="backend=cudnn cannot serve.*its backward is not deterministic"):
        choose("cudnn", "cuda", torch.bfloat16, 128)
    softmax._backend.cache_clear()


def test_fa4_is_not_given_heads_whose_gradients_it_gets_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(fa4, "_load", lambda: (None, None))
    taken = [dim for dim in range(8, 265, 8) if fa4.limits(torch.bfloat16, dim, (9, 0)) is None]
    assert taken == [24, 32, 56, 64, 88, 96, *range(120, 257, 8)]
    backend, (refusal, *_) = choose("auto", "cuda", torch.bfloat16, 80)
    assert backend.name != "fa4" and "gradients wrong for heads of 80" in refusal


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
def test_torch_operators_take_our_arguments(name, case):
    """On meta tensors: operator schemas, shapes and layouts hold on this release of PyTorch, no GPU needed."""
    q, k, v, dout = make_inputs(case, torch.bfloat16, "meta")
    out, lse, dq, dk, dv = run(BACKENDS[name], case.pack, q, k, v, dout, 0.1)
    assert [x.shape for x in (out, dq, dk, dv)] == [q.shape, q.shape, k.shape, v.shape] and lse.shape == q.shape[:2]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
    @pytest.mark.parametrize("name", GPU_BACKENDS)
    def test_backend_equals_definition(self, name, case):
        backend = gpu_backend(name, torch.bfloat16, case.head_dim)
        inputs = make_inputs(case, torch.bfloat16, "cuda")
        assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("name", GPU_BACKENDS)
    def test_heads_of_all_sizes(self, name, packed, head_dim):
        backend = gpu_backend(name, torch.bfloat16, head_dim)
        case = square("", (100, 231) if packed else (331,), (8, 4), head_dim)
        inputs = make_inputs(case, torch.bfloat16, "cuda")
        assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)

    @pytest.mark.parametrize("case", [GPU_CASES[0], GPU_CASES[1], GPU_CASES[4]], ids=lambda case: case.id)
    @pytest.mark.parametrize("name", GPU_BACKENDS)
    def test_halves_merge_to_the_whole(self, name, case):
        backend = gpu_backend(name, torch.bfloat16, case.head_dim)
        inputs = make_inputs(case, torch.bfloat16, "cuda")
        assert_as_good_as_sdpa(run_in_calls(backend, in_two_halves(case), *inputs, 0.1), case, inputs, 0.1)

    @pytest.mark.parametrize("length, window", [(2048, 256), (1024, 64), (768, 2)])
    @pytest.mark.parametrize("name", GPU_BACKENDS)
    def test_a_window_is_two_causal_calls(self, name, length, window):
        backend = gpu_backend(name, torch.bfloat16, 128)
        errors = window_errors(backend, length, window, (8, 2), 128, torch.bfloat16, "cuda")
        assert all(error <= 1e-2 for error in errors), errors

    @pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
    @pytest.mark.parametrize("name", ("fa4", "flash"))
    def test_repeats_bit_for_bit_where_asked(self, deterministic, name, case):
        backend, inputs = gpu_backend(name, torch.bfloat16, case.head_dim), make_inputs(case, torch.bfloat16, "cuda")
        found = [run(backend, case.pack, *inputs, 0.1) for _ in range(5)]
        assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(again, found[0], strict=True))

    def test_math_serves_double(self):
        inputs = make_inputs(GPU_CASES[3], torch.float64, "cuda")
        errors = relative_errors(
            run(BACKENDS["math"], GPU_CASES[3].pack, *inputs, 0.1), reference(GPU_CASES[3], *inputs, 0.1)
        )
        assert all(error <= 1e-10 for error in errors), errors

    def test_choice_names_what_is_missing(self):
        backend, refusals = choose("auto", "cuda", torch.bfloat16, 128)
        assert backend.name in GPU_BACKENDS[:-1] and len(refusals) == list(BACKENDS).index(backend.name)
        assert choose("auto", "cuda", torch.float32, 128)[0].name == "math"
