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

MAX_KEYS = 128  # rows of a state whose columns stay on chip under a matrix


def fold_chains(states, transition, chains, initial=None, parts=None):
    """Runs every chain and writes what it has reached at the places it names. Returns [chains.num_out, H, K, V].

    states: [R, H, K, V], or None for zeros under matrices; without matrices also in bf16, which is added up in fp32.
    transition: of those R rows, see above; initial: [I, H, K, V] or None. chains: sources and targets, int32 [N, L],
    and initial, int32 [N]; -1 is none, and a target occurs once. Chain n:

        E = initial[chains.initial[n]], or 0
        for each column l:   out[targets[n, l]] = E, then E = A(E) + states[sources[n, l]]

    parts: None, or without matrices int32 [R, H]: states are [R, P, H, K, V], of which the first so many are added.

    Rows and parts of `states` that are not named may hold anything. Rows of the result that no chain names are
    undefined.
    """
    if _fits_triton(initial if states is None else states, transition):
        from longspan.kernels.fold_triton import fold_chains_triton

        return fold_chains_triton(states, transition, chains, initial, parts)[0]
    return fold_chains_naive(states, transition, chains, initial, parts)


def summarize(states, transition, chains, parts=None):
    """What each whole chain amounts to: (fold_chains(states, transition, chains, parts=parts),
    compose(transition, chains.sources)), with Triton in one launch. Chain n writes row n, at its end."""
    if transition is not None and _fits_triton(states, transition):
        from longspan.kernels.fold_triton import fold_chains_triton

        return fold_chains_triton(states, transition, chains, parts=parts, compose=True)
    return fold_chains(states, transition, chains, parts=parts), compose(transition, chains.sources)


def _fits_triton(states, transition) -> bool:
    wide = transition is not None and transition.ndim == 4 and transition.shape[-1] > MAX_KEYS
    return states.is_cuda and states.dtype in (torch.float32, torch.bfloat16) and not wide


def fold_chains_naive(states, transition, chains, initial=None, parts=None):
    """fold_chains in plain PyTorch: any device, dtype and width."""
    if parts is not None:
        named = torch.arange(states.shape[1], device=parts.device)[:, None] < parts[:, None]
        states = torch.where(named[..., None, None], states, 0).sum(1)
    num_chains, length = chains.sources.shape
    example = initial if states is None else states
    dtype = torch.promote_types(example.dtype, torch.float32)
    reached = example.new_zeros(num_chains, *example.shape[1:], dtype=dtype)
    if initial is not None:
        started = (chains.initial >= 0).nonzero().flatten()
        reached[started] = initial[chains.initial[started]]
    out = reached.new_empty(chains.num_out, *example.shape[1:])
    for targets, sources in zip(chains.targets.unbind(1), chains.sources.unbind(1)):
        writing, passing = (targets >= 0).nonzero().flatten(), (sources >= 0).nonzero().flatten()
        out[targets[writing]] = reached[writing]
        rows = sources[passing]
        state = reached.new_zeros(()) if states is None else states[rows].to(dtype)
        reached[passing] = step(state, None if transition is None else transition[rows], reached[passing])
    return out


def compose(transition, sources):
    """The transition of each whole chain, in the form of `transition`: [N, ...]. sources: int32 [N, L], -1 for none."""
    if transition is None:
        return None
    if transition.ndim < 4:
        used = (sources >= 0).reshape(*sources.shape, *[1] * (transition.ndim - 1))
        return torch.where(used, transition[sources.clamp(min=0)], 0).sum(1)
    identity = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    return fold_chains(None, transition, _Ends(sources), identity.repeat(1, transition.shape[1], 1, 1))


class _Ends:
    """Chains that all start from row 0 of what they are given and yield their ends."""

    def __init__(self, sources):
        self.num_out = len(sources)
        self.sources = torch.nn.functional.pad(sources, (0, 1), value=-1)
        self.targets = torch.full_like(self.sources, -1)
        self.targets[:, -1] = torch.arange(self.num_out, device=sources.device)
        self.initial = self.sources.new_zeros(self.num_out)


def step(state, transition, entry):
    """One hop: A(entry) + state, [.., H, K, V], for any number of leading dimensions; entry may be None, for zero."""
    if entry is None:
        return state
    if transition is None:
        return entry + state
    if transition.ndim == entry.ndim:
        return transition @ entry + state
    missing = entry.ndim - transition.ndim  # 2 for the decay of a head, 1 for that of its key rows
    return transition.exp()[(..., *[None] * missing)] * entry + state
