"""The sequence context says where this rank's tokens are, once per batch."""

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from longspan.parallel import SequenceParallel, Topology, contiguous, zigzag


def describe(rank, world_size, lengths):
    parallel = SequenceParallel(dist.group.WORLD)
    seq = parallel.context(lengths)
    assert seq.parallel is parallel
    assert (seq.rank, seq.world_size) == (parallel.rank, parallel.world_size) == (rank, world_size)
    assert seq.layout == parallel.base_layout(lengths)
    assert seq.num_tokens == sum(lengths)
    assert seq.num_tokens_local == len(seq.positions) == seq.layout.tokens_per_rank[rank]
    assert seq.positions.dtype == torch.int64
    np.testing.assert_array_equal(seq.positions.numpy(), seq.layout.positions(rank))
    return seq.layout


@pytest.mark.parametrize("lengths", [(100,), (1,), (7, 1, 30, 2)])
def test_all_ranks_agree_on_a_balanced_layout(lengths):
    layouts = run_ranks(describe, 3, lengths)
    if len(lengths) == 1:
        assert layouts[0] == zigzag(lengths, 3)
    assert len(set(layouts)) == 1
    assert max(layouts[0].tokens_per_rank) - min(layouts[0].tokens_per_rank) <= 1


def small_subgroup(rank, world_size):
    """Ranks 2 and 3 form the SP group: ranks in it count from 0."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    parallel = SequenceParallel(groups[rank // 2])
    return parallel.rank, parallel.world_size, parallel.context((10,)).num_tokens_local


def test_ranks_count_within_the_group():
    assert run_ranks(small_subgroup, 4) == [(0, 2, 5), (1, 2, 5), (0, 2, 5), (1, 2, 5)]


def virtual_nodes(rank, world_size):
    assert SequenceParallel(dist.group.WORLD).topology == Topology(1, world_size)
    assert SequenceParallel(dist.group.WORLD, topology=Topology(2, 2)).topology == Topology(2, 2)
    with pytest.raises(ValueError, match="6 ranks.*4"):
        SequenceParallel(dist.group.WORLD, topology=Topology(2, 3))


def test_machines_are_known():
    run_ranks(virtual_nodes, 4)


def test_without_a_group_it_is_one_rank():
    seq = SequenceParallel().context((5, 2))
    assert seq.parallel.topology == Topology(1, 1)
    assert (seq.rank, seq.world_size, seq.num_tokens_local) == (0, 1, 7)
    assert seq.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_the_layout_can_be_named_or_given():
    assert SequenceParallel(layout="contiguous").base_layout((9, 4)) == contiguous((9, 4), 1)
    assert SequenceParallel(layout="zigzag").base_layout((9, 4)) == zigzag((9, 4), 1)
    layout = contiguous((9, 4), 1)
    assert SequenceParallel().context(layout).layout == layout


def test_contexts_are_kept():
    parallel = SequenceParallel()
    assert parallel.context((5, 2)) is parallel.context((5, 2))
    assert parallel.context((5, 2)) is not parallel.context((2, 5))


def test_contexts_may_be_built_on_other_threads():
    parallel = SequenceParallel()
    built, errors = {}, []

    def build(offset):
        try:
            for length in range(1, 60):
                seq = parallel.context((length, offset + 1))
                built[length, offset] = seq.num_tokens == length + offset + 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(built) == 4 * 59 and all(built.values())


def test_unknown_layouts_and_other_world_sizes_are_refused():
    with pytest.raises(ValueError, match="zagzig.*zigzag"):
        SequenceParallel(layout="zagzig")
    with pytest.raises(ValueError, match="2 ranks.*1"):
        SequenceParallel().context(contiguous((4,), 2))
    with pytest.raises(ValueError, match="length"):
        SequenceParallel().context((4, 0))
