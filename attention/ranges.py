"""Ranges by which a profile of training knows what work belongs to; without a profiler they cost nothing."""

from contextlib import nullcontext
from functools import wraps

import torch

PREFIX = "longspan::"
# What attention functions are; `longspan plan` has the same names.
SOFTMAX, LINEAR, SPARSE = "softmax attention", "linear attention", "sparse attention"
CONVOLUTION = "short convolutions"
RECOMPUTED = "recomputed"  # not a component: whatever is inside is computed for the second time


def component(name: str):
    """A context manager: what runs inside belongs to the component `name`, unless an inner range says otherwise."""
    # The check is one call: record_function would run an operation also when nobody records.
    return torch.profiler.record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext()


def of_component(name: str):
    """A decorator: every call of the function is inside `component(name)`."""

    def decorate(function):
        @wraps(function)
        def call(*args, **kwargs):
            with component(name):
                return function(*args, **kwargs)

        return call

    return decorate
