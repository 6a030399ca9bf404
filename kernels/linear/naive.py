"""Linear attention by its recurrence, one token at a time: the definition that faster forms are checked against."""

import torch


def linear_attention(q, k, v, log_decay, beta, offsets, *, scale, causal=True, entry=None):
    """S_t = D S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, with D = exp(g_t), from `entry` or 0 in every segment.

    q, k: [T, H, K]; v: [T, H, V]; log_decay: None, [H], [T, H] or [T, H, K] (of the state's key rows). beta: None or
    [T, H]: the delta rule, which writes beta_t (v_t - (D S_{t-1})^T k_t) instead of v_t. offsets: where each of N
    segments starts, and T. entry: None or [N, H, K, V]. Without `causal` every token reads the state that its segment
    leaves. Returns outputs [T, H, V] and the states that leave [N, H, K, V]; differentiable, in the dtype of q.
    """
    if entry is None:
        entry = q.new_zeros(len(offsets) - 1, q.shape[1], q.shape[2], v.shape[2])
    outputs, exits = [v[:0]], [entry[:0]]
    for start, stop, state in zip(offsets, offsets[1:], entry):
        states = []
        for t in range(start, stop):
            if log_decay is not None:
                decay = (log_decay if log_decay.ndim == 1 else log_decay[t]).exp()
                state = state * decay.view(*decay.shape, *[1] * (3 - decay.ndim))
            write = v[t]
            if beta is not None:
                write = beta[t, :, None] * (write - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t, :, :, None] * write[:, None, :]
            states.append(state)
        seen = torch.stack(states) if causal else state.expand(stop - start, *state.shape)
        outputs.append(scale * torch.einsum("thk,thkv->thv", q[start:stop], seen))
        exits.append(state[None])
    return torch.cat(outputs), torch.cat(exits)
