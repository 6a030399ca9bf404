"""Cross-entropy of a language model's head without ever holding the logits of a whole sequence.

Logits exist for `chunk` tokens at a time. While they exist in the forward, both gradients are formed from them, so the
backward only multiplies by the incoming scalar and logits are never computed twice.
Shape letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, P parts of it.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
    first: int = 0,
    stack: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label]; tokens with label -100 count for nothing.

    hidden [T, D], weight [V, D] of one dtype, labels int64 [T], chunk >= 1 tokens. T may be 0. Returns a scalar.
    Logits, softmax, loss and the weight's gradient are accumulated in fp32 (fp64 for fp64 inputs). An ignored token
    gives zero gradient even if its hidden row is not finite. The backward may run once per forward.
    stack: where `weight` is a part of the vocabulary, its rows from `first` on, what stacks a tensor with those of the
    other parts; the loss is that of the whole vocabulary, gradients those through this part.
    ValueError for shapes, dtypes or a chunk that do not fit; labels outside [0, V) are an indexing error, but not
    noticed where the vocabulary is in parts.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            "hidden [T, D] and weight [V, D] must share D and dtype,"
            f" got {tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{hidden.shape[0]}] like hidden, got {labels.dtype} {list(labels.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token")
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, first, stack, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, first, stack, training):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        # Where there are shapes alone, the first chunk stands for all.
        for start in range(0, min(len(hidden), chunk) if hidden.is_meta else len(hidden), chunk):
            rows = slice(start, start + chunk)
            ignored_C1 = (labels[rows] == IGNORED_LABEL)[:, None]
            label_C1, foreign_C1 = labels[rows, None] - first, ignored_C1
            if stack is not None:
                foreign_C1 = ignored_C1 | (label_C1 < 0) | (label_C1 >= len(weight))
            label_C1 = label_C1.masked_fill(foreign_C1, 0)
            hidden_CD = hidden[rows].masked_fill(ignored_C1, 0)

            logits_CV = _product(hidden_CD, weight.t(), wide)
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            logit_C1 = logits_CV.gather(1, label_C1).masked_fill(foreign_C1, 0)
            if stack is not None:
                lse_PC1, logit_PC1 = stack(torch.cat([lse_C1, logit_C1], 1)).split(1, -1)
                lse_C1, logit_C1 = lse_PC1.logsumexp(0), logit_PC1.sum(0)
            loss += (lse_C1 - logit_C1).masked_fill(ignored_C1, 0).sum()

            if needs_hidden or needs_weight:
                grad_CV = logits_CV.sub_(lse_C1).exp_()
                grad_CV.scatter_(1, label_C1, grad_CV.gather(1, label_C1) - (~foreign_C1).to(wide))
                grad_CV = grad_CV.masked_fill_(ignored_C1, 0).to(hidden.dtype)
                if needs_hidden:
                    torch.mm(grad_CV, weight, out=grad_hidden[rows])
                if needs_weight:
                    grad_weight += _product(grad_CV.t(), hidden_CD, wide)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # In place, since these are as large as the hidden states and the head; a second backward is refused by torch.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _product(a, b, dtype):
    """a @ b, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
