"""The definitions of linear and softmax attention, written for reading: every fast path is compared with these.

Plain differentiable torch on whole (global) tensors, documents laid end to end in the order of `lengths`; called with
fp64, autograd gives the gradients. Shapes as in longspan.attention: packed [T, H, D].
"""

import torch


def linear_attention(q, k, v, lengths, *, log_decay=None, beta=None, causal=True, normalize=False, scale=None):
    """Token by token: S = D S, S = S + beta_t k_t (v_t - S^T k_t)^T or S + k_t v_t^T without beta, o_t = scale S^T q_t.

    q, k: [T, H, K]; v: [T, H, V]; log_decay, the logarithm of the diagonal D: None, [H], [T, H] or [T, H, K]; beta:
    None or [T, H]. Without `causal` (and so without decay) every token reads its document's sum; normalize divides by
    the same sum of weights.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_tokens, num_heads, key_size = q.shape
    if log_decay is None:
        log_decay = q.new_zeros(num_heads)
    if log_decay.ndim < 3:
        log_decay = log_decay[..., None]
    decay_THK = log_decay.expand(num_tokens, num_heads, key_size).exp()
    if normalize:  # One more value column that is all ones sums the weights.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    eye_KK = torch.eye(key_size, dtype=q.dtype)
    outputs = []
    start = 0
    for length in lengths:
        state_HKV = v.new_zeros(num_heads, key_size, v.shape[-1])
        states = []
        for t in range(start, start + length):
            state_HKV = decay_THK[t, :, :, None] * state_HKV
            write = k[t, :, :, None] * v[t, :, None, :]
            if beta is not None:  # S - beta k (S^T k)^T = (I - beta k k^T) S
                step = beta[t, :, None, None]
                state_HKV = (eye_KK - step * k[t, :, :, None] * k[t, :, None, :]) @ state_HKV
                write = step * write
            state_HKV = state_HKV + write
            states.append(state_HKV)
        for t in range(start, start + length):
            read = states[t - start] if causal else states[-1]
            outputs.append(scale * (q[t, :, :, None] * read).sum(1))
        start += length
    out_THV = torch.stack(outputs)
    return out_THV[..., :-1] / out_THV[..., -1:] if normalize else out_THV


def softmax_attention(q, k, v, lengths, *, causal=True, window=None, scale=None):
    """The full masked matrix; q: [T, H, D]; k, v: [T, G, D]; query head h reads key head h // (H / G). window: a query
    sees the last so many keys, itself included."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group_size = q.shape[1] // k.shape[1]
    k_THD = k.repeat_interleave(group_size, 1)
    v_THD = v.repeat_interleave(group_size, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible_TT = document[:, None] == document[None, :]
    if causal:
        visible_TT = visible_TT.tril()
    if window is not None:
        row = torch.arange(len(q))
        visible_TT &= row[:, None] - row < window
    scores_HTT = scale * torch.einsum("thd,shd->hts", q, k_THD)
    weights_HTT = scores_HTT.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTT, v_THD)


def with_gradients(attention, inputs, grad_out, lengths, **kwargs):
    """`attention` on fp64 copies of the dict `inputs`: {"out": ..., "d<name>": gradient of sum(out * grad_out)}."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out = attention(**leaves, lengths=lengths, **kwargs)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.double())
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
