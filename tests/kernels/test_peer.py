"""Gathers through shared memory, kernel by kernel: several ranks in one process, each with a window of its own."""

import pytest
import torch
from devices import DEVICES

from longspan.kernels import peer_triton

WORLD, CAPACITY = 3, 1 << 15


class Ranks:
    """All ranks of a group on one device. Every rank pushes before any collects, so that none waits."""

    def __init__(self, device):
        self.device = device
        self.memory = [
            torch.full((peer_triton.SLOTS * WORLD * CAPACITY,), -1, dtype=torch.int32, device=device)
            for _ in range(WORLD)
        ]
        words = peer_triton.flag_words(WORLD)
        self.flags = [torch.zeros(words, dtype=torch.int32, device=device) for _ in range(WORLD)]
        self.calls = [torch.zeros(2, WORLD, peer_triton.PARTS, dtype=torch.int32, device=device) for _ in range(WORLD)]
        self.addresses = [
            torch.tensor([x.data_ptr() for x in tensors], device=device) for tensors in (self.memory, self.flags)
        ]

    def push(self, rank, x, y):
        peer_triton.push(x, y, *self.addresses, self.calls[rank], rank, CAPACITY)

    def collect(self, rank, x, y):
        out, out_y = (None if t is None else t.new_full((WORLD, *t.shape), float("nan")) for t in (x, y))
        peer_triton.collect(out, out_y, *self.addresses, self.calls[rank], rank, CAPACITY)
        return out, out_y


@pytest.fixture(params=DEVICES)
def ranks(request, monkeypatch):
    if request.param == "cpu":  # fewer programs for the interpreter, and several blocks each
        monkeypatch.setattr(peer_triton, "PARTS", 2)
        monkeypatch.setattr(peer_triton, "BLOCK", 1024)
    return Ranks(request.param)


def inputs(call, device):
    """Of every rank, of sizes that change from call to call: blocks and parts that are full, cut off or empty."""
    shape = [(1,), (3, 5, 7), (2, 4096), (4, 2999), (1, 16384)][call % 5]
    y_shape, y_dtype = [(None, None), ((5,), torch.float64), ((3, 333), torch.float32)][call % 3]
    xs = [torch.randn(shape, device=device) for _ in range(WORLD)]
    ys = [None if y_shape is None else torch.randn(y_shape, dtype=y_dtype, device=device) for _ in range(WORLD)]
    return xs, ys


def check(ranks, xs, ys):
    for rank in range(WORLD):
        out, out_y = ranks.collect(rank, xs[rank], ys[rank])
        torch.testing.assert_close(out, torch.stack(xs), rtol=0, atol=0)
        if out_y is not None:
            torch.testing.assert_close(out_y, torch.stack(ys), rtol=0, atol=0)


def test_every_rank_gets_what_all_pushed_place_after_place(ranks):
    for call in range(2 * peer_triton.SLOTS + 1):
        xs, ys = inputs(call, ranks.device)
        for rank in range(WORLD):
            ranks.push(rank, xs[rank], ys[rank])
        check(ranks, xs, ys)


def test_as_many_gathers_as_there_are_places_may_be_under_way(ranks):
    for first in range(0, 2 * peer_triton.SLOTS, peer_triton.SLOTS):
        calls = [inputs(first + n, ranks.device) for n in range(peer_triton.SLOTS)]
        for xs, ys in calls:
            for rank in range(WORLD):
                ranks.push(rank, xs[rank], ys[rank])
        for xs, ys in calls:
            check(ranks, xs, ys)


def test_what_does_not_fit_is_refused(ranks):
    with pytest.raises(AssertionError, match=str(CAPACITY)):
        ranks.push(0, torch.zeros(CAPACITY + 1, device=ranks.device), None)


@pytest.mark.gpu
def test_a_graph_of_it_can_be_replayed():
    ranks = Ranks("cuda")
    xs, _ = inputs(2, "cuda")

    def gather():
        for rank in range(WORLD):
            ranks.push(rank, xs[rank], None)
        return [ranks.collect(rank, xs[rank], None)[0] for rank in range(WORLD)]

    gather()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = gather()
    for _ in range(2 * peer_triton.SLOTS):
        for x in xs:
            x.normal_()
        graph.replay()
        for out in outs:
            torch.testing.assert_close(out, torch.stack(xs), rtol=0, atol=0)
