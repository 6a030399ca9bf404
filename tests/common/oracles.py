"""The definitions of linear and softmax attention, written for reading: every fast path is compared with these.

Plain differentiable torch on whole (global) tensors, documents laid end to end in the order of `lengths`; called with
fp64, autograd gives the gradients. Shapes as in longspan.attention: packed [T, H, D].
"""

import torch


def linear_attention(q, k, v, lengths, *, log_decay=None, causal=True, normalize=False, scale=None):
    """Token by token: S = exp(g_t) S + k_t v_t^T, o_t = scale S^T q_t; normalize divides by the same sum of weights.

    q, k: [T, H, K]; v: [T, H, V]; log_decay: None, [H] or [T, H]. Without `causal` (and so without decay) every token
    reads its document's sum.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_tokens, num_heads, _ = q.shape
    if log_decay is None:
        log_decay = q.new_zeros(num_heads)
    decay_TH = log_decay.expand(num_tokens, num_heads).exp()
    if normalize:  # One more value column that is all ones sums the weights.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    outputs = []
    start = 0
    for length in lengths:
        state_HKV = v.new_zeros(num_heads, k.shape[-1], v.shape[-1])
        states = []
        for t in range(start, start + length):
            write = k[t, :, :, None] * v[t, :, None, :]
            state_HKV = decay_TH[t, :, None, None] * state_HKV + write
            states.append(state_HKV)
        for t in range(start, start + length):
            read = states[t - start] if causal else states[-1]
            outputs.append(scale * (q[t, :, :, None] * read).sum(1))
        start += length
    out_THV = torch.stack(outputs)
    return out_THV[..., :-1] / out_THV[..., -1:] if normalize else out_THV


def softmax_attention(q, k, v, lengths, *, causal=True, scale=None):
    """The full masked matrix; q: [T, H, D]; k, v: [T, G, D]; query head h reads key head h // (H / G)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group_size = q.shape[1] // k.shape[1]
    k_THD = k.repeat_interleave(group_size, 1)
    v_THD = v.repeat_interleave(group_size, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible_TT = document[:, None] == document[None, :]
    if causal:
        visible_TT = visible_TT.tril()
    scores_HTT = scale * torch.einsum("thd,shd->hts", q, k_THD)
    weights_HTT = scores_HTT.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTT, v_THD)


def with_gradients(attention, inputs, grad_out, lengths, **kwargs):
    """`attention` on fp64 copies of the dict `inputs`: {"out": ..., "d<name>": gradient of sum(out * grad_out)}."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out = attention(**leaves, lengths=lengths, **kwargs)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.double())
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
