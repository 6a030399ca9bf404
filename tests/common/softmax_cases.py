"""Calls of softmax back ends that tests go through, the definition in fp64, and how calls of parts are merged."""

from dataclasses import dataclass

import pytest
import torch

from longspan.kernels.merge import merge
from longspan.kernels.softmax import BACKENDS, Pack, refusal
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


def gpu_backend(name, dtype, head_dim):
    backend = BACKENDS[name]
    reason = refusal(backend, "cuda", dtype, head_dim)
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
