"""Decisions that all ranks take together: one rank decides, the others follow, and a refusal stops all of them. And
what each must have found by itself like all others."""

import hashlib
import traceback
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, TypeVar

import torch.distributed as dist

from longspan.launcher.errors import UserError

T = TypeVar("T")
MOST_NAMED, MOST_SHOWN = 4, 60  # differences, and characters of a value, in a message


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
    problems = _gather(problem)
    if any(problems):
        raise UserError(next(filter(None, problems)))


def agree_on(facts: dict[str, str]) -> None:
    """Raises the same UserError on every rank unless `facts` are the same on all: which differ, and who has what.
    Collective over all ranks; the facts themselves travel only where their digests differ."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(_gather(digest))) == 1:
        return
    of_rank, differences = _gather(facts), []
    for name in dict.fromkeys(name for found in of_rank for name in found):
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(of_rank):
            ranks.setdefault(found.get(name, "unknown"), []).append(rank)
        if len(ranks) > 1:
            shown = (f"{value[:MOST_SHOWN] or 'empty'} on {listed(those)}" for value, those in ranks.items())
            differences.append(f"{name} is {' and '.join(shown)}")
    more = len(differences) - MOST_NAMED
    text = "; ".join(differences[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
    raise UserError(f"ranks differ: {text}. Start the same command with the same files and versions on every machine")


def listed(ranks: Iterable[int]) -> str:
    """Such as `rank 3`, or `ranks 0-2, 5`; in ascending order."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if '-' in text or ',' in text else ''} {text}"


def _gather(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
