"""cuDNN's attention over packed documents: tables, copies and plans, with a stand-in on CPUs and on a GPU."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from fake_cudnn import FakeCudnn
from softmax_cases import (
    CPU_CASES,
    Case,
    assert_as_good_as_sdpa,
    gpu_backend,
    make_inputs,
    reference,
    relative_errors,
    run,
    square,
)

from longspan.kernels.softmax import choose, cudnn_ragged, fa4


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


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("head_dim", [8, 40, 96, 192, 256])
    def test_head_dims(self, head_dim):
        backend, case = gpu_backend("cudnn_ragged", torch.float16, head_dim), square("", (130, 7, 64), (4, 2), head_dim)
        inputs = make_inputs(case, torch.float16, "cuda")
        assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)

    def test_compiles_for_rounded_sizes(self):
        backend = gpu_backend("cudnn_ragged", torch.bfloat16, 128)
        graphs = set()
        for lengths in ((200, 100, 20), (129, 128, 30, 5), (256, 1, 1, 1)):
            case = square("", lengths, (8, 2), 128)
            inputs = make_inputs(case, torch.bfloat16, "cuda")
            assert_as_good_as_sdpa(run(backend, case.pack, *inputs, 0.1), case, inputs, 0.1)
            graphs.add(cudnn_ragged._compile.cache_info().currsize)
        assert len(graphs) == 1

    def test_writes_nothing_but_its_rows(self):
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
