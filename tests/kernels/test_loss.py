"""chunked_cross_entropy against torch's cross_entropy on whole logits: value and both gradients."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted
from torch.utils._python_dispatch import TorchDispatchMode

import longspan.kernels.loss as loss_module
from longspan.kernels.loss import (
    chunked_cross_entropy,
    label_scores,
    label_scores_naive,
    logits_gradient,
    logits_gradient_naive,
)

VOCABULARY, HIDDEN = 11, 6


def make_inputs(num_tokens, dtype=torch.float64, ignored=()):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    labels[list(ignored)] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def whole(hidden, weight, labels):
    """The definition, in fp64 on the values that `hidden` and `weight` have."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("ignored", [(), (0, 5, 12), range(13)], ids=["labelled", "some_ignored", "all_ignored"])
def test_equals_cross_entropy(chunk, ignored):
    hidden, weight, labels = make_inputs(13, ignored=ignored)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk)
    (0.25 * loss).backward()
    wanted, d_hidden, d_weight = whole(hidden, weight, labels)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, 0.25 * d_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, 0.25 * d_weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_lower_precision(dtype, limit):
    """Loss in fp32 from inputs taken as they are; gradients in the inputs' dtype, within its rounding."""
    hidden, weight, labels = make_inputs(200, dtype, ignored=[7])
    loss = chunked_cross_entropy(hidden, weight, labels, 16)
    loss.backward()
    wanted, d_hidden, d_weight = whole(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - wanted) <= 1e-6 * wanted
    for grad, expected in ((hidden.grad, d_hidden), (weight.grad, d_weight)):
        assert grad.dtype == dtype
        assert (grad.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_on_the_gpu(dtype, limit):
    hidden, weight, labels = make_inputs(1000, dtype, ignored=[7])
    wanted, d_hidden, d_weight = whole(hidden, weight, labels)
    loss = chunked_cross_entropy(hidden.cuda(), weight.cuda(), labels.cuda(), 96)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - wanted) <= 1e-5 * wanted
    assert (hidden.grad.double() - d_hidden).norm() <= limit * d_hidden.norm()
    assert (weight.grad.double() - d_weight).norm() <= limit * d_weight.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [257, 32_000, 128_256])
def test_wide_vocabularies_on_the_gpu(vocabulary):
    logits, labels = torch.randn(300, vocabulary, device="cuda") * 10, torch.randint(vocabulary, (300,), device="cuda")
    labels[7] = -100
    scores = label_scores(logits, labels)
    found = logits_gradient(logits, scores[0], labels, torch.bfloat16)
    exact = label_scores_naive(logits.double(), labels)
    gradient = logits_gradient_naive(logits.double(), exact[0], labels, torch.float64)
    kept = labels != -100
    for a, b in zip(scores, exact):
        torch.testing.assert_close(a[kept].double(), b[kept], rtol=1e-6, atol=1e-5)
    assert found.dtype == torch.bfloat16 and (found.double() - gradient).norm() <= 4e-3 * gradient.norm()


class TestTriton:
    """In the interpreter, with several blocks of a row."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        loss_triton = interpreted("loss_triton", monkeypatch, BLOCK=8)
        self.scores, self.gradient = loss_triton.label_scores_triton, loss_triton.logits_gradient_triton

    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("vocabulary", [1, 7, 29, 32])
    def test_equals_cross_entropy(self, vocabulary, dtype, limit):
        logits = torch.randn(9, vocabulary) * 40  # where exp overflows if it may
        labels = torch.randint(vocabulary, (9,))
        labels[[2, 5]] = -100
        logits[2] = float("nan")  # what is ignored gives nothing
        lse, logit = self.scores(logits, labels)
        gradient, kept = self.gradient(logits, lse, labels, dtype), labels != -100
        exact = logits.double().nan_to_num().requires_grad_()
        expected = F.cross_entropy(exact, labels, reduction="none")
        torch.testing.assert_close((lse - logit)[kept].double(), expected[kept].detach(), rtol=1e-6, atol=1e-5)
        (expected,) = torch.autograd.grad(expected.sum(), exact)
        assert gradient.dtype == dtype and gradient.isfinite().all()
        assert (gradient.double() - expected).norm() <= limit * expected.norm()

    def test_what_is_no_label(self):
        logits, labels = torch.zeros(3, 11), torch.tensor([11, -1, 2])
        _, logit = self.scores(logits, labels)
        assert logit.isnan().tolist() == [True, True, False]

    def test_parts_of_a_vocabulary(self):
        """A token of another part adds nothing to the logit, and its column is not here."""
        logits, labels = torch.randn(3, 11), torch.tensor([-101, -100, 2])
        lse, logit = self.scores(logits, labels)
        assert logit[0] == 0 and logit[2] == logits[2, 2]
        exact = (logits - lse[:, None]).exp()
        exact[1], exact[2, 2] = 0, exact[2, 2] - 1
        for gradient in (self.gradient, logits_gradient_naive):
            torch.testing.assert_close(gradient(logits, lse, labels, torch.float32), exact)
        torch.testing.assert_close(label_scores_naive(logits, labels)[1][[0, 2]], logit[[0, 2]])

    def test_infinite_logits(self):
        """Minus infinity is a token that cannot come; a whole row of it, or plus infinity, is no distribution."""
        logits = torch.zeros(3, 11)
        logits[0, 3], logits[1], logits[2, 9] = float("-inf"), float("-inf"), float("inf")
        labels = torch.zeros(3, dtype=torch.int64)
        lse, logit = self.scores(logits, labels)
        torch.testing.assert_close(lse[0], torch.tensor(10.0).log())
        assert not (lse - logit)[1:].isfinite().any()
        assert self.gradient(logits, lse, labels, torch.float32)[0, 3] == 0

    def test_no_tokens(self):
        logits, labels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
        lse, logit = self.scores(logits, labels)
        assert lse.shape == logit.shape == (0,)
        assert self.gradient(logits, lse, labels, torch.bfloat16).shape == (0, 5)


def test_weight_gradient_accumulates_in_fp32():
    """In bf16, a sum over many chunks would stop growing; what is left is one rounding at the end."""
    num_tokens = 2000
    hidden = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64), 1).backward()
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-1000.0], [1000.0]]), rtol=2**-8, atol=0)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_are_never_whole():
    """Neither in the forward nor in the backward, nor anything else larger than inputs and one chunk's logits."""
    with Largest() as largest:
        hidden, weight, labels = (x.detach().requires_grad_(x.is_floating_point()) for x in make_inputs(100))
        chunked_cross_entropy(hidden, weight, labels, 7).backward()
    assert largest.elements == max(hidden.numel(), weight.numel(), 7 * VOCABULARY) < len(hidden) * VOCABULARY


def test_no_tokens():
    hidden, weight, labels = make_inputs(0)
    loss = chunked_cross_entropy(hidden, weight, labels, 4)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_ignored_tokens_are_left_out_whatever_they_hold():
    hidden, weight, labels = make_inputs(6, ignored=[1, 4])
    with torch.no_grad():
        hidden[1], hidden[4] = float("nan"), float("inf")
    loss = chunked_cross_entropy(hidden, weight, labels, 4)
    loss.backward()
    kept = labels != -100
    wanted, d_hidden, d_weight = whole(hidden[kept], weight, labels[kept])
    torch.testing.assert_close(loss.detach(), wanted)
    torch.testing.assert_close(hidden.grad[kept], d_hidden)
    torch.testing.assert_close(weight.grad, d_weight)
    assert torch.equal(hidden.grad[~kept], torch.zeros(2, HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_only_the_gradients_asked_for(frozen):
    inputs = make_inputs(5)
    inputs[frozen].requires_grad_(False)
    chunked_cross_entropy(*inputs, 2).backward()
    assert inputs[frozen].grad is None and inputs[1 - frozen].grad is not None


def test_without_gradients(monkeypatch):
    """Evaluation forms no gradients: one product per chunk."""
    hidden, weight, labels = make_inputs(5)
    product, calls = loss_module._product, []
    monkeypatch.setattr(loss_module, "_product", lambda *args: (calls.append(1), product(*args))[1])
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, 2)
    torch.testing.assert_close(loss, whole(hidden, weight, labels)[0])
    assert len(calls) == 3


def test_second_backward_is_refused():
    loss = chunked_cross_entropy(*make_inputs(5), 2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals():
    hidden, weight, labels = make_inputs(5)
    with pytest.raises(ValueError, match="share D and dtype"):
        chunked_cross_entropy(hidden, weight.float(), labels, 2)
    with pytest.raises(ValueError, match="share D and dtype"):
        chunked_cross_entropy(hidden, weight[:, 1:], labels, 2)
    with pytest.raises(ValueError, match=r"int64 \[5\]"):
        chunked_cross_entropy(hidden, weight, labels[1:], 2)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_cross_entropy(hidden, weight, labels, 0)
