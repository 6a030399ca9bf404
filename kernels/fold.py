"""Folding span summaries into the state that enters each span."""

import torch


def fold_scalar(states, log_decay, chains):
    """Entry states from the summaries before them: sum over each chain of the summaries, decayed by what follows them.

    states: [M, H, K, V]; log_decay: [M, H] over whole spans, or None; chains: int64 [N, L], rows of `states` in the
    order they are passed through, -1 where a chain is shorter than L (such entries stand in front).
    Returns [N, H, K, V]. `S <- exp(log_decay_j) S + states_j` unrolled into one weighted sum, so that nothing is
    subtracted and a decay of any strength is safe.
    """
    heads = states.shape[1]
    used = (chains >= 0).to(states.dtype)
    if log_decay is None:
        weight = used[:, :, None].expand(*chains.shape, heads)
    else:
        passed = log_decay[chains.clamp(min=0)] * used[:, :, None]  # [N, L, H]
        after = torch.cat([passed[:, 1:].flip(1).cumsum(1).flip(1), torch.zeros_like(passed[:, :1])], dim=1)
        weight = after.exp() * used[:, :, None]
    dense = states.new_zeros(chains.shape[0], states.shape[0], heads)
    for column in range(chains.shape[1]):  # rows of one column are distinct per chain: no duplicate writes
        rows = chains[:, column].clamp(min=0)
        dense[torch.arange(len(rows), device=rows.device), rows] += weight[:, column]
    return torch.einsum("nmh,mhkv->nhkv", dense, states)


def step_scalar(state, log_decay, entry):
    """The state leaving one span: exp(log_decay) entry + state. [H, K, V]; log_decay [H] or None; entry may be None."""
    if entry is None:
        return state
    return state + (entry if log_decay is None else log_decay.exp()[:, None, None] * entry)
