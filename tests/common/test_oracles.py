"""The oracles against a second derivation, and the NaN filling: tests that rest on them are worth what these are."""

import types

import pytest
import torch
from oracles import linear_attention, softmax_attention

LENGTHS = (7, 1, 12)


def visible(causal):
    blocks = [torch.ones(n, n).tril() if causal else torch.ones(n, n) for n in LENGTHS]
    return torch.block_diag(*blocks).double()


def normal(*shape):
    return torch.randn(sum(LENGTHS), *shape, dtype=torch.float64)


@pytest.mark.parametrize("decay", ["none", "fixed", "scalar", "full"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_recurrence_is_a_decayed_score_matrix(decay, normalize):
    q, k, v = normal(2, 4).abs(), normal(2, 4).abs(), normal(2, 3)
    log_decay = {"fixed": -torch.rand(2).double(), "scalar": -normal(2).abs()}.get(decay)
    causal = decay != "full"
    scores = 0.5 * torch.einsum("thk,shk->hts", q, k) * visible(causal)
    if log_decay is not None:  # From the write at s to the read at t lie the decays of s+1 to t.
        total = log_decay.expand(sum(LENGTHS), 2).cumsum(0)
        scores = scores * (total[:, None] - total[None, :]).permute(2, 0, 1).clamp(max=0).exp()
    if normalize:
        scores = scores / scores.sum(-1, keepdim=True)
    expected = torch.einsum("hts,shv->thv", scores, v)
    found = linear_attention(q, k, v, LENGTHS, log_decay=log_decay, causal=causal, normalize=normalize)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_full_matrix_is_torch_s_attention(causal):
    q, k, v = normal(4, 8), normal(2, 8), normal(2, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=visible(causal).bool(), enable_gqa=True
    )
    found = softmax_attention(q, k, v, LENGTHS, causal=causal)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def allocate(module_name, allocation):
    """What code of a module of this name gets from an expression with `torch` and `x` in it."""
    module = types.ModuleType(module_name)
    module.torch, module.x = torch, torch.zeros(3)
    return eval(allocation, vars(module))


@pytest.mark.parametrize(
    "allocation", ["torch.empty(3)", "torch.empty_like(x)", "x.new_empty(3)", "torch.empty_strided((3,), (1,))"]
)
def test_scratch_memory_of_longspan_code_is_nan(allocation):
    assert allocate("longspan.attention.invented", allocation).isnan().all()


def test_integer_scratch_memory_holds_no_usable_index():
    assert (allocate("longspan.attention.invented", "torch.empty(3, dtype=torch.int64)") > 10**12).all()
