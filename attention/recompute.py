"""Activation checkpointing without repeating communication.

Pass `checkpoint_contexts` as `context_fn` to `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`. What a
layer got from other ranks (entry states of linear attention, output and log-sum-exp of softmax attention) is kept from
the forward pass and handed back when the layer is recomputed.
"""

import threading
from contextlib import contextmanager

_current = threading.local()  # backward recomputes on autograd's own threads


def checkpoint_contexts():
    """The (forward, recompute) context managers of one checkpointed call."""
    kept = []
    return _session(kept, replay=False), _session(kept, replay=True)


def recomputing() -> bool:
    """Whether this thread is recomputing a checkpointed layer."""
    session = getattr(_current, "session", None)
    return session is not None and session[1] is not None


def recall():
    """While recomputing: what the next layer kept. Otherwise None."""
    return next(_current.session[1]) if recomputing() else None


def keep(value):
    """Keeps a layer's value for its recomputation, if the layer runs inside a checkpoint; returns the value."""
    session = getattr(_current, "session", None)
    if session:
        session[0].append(value)
    return value


@contextmanager
def _session(kept, *, replay):
    outer = getattr(_current, "session", None)
    _current.session = (kept, iter(kept) if replay else None)
    try:
        yield
    finally:
        _current.session = outer
