"""run_ranks itself: results, every rank's traceback, deaths, hangs, nothing left behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from spawn import RanksFailed, run_ranks


def add_ranks(rank, world_size, base):
    total = torch.tensor([rank + base])
    dist.all_reduce(total)
    return rank, total, torch.get_num_threads(), torch.initial_seed()


def fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("only rank 1 is wrong")
    dist.barrier()


def die_on_one(rank, world_size):
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def crash_on_one(rank, world_size):
    if rank == 1:
        os.abort()  # as glibc does where it finds its heap destroyed
    time.sleep(60)


def hang_on_one(rank, world_size, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 0:
        return "done"
    time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 4])
def test_results_come_back_by_rank(world_size):
    results = run_ranks(add_ranks, world_size, 10)
    total = sum(range(world_size)) + 10 * world_size
    assert results == [(rank, torch.tensor([total]), 1, 0) for rank in range(world_size)]


def test_an_exception_ends_all_ranks_and_shows_the_traceback():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1: Traceback[^$]*only rank 1 is wrong"):
        run_ranks(fail_on_one, 3)
    assert time.monotonic() - start < 10


def test_a_dead_rank_ends_the_others_and_shows_where_they_were():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="exit code 7[^$]*stopped after another rank failed[^$]*die_on_one"):
        run_ranks(die_on_one, 3)
    assert time.monotonic() - start < 10


def test_a_crashed_rank_shows_where_it_was():
    with pytest.raises(RanksFailed, match="rank 1: died with exit code -6[^$]*Aborted[^$]*crash_on_one[^$]*rank 0: st"):
        run_ranks(crash_on_one, 2)


def test_a_hang_is_ended_at_the_time_limit(tmp_path):
    with pytest.raises(RanksFailed, match="still running after 5 s[^$]*hang_on_one[^$]*ranks .0.: returned"):
        run_ranks(hang_on_one, 2, tmp_path, timeout=5)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)
