"""Decisions that all ranks take together: one rank decides, the others follow, and a refusal stops all of them."""

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from longspan.launcher.errors import UserError

T = TypeVar("T")


def decide(make: Callable[[], T]) -> T:
    """Rank 0 calls `make`; every rank returns its (picklable) result.

    Collective over all ranks. When `make` raises UserError, every rank raises it; after any other exception every rank
    raises RuntimeError with rank 0's traceback.
    """
    answer = [None]
    if dist.get_rank() == 0:
        try:
            answer = [("result", make())]
        except UserError as error:
            answer = [("refusal", str(error))]
        except Exception:  # noqa: BLE001 - the other ranks wait for an answer, whatever happened
            answer = [("failure", traceback.format_exc())]
    dist.broadcast_object_list(answer, src=0)
    kind, value = answer[0]
    if kind == "refusal":
        raise UserError(value)
    if kind == "failure":
        raise RuntimeError(f"rank 0 failed and with it all ranks:\n{value}")
    return value


def agree_on_none(problem: str | None) -> None:
    """Raises the same UserError on every rank when one has a problem: that of the first. Collective over all ranks."""
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise UserError(next(filter(None, problems)))
