"""Cross-entropy of a language model's head without ever holding the logits of a whole sequence.

Logits exist for `chunk` tokens at a time. While they exist in the forward, both gradients are formed from them, so the
backward only multiplies by the incoming scalar and logits are never computed twice.
Shape letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, P parts of it.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype

IGNORED_LABEL = -100
FOREIGN_LABEL = -101  # a token of another part of the vocabulary


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
    ValueError for shapes, dtypes or a chunk that do not fit; labels outside [0, V) are an indexing error, on GPUs they
    make the loss NaN, and where the vocabulary is in parts nobody notices them.
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
        wide = wide_dtype(hidden.dtype)
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        # Where there are shapes alone, the first chunk stands for all.
        for start in range(0, min(len(hidden), chunk) if hidden.is_meta else len(hidden), chunk):
            rows = slice(start, start + chunk)
            ignored_C, label_C = labels[rows] == IGNORED_LABEL, labels[rows]
            if stack is not None:
                local_C = label_C - first
                foreign_C = (local_C < 0) | (local_C >= len(weight))
                label_C = local_C.masked_fill(foreign_C, FOREIGN_LABEL).masked_fill(ignored_C, IGNORED_LABEL)
            hidden_CD = hidden[rows].masked_fill(ignored_C[:, None], 0)
            logits_CV = _product(hidden_CD, weight.t(), wide)
            lse_C, logit_C = label_scores(logits_CV, label_C)
            if stack is not None:
                lse_PC, logit_PC = stack(torch.stack([lse_C, logit_C], 1)).unbind(-1)
                lse_C, logit_C = lse_PC.logsumexp(0), logit_PC.sum(0)
            loss += (lse_C - logit_C).masked_fill(ignored_C, 0).sum()
            if needs_hidden or needs_weight:
                grad_CV = logits_gradient(logits_CV, lse_C, label_C, hidden.dtype)
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


def label_scores_naive(logits, labels):
    """(log-sum-exp, logit of the label), both [C], of logits [C, V]. The logit is 0 for foreign labels and undefined
    for ignored ones."""
    foreign = labels == FOREIGN_LABEL
    place = labels.masked_fill(foreign | (labels == IGNORED_LABEL), 0)[:, None]
    return logits.logsumexp(-1), logits.gather(1, place)[:, 0].masked_fill(foreign, 0)


def logits_gradient_naive(logits, lse, labels, dtype):
    """exp(logits - lse) - onehot(labels), zeros for ignored labels: [C, V] in `dtype`. lse: [C], of all logits."""
    ignored, foreign = ((labels == label)[:, None] for label in (IGNORED_LABEL, FOREIGN_LABEL))
    place = labels[:, None].masked_fill(ignored | foreign, 0)
    gradient = (logits - lse[:, None]).exp_()
    gradient.scatter_(1, place, gradient.gather(1, place) - (~foreign).to(gradient.dtype))
    return gradient.masked_fill_(ignored, 0).to(dtype)


label_scores = operator(
    "label_scores(Tensor logits, Tensor labels) -> (Tensor, Tensor)",
    naive=label_scores_naive,
    fused="loss_triton.label_scores_triton",
    shapes=lambda logits, labels: (logits.new_empty(len(labels)), logits.new_empty(len(labels))),
)
logits_gradient = operator(
    "logits_gradient(Tensor logits, Tensor lse, Tensor labels, ScalarType dtype) -> Tensor",
    naive=logits_gradient_naive,
    fused="loss_triton.logits_gradient_triton",
    shapes=lambda logits, lse, labels, dtype: logits.new_empty(logits.shape, dtype=dtype),
)


def _product(a, b, dtype):
    """a @ b, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
