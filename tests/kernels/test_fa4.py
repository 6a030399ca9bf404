"""How FlashAttention-4 is called, with a stand-in that runs on CPUs; its results are in test_softmax_backends."""

import pytest
import torch
from softmax_cases import CPU_CASES, Case, make_inputs, reference, relative_errors, run, square

from longspan.kernels.softmax import Pack, fa4
from longspan.kernels.softmax import math as math_backend


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
