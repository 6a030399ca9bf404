"""Linear attention by its recurrence, one token at a time: the definition that faster forms are checked against."""

import torch


def linear_attention(q, k, v, log_decay, offsets, *, scale, causal=True):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, from S = 0 at the start of every segment.

    q, k: [T, H, K]; v: [T, H, V]; log_decay: None or [T, H]; offsets: segment starts and T. Without `causal` every
    token reads the state at the end of its segment (no decay). Differentiable; computes in the dtype of q.
    """
    outputs = []
    for start, stop in zip(offsets, offsets[1:]):
        state, states = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
        for t in range(start, stop):
            if log_decay is not None:
                state = state * log_decay[t].exp()[:, None, None]
            state = state + k[t][:, :, None] * v[t][:, None, :]
            states.append(state)
        seen = torch.stack(states) if causal else state.expand(stop - start, *state.shape)
        outputs.append(torch.einsum("thk,thkv->thv", q[start:stop], seen))
    return scale * torch.cat(outputs) if outputs else v * q.sum()
