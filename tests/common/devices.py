"""Where tests run that need a GPU in one of their cases, and this process as the only rank of what it trains there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from longspan.parallel.mesh import join

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def telling(*values, rest) -> list:
    """Values of one parameter: of `rest` tests are slow, as what `values` show is nearly all of it."""
    return [*values, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]


@contextmanager
def only_rank(device: str) -> Iterator[torch.device]:
    """The device, for runs in this process; the group that it is alone in is gone afterwards, also where they fail."""
    found = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(found)
    try:
        join(found, 60)
        yield found
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
