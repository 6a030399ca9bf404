"""Log-sum-exps of logits and their gradient, each as one Triton kernel that reads the logits once."""

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

BLOCK, NUM_WARPS = 4096, 8  # elements of a row at a time, and warps for them


def label_scores_triton(logits, labels):
    """See kernels.loss.label_scores_naive. Logits in fp32. A label that is no token, -100 or -101 gives NaN."""
    num_tokens, vocabulary = logits.shape
    lse, logit = logits.new_empty(num_tokens), logits.new_empty(num_tokens)
    if num_tokens:
        block = min(BLOCK, next_power_of_2(vocabulary))
        scores_kernel[(num_tokens,)](
            logits.contiguous(), labels.contiguous(), lse, logit, vocabulary, BLOCK=block, num_warps=NUM_WARPS
        )
    return lse, logit


def logits_gradient_triton(logits, lse, labels, dtype):
    """See kernels.loss.logits_gradient_naive. Logits in fp32; dtype is bf16, fp16 or fp32."""
    num_tokens, vocabulary = logits.shape
    gradient = logits.new_empty(logits.shape, dtype=dtype)
    if num_tokens:
        block = min(BLOCK, next_power_of_2(vocabulary))
        gradient_kernel[(num_tokens * cdiv(vocabulary, block),)](
            logits.contiguous(), lse, labels.contiguous(), gradient, vocabulary, BLOCK=block, num_warps=NUM_WARPS
        )
    return gradient


@launched
@triton.jit
def scores_kernel(logits_ptr, labels_ptr, lse_ptr, logit_ptr, vocabulary, BLOCK: tl.constexpr):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    logits_ptr += token * vocabulary
    highest = tl.full([BLOCK], -3e38, tl.float32)  # not -inf, whose differences are not numbers
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf"))
        higher = tl.maximum(highest, logit)
        total = total * tl.exp(highest - higher) + tl.exp(logit - higher)
        highest = higher
    top = tl.max(highest)
    tl.store(lse_ptr + token, top + tl.log(tl.sum(total * tl.exp(highest - top))))
    known = (label >= 0) & (label < vocabulary)
    logit = tl.load(logits_ptr + label, mask=known, other=float("nan"))
    tl.store(logit_ptr + token, tl.where(label == -101, 0.0, logit))


@launched
@triton.jit
def gradient_kernel(logits_ptr, lse_ptr, labels_ptr, gradient_ptr, vocabulary, BLOCK: tl.constexpr):
    """A block of one token."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at, mask = token * vocabulary + column, column < vocabulary
    label, lse = tl.load(labels_ptr + token), tl.load(lse_ptr + token)
    logit = tl.load(logits_ptr + at, mask=mask, other=0.0)
    gradient = tl.exp(logit - lse) - tl.where(column == label, 1.0, 0.0)
    gradient = tl.where(label == -100, 0.0, gradient)  # whatever the logits are
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
