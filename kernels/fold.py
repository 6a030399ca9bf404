"""Folding affine maps of states: what enters each span or split, from the summaries of those before it.

A summary (state S, transition A) stands for `E -> A(E) + S`. States are [.., H, K, V] in fp32 or fp64. A acts on the
key rows only, so heads and columns of V are independent of each other; it is one of

    None                the identity
    [R, H]              log decay, <= 0
    [R, H, K]           log decay of every key row, <= 0
    [R, H, K, K]        a matrix, applied from the left

Nothing is ever subtracted and every decay is applied where it stands, so that decays of any strength are safe.
"""

import torch


def fold_chains(states, transition, chains, initial=None):
    """Runs every chain and writes what it has reached at the places it names. Returns [chains.num_out, H, K, V].

    states: [R, H, K, V]; transition: of the same R rows, see above; initial: [I, H, K, V] or None. chains: sources and
    targets, int32 [N, L], and initial, int32 [N]; -1 stands for none, and a target occurs once. Chain n:

        E = initial[chains.initial[n]], or 0
        for each column l:   out[targets[n, l]] = E, then E = A(E) + states[sources[n, l]]

    Rows of `states` that no chain names may hold anything. Rows of the result that no chain names are undefined.
    """
    num_chains, length = chains.sources.shape
    reached = states.new_zeros(num_chains, *states.shape[1:])
    if initial is not None:
        started = (chains.initial >= 0).nonzero().flatten()
        reached[started] = initial[chains.initial[started]]
    out = states.new_empty(chains.num_out, *states.shape[1:])
    for column in range(length):
        targets, sources = chains.targets[:, column], chains.sources[:, column]
        writing, passing = (targets >= 0).nonzero().flatten(), (sources >= 0).nonzero().flatten()
        out[targets[writing]] = reached[writing]
        rows = sources[passing]
        reached[passing] = step(states[rows], None if transition is None else transition[rows], reached[passing])
    return out


def fold(states, transition, sources):
    """The end of each chain, [N, H, K, V]. sources: int [N, L], -1 for none; the rest as in `fold_chains`."""
    reached = states.new_zeros(len(sources), *states.shape[1:])
    for column in sources.unbind(1):
        passing = (column >= 0).nonzero().flatten()
        rows = column[passing]
        reached[passing] = step(states[rows], None if transition is None else transition[rows], reached[passing])
    return reached


def compose(transition, sources):
    """The transition of each whole chain, in the form of `transition`: [N, ...]. sources: int [N, L], -1 for none."""
    if transition is None:
        return None
    if transition.ndim < 4:
        used = (sources >= 0).reshape(*sources.shape, *[1] * (transition.ndim - 1))
        return torch.where(used, transition[sources.clamp(min=0)], 0).sum(1)
    product = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    product = product.repeat(len(sources), transition.shape[1], 1, 1)
    for column in sources.unbind(1):
        passing = (column >= 0).nonzero().flatten()
        product[passing] = transition[column[passing]] @ product[passing]
    return product


def step(state, transition, entry):
    """One hop: A(entry) + state, [.., H, K, V], for any number of leading dimensions; entry may be None, for zero."""
    if entry is None:
        return state
    if transition is None:
        return entry + state
    rank = transition.ndim - state.ndim  # -2: decay of a head, -1: of its key rows, 0: matrix
    if rank == 0:
        return transition @ entry + state
    return transition.exp()[(..., *[None] * -rank)] * entry + state


fold_scalar, step_scalar = fold, step  # names that attention/linear.py still uses
