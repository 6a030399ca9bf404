"""Cross-entropies of a chunk of logits with their gradient as one Triton kernel: logits are read twice, and the second
time they are still in the cache. PyTorch needs a dozen passes."""

from longspan.kernels.compiler import tl, triton

BLOCK, NUM_WARPS = 4096, 8


def losses_and_gradient_triton(logits, labels, dtype):
    """See kernels.loss.losses_and_gradient. Logits in fp32; dtype is bf16, fp16 or fp32."""
    num_tokens, vocabulary = logits.shape
    losses, gradient = logits.new_empty(num_tokens), logits.new_empty(logits.shape, dtype=dtype)
    if num_tokens:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        loss_kernel[(num_tokens,)](
            logits.contiguous(), labels.contiguous(), losses, gradient, vocabulary, BLOCK=block, num_warps=NUM_WARPS
        )
    return losses, gradient


@triton.jit
def loss_kernel(logits_ptr, labels_ptr, losses_ptr, gradient_ptr, vocabulary, BLOCK: tl.constexpr):
    """One token. A label of -100 gives zeros, any other that is no token NaN."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    logits_ptr += token * vocabulary
    gradient_ptr += token * vocabulary
    if label == -100:
        tl.store(losses_ptr + token, 0.0)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], dtype=gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + column, zero, mask=column < vocabulary)
    else:
        highest = tl.full([BLOCK], -3e38, tl.float32)  # not -inf, whose differences are not numbers
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf"))
            higher = tl.maximum(highest, logit)
            total = total * tl.exp(highest - higher) + tl.exp(logit - higher)
            highest = higher
        top = tl.max(highest)
        lse = top + tl.log(tl.sum(total * tl.exp(highest - top)))
        known = (label >= 0) & (label < vocabulary)
        tl.store(losses_ptr + token, lse - tl.load(logits_ptr + label, mask=known, other=float("nan")))
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < vocabulary, other=0.0)
            gradient = tl.exp(logit - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(gradient_ptr + column, gradient.to(gradient_ptr.dtype.element_ty), mask=column < vocabulary)
