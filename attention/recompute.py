"""Activation checkpointing without repeating communication.

Pass `checkpoint_contexts` as `context_fn` to `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`. What a
layer got from other ranks (entry states of linear attention, output and log-sum-exp of softmax attention, the rows that
a plan moved here) is kept from the forward pass and handed back when the layer is recomputed. Only strategies that give
every rank some heads of other ranks' tokens exchange those again: to keep them is to keep nearly all of q, k and v.
"""

import threading
from contextlib import nullcontext

from torch.utils._pytree import tree_map

from longspan.attention.offload import fetch
from longspan.attention.ranges import RECOMPUTED, component

_current = threading.local()  # backward recomputes on autograd's own threads


def checkpoint_contexts(parcel=None):
    """The (forward, recompute) context managers of one checkpointed call. parcel: of Offload, for what is kept."""
    kept = []
    return _Session(kept, parcel, replay=False), _Session(kept, parcel, replay=True)


def recomputing() -> bool:
    """Whether this thread is recomputing a checkpointed layer."""
    session = getattr(_current, "session", None)
    return session is not None and session[1] is not None


def keeping() -> bool:
    """Whether what `keep` gets is kept: inside a checkpoint, in its forward pass."""
    return getattr(_current, "session", None) is not None and not recomputing()


def recall():
    """While recomputing: what the next layer kept. Otherwise None."""
    return tree_map(fetch, next(_current.session[1])) if recomputing() else None


def keep(value):
    """Keeps a layer's value for its recomputation, if the layer runs inside a checkpoint; returns the value."""
    session = getattr(_current, "session", None)
    if session:
        kept, _, parcel = session
        kept.append(value if parcel is None else tree_map(parcel.store, value))
    return value


class _Session:
    """Makes `kept` current while entered; a replay starts over every time, as a second backward does."""

    def __init__(self, kept, parcel, *, replay):
        self.kept, self.parcel, self.replay, self.outer = kept, parcel, replay, []

    def __enter__(self):
        recomputation = component(RECOMPUTED) if self.replay else nullcontext()
        recomputation.__enter__()
        self.outer.append((getattr(_current, "session", None), recomputation))
        _current.session = (self.kept, iter(self.kept) if self.replay else None, self.parcel)

    def __exit__(self, *_):
        _current.session, recomputation = self.outer.pop()
        recomputation.__exit__(None, None, None)
