"""Every softmax back end against the full masked matrix in fp64, forward and backward, whole and merged from parts."""

import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fake_cudnn import FakeCudnn
from oracles import softmax_attention as full_matrix
from oracles import with_gradients

from longspan.attention import softmax
from longspan.kernels.merge import merge
from longspan.kernels.softmax import BACKENDS, Pack, choose, cudnn_ragged, fa4
from longspan.kernels.softmax import math as math_backend
from longspan.kernels.softmax.naive import softmax_attention_naive


@dataclass(frozen=True)
class Case:
    id: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    causal: bool
    heads: tuple[int, int]  # query heads, key heads
    head_dim: int

    @property
    def pack(self) -> Pack:
        return Pack(offsets(self.lengths_q), offsets(self.lengths_k), self.causal)


def offsets(lengths):
    return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))


def square(id, lengths, heads, head_dim):
    return Case(id, lengths, lengths, True, heads, head_dim)


CPU_CASES = (
    square("causal", (37,), (3, 3), 16),
    square("causal-packed-gqa", (1, 2, 13, 64, 7), (4, 2), 8),
    Case("full-rectangular", (33,), (70,), False, (3, 1), 5),
    Case("full-packed-gqa", (5, 1, 17), (9, 3, 1), False, (6, 2), 24),
)
GPU_CASES = (
    square("causal", (1000,), (4, 4), 128),
    square("causal-gqa", (2048,), (8, 2), 64),
    square("causal-packed", (1, 2, 129, 700, 64), (4, 4), 128),
    square("causal-packed-gqa", (513, 1, 31), (8, 2), 128),
    Case("full-rectangular", (384,), (1111,), False, (4, 4), 128),
    Case("full-packed-gqa", (5, 300, 1, 17), (900, 128, 33, 1), False, (8, 2), 64),
    Case("one-query-each-gqa", (1, 1, 1), (40, 1, 7), False, (8, 2), 64),
    square("causal-batch-gqa", (384, 384, 384), (8, 2), 128),
)
GPU_BACKENDS = ("fa4", "cudnn_ragged", "cudnn", "flash", "math")


def make_inputs(case, dtype, device="cpu", seed=0):
    """q, k, v, dout; q, k and v are strided parts of one tensor, as after a fused projection."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), dim = case.heads, case.head_dim
    num_q, num_k = sum(case.lengths_q), sum(case.lengths_k)
    fused = torch.randn(max(num_q, num_k), num_heads + 2 * num_kv_heads, dim, generator=generator, dtype=torch.float64)
    dout = torch.randn(num_q, num_heads, dim, generator=generator, dtype=torch.float64).to(device, dtype)
    q, k, v = fused.to(device, dtype).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return q[:num_q], k[:num_k], v[:num_k], dout


def reference(case, q, k, v, dout, scale):
    """out, lse, dq, dk, dv of the definition, in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = softmax_attention_naive(q, k, v, case.pack, scale)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.double()))


def relative_errors(actual, expected):
    assert all(x.shape == y.shape for x, y in zip(actual, expected, strict=True))
    return [((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in zip(actual, expected, strict=True)]


def run(backend, pack, q, k, v, dout, scale):
    out, lse = backend.forward(q, k, v, pack, scale)
    assert out.dtype == q.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    return (out, lse, *backend.backward(dout, q, k, v, out, lse, pack, scale))


def in_two_halves(case):
    """One sequence in two calls, as ring steps are: half of the keys each."""
    length_q, length_k = sum(case.lengths_q), sum(case.lengths_k)
    half = length_k // 2
    if case.causal:  # both diagonal squares in one call, the square below the diagonal in the other
        early = (slice(0, half), slice(half, length_k))
        return [
            (slice(0, length_q), slice(0, length_k), Pack((0, half, length_q), (0, half, length_k), True)),
            (early[1], early[0], Pack((0, length_q - half), (0, half), False)),
        ]
    return [
        (slice(0, length_q), slice(0, half), Pack((0, length_q), (0, half), False)),
        (slice(0, length_q), slice(half, length_k), Pack((0, length_q), (0, length_k - half), False)),
    ]


def in_a_window(length, window, device):
    """One sequence in two calls: blocks as long as the window, then what each sees of the one before, turned around."""
    starts = range(0, length, window)
    assert length % window == 0
    turned = torch.cat([torch.arange(start + window - 2, start - 1, -1) for start in starts[1:]]).to(device)
    blocks, triangles = offsets([window] * len(starts)), offsets([window - 1] * (len(starts) - 1))
    return [
        (slice(0, length), slice(0, length), Pack(blocks, blocks, True)),
        (turned, turned - window + 1, Pack(triangles, triangles, True)),
    ]


def run_in_calls(backend, calls, q, k, v, dout, scale):
    """(query rows, key rows, pack) of each call; (out, lse) merged, gradients summed."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_acc = torch.full(q.shape, float("nan"), dtype=dtype, device=q.device)
    lse_acc = torch.full(q.shape[:2], float("-inf"), dtype=dtype, device=q.device)
    for rows_q, rows_k, pack in calls:
        merge(out_acc, lse_acc, *backend.forward(q[rows_q], k[rows_k], v[rows_k], pack, scale), rows_q)
    out = out_acc.to(q.dtype)
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
    for rows_q, rows_k, pack in calls:
        parts = backend.backward(
            dout[rows_q], q[rows_q], k[rows_k], v[rows_k], out[rows_q], lse_acc[rows_q], pack, scale
        )
        for gradient, rows, part in zip(gradients, (rows_q, rows_k, rows_k), parts, strict=True):
            gradient[rows] += part
    return out, lse_acc, *gradients


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


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class FakeFA4:
    """The two functions of FlashAttention-4, on CPUs in fp64: [B, S, H, D] and LSE [B, H, S], packed [T, H, D] and
    [H, T]."""

    def __init__(self):
        self.options = []

    def pack(self, q, k, causal, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
        if q.ndim == 4:
            assert cu_seqlens_q is None
            cu_q, cu_k = (tuple(range(0, len(x) * x.shape[1] + 1, x.shape[1])) for x in (q, k))
            return Pack(cu_q, cu_k, causal)
        pack = Pack(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()), causal)
        assert (max_seqlen_q, max_seqlen_k) == (pack.max_q, pack.max_k)
        return pack

    def forward(self, q, k, v, softmax_scale, causal, return_lse, **lengths):
        assert return_lse
        pack, rows = self.pack(q, k, causal, **lengths), [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
        out, lse = math_backend.forward(*rows, pack, softmax_scale)
        return out.view(q.shape), lse.t() if q.ndim == 3 else lse.unflatten(0, q.shape[:2]).transpose(1, 2), None

    def backward(self, q, k, v, out, dout, lse, softmax_scale, causal, deterministic, **lengths):
        self.options.append(deterministic)
        assert lse.is_contiguous()
        pack = self.pack(q, k, causal, **lengths)
        lse = lse.t() if q.ndim == 3 else lse.transpose(1, 2).flatten(0, 1)
        rows = [x.reshape(-1, *x.shape[-2:]) for x in (dout, q, k, v, out)]
        gradients = math_backend.backward(*rows, lse, pack, softmax_scale)
        return tuple(x.view(like.shape) for x, like in zip(gradients, (q, k, v)))


@pytest.fixture
def fake_fa4(monkeypatch):
    fake = FakeFA4()
    monkeypatch.setattr(fa4, "_load", lambda: ((fake.forward, fake.backward), None))
    return fake


EQUAL = (square("causal-batch-gqa", (7, 7, 7), (4, 2), 8), Case("full-batch", (5, 5), (9, 9), False, (2, 2), 8))


@pytest.mark.parametrize("case", (*CPU_CASES, *EQUAL), ids=lambda case: case.id)
def test_fa4_is_called_with_batches_and_packs(fake_fa4, case):
    inputs = make_inputs(case, torch.float64)
    errors = relative_errors(run(fa4, case.pack, *inputs, 0.3), reference(case, *inputs, 0.3))
    assert all(error <= 1e-10 for error in errors), errors


@pytest.mark.parametrize("case", (CPU_CASES[1], *EQUAL), ids=lambda case: case.id)
def test_fa4_follows_the_switch_for_deterministic_algorithms(fake_fa4, case, request):
    run(fa4, case.pack, *make_inputs(case, torch.float64), 0.3)
    request.getfixturevalue("deterministic")
    run(fa4, case.pack, *make_inputs(case, torch.float64), 0.3)
    assert fake_fa4.options == [False, True]


@pytest.fixture
def fake_cudnn(monkeypatch):
    fake = FakeCudnn()
    monkeypatch.setattr(cudnn_ragged, "_load", lambda: (fake, None))
    monkeypatch.setattr(cudnn_ragged, "_handle", lambda device: "handle")
    cudnn_ragged._compile.cache_clear()
    yield fake
    cudnn_ragged._compile.cache_clear()


RAGGED = (
    CPU_CASES[0],  # one sequence
    CPU_CASES[1],
    CPU_CASES[3],
    square("causal-long", (1, 150, 7), (2, 2), 16),
    square("one-row", (1,), (4, 2), 8),
    Case("one-query-each-gqa", (1, 1, 1), (40, 1, 7), False, (8, 2), 64),
    Case("many", (3,) * 5, (9, 1, 200, 7, 30), False, (6, 2), 16),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.id)
def test_ragged_tables_describe_every_sequence(fake_cudnn, case, dtype):
    inputs = make_inputs(case, dtype)
    errors = relative_errors(run(cudnn_ragged, case.pack, *inputs, 0.1), reference(case, *inputs, 0.1))
    assert all(error <= 1e-2 for error in errors), errors


def test_ragged_copies_what_the_copy_engine_cannot_read(fake_cudnn):
    case = square("", (9, 4), (2, 2), 8)
    q, k, v, dout = make_inputs(case, torch.bfloat16)
    for inputs in (
        (
            q[..., None].repeat(1, 1, 1, 8)[..., 0],  # no unit stride in D
            torch.cat([k, k], dim=-1)[..., 4:12],  # 8 bytes off
            v[:, :1].expand(-1, 2, -1),  # one head for all
            dout.transpose(0, 1).contiguous().transpose(0, 1),
        ),
        (torch.cat([q, q], dim=-1)[..., 8:], k.transpose(0, 1).contiguous().transpose(0, 1), v, dout),  # as they are
    ):
        errors = relative_errors(run(cudnn_ragged, case.pack, *inputs, 0.3), reference(case, *inputs, 0.3))
        assert all(error <= 1e-2 for error in errors), errors
    assert fake_cudnn.graphs[2].operands["q"].stride[1:] == [16, 32, 1]
    assert fake_cudnn.graphs[2].operands["k"].stride[1:] == [13 * 8, 8, 1]


def test_ragged_compiles_for_rounded_sizes(fake_cudnn):
    """Two graphs, forward and backward, for all lengths that round up to the same sizes; others have their own."""

    def attend(*lengths, scale=0.1):
        case = square("", lengths, (4, 2), 8)
        run(cudnn_ragged, case.pack, *make_inputs(case, torch.bfloat16), scale)
        return len(fake_cudnn.graphs)

    assert attend(200, 100, 20) == attend(129, 128, 30, 5) == attend(256, 1, 1, 1) == 2
    assert [graph.operands["q"].dim for graph in fake_cudnn.graphs] == [[4, 4, 256, 8]] * 2
    assert attend(257, 1, 1) == 4 and attend(200, 100) == 6 and attend(200, 100, 100) == 7  # room of another backward
    assert attend(200, 100, 20, scale=0.2) == 9


@pytest.mark.parametrize("bits, expected", [(1, [1, 2, 4, 4, 8, 64, 128]), (3, [1, 2, 3, 4, 5, 40, 80])])
def test_sizes_of_plans(bits, expected):
    assert [cudnn_ragged._round_up(count, bits) for count in (1, 2, 3, 4, 5, 33, 65)] == expected
    for count in range(1, 1000):
        assert count <= cudnn_ragged._round_up(count, bits) < count * (1 + 2 ** (1 - bits))


@pytest.mark.parametrize(
    "capability, dtype, head_dim, message",
    [
        ((8, 0), torch.bfloat16, 128, "needs a Hopper or Blackwell"),
        ((9, 0), torch.float32, 128, "takes bfloat16 and float16"),
        ((9, 0), torch.bfloat16, 264, "head dims up to 256"),
        ((10, 0), torch.bfloat16, 136, "head dims up to 128"),
        ((9, 0), torch.float16, 20, "multiples of 8, not 20"),
    ],
)
def test_ragged_says_what_it_cannot(fake_cudnn, monkeypatch, capability, dtype, head_dim, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ValueError, match=f"backend=cudnn_ragged cannot serve.*{message}"):
        choose("cudnn_ragged", "cuda", dtype, head_dim)


def test_ragged_comes_after_fa4_where_it_is_installed(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(fa4, "_load", lambda: ("functions", None))
    monkeypatch.setattr(cudnn_ragged, "_load", lambda: ("package", None))
    assert choose("auto", "cuda", torch.bfloat16, 128)[0].name == "fa4"
    monkeypatch.setattr(fa4, "_load", lambda: (None, "absent"))
    backend, refusals = choose("auto", "cuda", torch.bfloat16, 128)
    assert backend.name == "cudnn_ragged" and refusals == ("fa4: absent",)
    request.getfixturevalue("deterministic")
    backend, refusals = choose("auto", "cuda", torch.bfloat16, 128)
    assert backend.name == "flash" and "cudnn_ragged: a deterministic backward" in refusals[1]


@pytest.mark.parametrize(
    "module, message",
    [
        (None, "pip install nvidia-cudnn-frontend=="),
        (SimpleNamespace(), "does not load: .*backend_version"),  # another module of that name
        (SimpleNamespace(backend_version=lambda: 91001), "needs cuDNN 91002 or later, this is 91001"),
    ],
)
def test_ragged_says_what_is_missing(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "cudnn", module)
    package, reason = cudnn_ragged._load.__wrapped__()
    assert package is None and re.search(message, reason)


def test_ragged_loads(monkeypatch):
    package = SimpleNamespace(backend_version=lambda: 91900)
    monkeypatch.setitem(sys.modules, "cudnn", package)
    assert cudnn_ragged._load.__wrapped__() == (package, None)


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


@pytest.mark.parametrize(
    "arguments", [((0, 3), (0, 4), True), ((0, 3, 3), (0, 1, 2), False), ((1, 3), (0, 2), False), ((0,), (0,), False)]
)
def test_pack_is_validated(arguments):
    with pytest.raises(AssertionError):
        Pack(*arguments)


def test_pack_copies_offsets_once():
    pack = Pack((0, 3, 5), (0, 4, 9), False)
    assert (pack.num_sequences, pack.max_q, pack.max_k) == (2, 3, 5)
    assert pack.cu_k_tensor("cpu") is pack.cu_k_tensor(torch.device("cpu"))
    assert pack.cu_q_tensor("cpu").tolist() == [0, 3, 5] and pack.cu_q_tensor("cpu").dtype == torch.int32
    assert pack == Pack((0, 3, 5), (0, 4, 9), False)


def test_pack_fills_tables_with_empty_sequences():
    pack = Pack((0, 3, 5, 6), (0, 4, 9, 10), False)
    offsets, lengths = pack.offsets_tensor("k", 24, 4, "cpu"), pack.lengths_tensor("q", 4, "cpu")
    assert offsets.tolist() == [0, 96, 216, 240, 240] and offsets.dtype == torch.int64
    assert lengths.tolist() == [3, 2, 1, 0] and lengths.dtype == torch.int32
    assert offsets is pack.offsets_tensor("k", 24, 4, torch.device("cpu"))
    assert pack.offsets_tensor("k", 1 << 30, 4, "cpu").tolist()[-1] == 10 << 30


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
def test_torch_operators_take_our_arguments(name, case):
    """On meta tensors: operator schemas, shapes and layouts hold on this release of PyTorch, no GPU needed."""
    q, k, v, dout = make_inputs(case, torch.bfloat16, "meta")
    out, lse, dq, dk, dv = run(BACKENDS[name], case.pack, q, k, v, dout, 0.1)
    assert [x.shape for x in (out, dq, dk, dv)] == [q.shape, q.shape, k.shape, v.shape] and lse.shape == q.shape[:2]


def gpu_backend(name, dtype, head_dim):
    backend = BACKENDS[name]
    reason = backend.refusal("cuda", dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend


def torch_sdpa(case, q, k, v, dout, scale):
    """out, dq, dk, dv of torch's own attention in the dtype of the inputs, one sequence at a time."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q[rows_q], k[rows_k], v[rows_k])),
                is_causal=case.causal,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for rows_q, rows_k in case.pack.sequences()
        ]
    )
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def assert_as_good_as_sdpa(actual, case, inputs, scale):
    expected = reference(case, *inputs, scale)
    errors = relative_errors(actual, expected)
    assert all(error <= 1e-2 for error in errors), errors
    out, _, *gradients = expected
    of_sdpa = relative_errors(torch_sdpa(case, *inputs, scale), (out, *gradients))
    for error, error_of_sdpa in zip((errors[0], *errors[2:]), of_sdpa, strict=True):
        assert error <= 1.5 * error_of_sdpa + 1e-4, (errors, of_sdpa)


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
    @pytest.mark.parametrize("name", GPU_BACKENDS)
    def test_backend_equals_definition(self, name, case):
        backend = gpu_backend(name, torch.bfloat16, case.head_dim)
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

    @pytest.mark.parametrize("head_dim", [8, 40, 96, 192, 256])
    def test_ragged_head_dims(self, head_dim):
        backend, case = gpu_backend("cudnn_ragged", torch.float16, head_dim), square("", (130, 7, 64), (4, 2), head_dim)
        inputs = make_inputs(case, torch.float16, "cuda")
        assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)

    def test_ragged_compiles_for_rounded_sizes(self):
        backend = gpu_backend("cudnn_ragged", torch.bfloat16, 128)
        graphs = set()
        for lengths in ((200, 100, 20), (129, 128, 30, 5), (256, 1, 1, 1)):
            case = square("", lengths, (8, 2), 128)
            inputs = make_inputs(case, torch.bfloat16, "cuda")
            assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)
            graphs.add(cudnn_ragged._compile.cache_info().currsize)
        assert len(graphs) == 1

    def test_ragged_writes_nothing_but_its_rows(self):
        """Sequences that fill the batch up start where the rows end."""
        gpu_backend("cudnn_ragged", torch.bfloat16, 128)
        case = square("", (130, 1, 64, 7, 3), (8, 2), 128)
        q, k, v, dout = make_inputs(case, torch.bfloat16, "cuda")
        memory = [torch.full((2 * len(x), *x.shape[1:]), 7.0, device="cuda", dtype=x.dtype) for x in (q, q, k, v)]
        lse_memory = torch.full((2 * len(q), 8, 1), 7.0, device="cuda")
        out, dq, dk, dv, lse = (x[: len(q)] for x in (*memory, lse_memory))
        cudnn_ragged._run(
            "sdpa", {"q": q, "k": k, "v": v}, {"o": out, "stats": lse}, case.pack, 0.1, generate_stats=True
        )
        inputs = {"q": q.contiguous(), "k": k, "v": v, "o": out, "dO": dout, "stats": lse}
        room = {"max_total_seq_len_q": len(q), "max_total_seq_len_kv": len(k)}
        cudnn_ragged._run("sdpa_backward", inputs, {"dQ": dq, "dK": dk, "dV": dv}, case.pack, 0.1, **room)
        assert all((x[len(q) :] == 7).all() for x in (*memory, lse_memory))
        assert not any((x[: len(q)] == 7).all(-1).any() for x in memory)

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
