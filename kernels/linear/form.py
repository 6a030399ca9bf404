"""What every implementation of a linear-attention family looks like to the layer that runs it across ranks.

A layer's arithmetic on one rank falls into pieces between which states travel. A Form holds one call's inputs and what
its pieces share; it is built anew for the forward and for the backward pass:

    form = Form(tables, q, k, v, log_decay, beta, scale)
    forward:   state, transition = form.summary()     (only if states travel)      -> start the scan
               form.ahead()                           work that needs nothing from other ranks
               out, saved = form.output(entry, dtype)                              <- states that enter
    backward:  form.start_backward(saved, d_out, gate)
               d_state = form.gradient_summary()      (only if states travel)      -> start the scan
               form.gradient_ahead()                  work that needs no exit gradient
               dq, dk, dv, d_log_decay, d_beta = form.gradients(exit_grad)         <- gradients of states that leave

q, k: [T, H, K]; v, d_out: [T, H, V]; log_decay: None, [H], [T, H] or [T, H, K]; beta: None or [T, H]; T >= 0.
State dtype is fp64 for fp64 inputs, else fp32. Over a span the state obeys S_out = A(S_in) + state:

    state, d_state      [len(linked), H, K, V]: state a linked span leaves when it starts from zero; gradient that its
                        own outputs give to its entry state
    transition          A: None (identity), log decay [n, H] or [n, H, K] (of the key rows), or a matrix [n, H, K, K]
    entry, exit_grad    [len(entered), H, K, V] and [len(left), H, K, V]; all other spans have zeros
    saved               a tuple of tensors for the backward pass besides the inputs
    gate                whether d_log_decay is wanted; otherwise it is None

`Form.tables(spans, *sizes)` makes the tables (a value with `.map(move)`) once per batch, on the host.
"""

from dataclasses import dataclass

# Log decays whose exp is zero in fp32 and in fp64. Stronger gates are taken as these, so that sums of log decays keep
# their digits and -inf makes no NaN.
CLOSED_FP32, CLOSED = -128.0, -800.0


@dataclass(frozen=True)
class Spans:
    """This rank's runs of consecutive tokens of one document, and which of them exchange states.

    offsets: where each span starts among the T local tokens, and T (N + 1 numbers, strictly increasing).
    linked: spans of documents in several pieces. entered: those that a state enters; left: those that one leaves.
    """

    offsets: tuple[int, ...]
    linked: tuple[int, ...] = ()
    entered: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
