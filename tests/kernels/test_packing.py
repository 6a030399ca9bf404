"""Blocks packed for other ranks, and what comes back for them, row by row."""

import pytest
import torch
from sparse_oracle import make_shares

from longspan.kernels.sparse import Blocks, Packing, add_packed, add_shares, forms, pack

pytest.importorskip("longspan.kernels.sparse.packing_triton", reason="Triton is not installed")
RANKS, HEADS = 3, 2


@pytest.fixture(params=["plain", "triton"])
def form(request, monkeypatch):
    monkeypatch.setattr(forms, "takes", lambda x: request.param == "triton")
    return request.param


def make(size, lists):
    """(blocks with some of no rows, flags, what lies in each row of the buffer: (rank, head or None, token))."""
    blocks = Blocks.of((0, 3 * size + 1, 3 * size + 2, 5 * size), size)
    blocks = blocks.map(lambda x: torch.cat([x, x.new_zeros(2)]))
    flags = torch.rand(RANKS, lists, len(blocks), generator=torch.Generator().manual_seed(size)) < 0.5
    flags[1], rows = False, []
    for rank in range(RANKS):
        for head in range(lists):
            for block in flags[rank, head].nonzero().flatten().tolist():
                first = int(blocks.start[block])
                tokens = range(first, first + int(blocks.length[block]))
                rows += [(rank, head if lists > 1 else slice(None), token) for token in tokens]
    return blocks, flags.to(torch.uint8), rows


def packing_of(blocks, flags, own=-1):
    """Of flags [ranks, lists, blocks]; the rows of rank `own` in a buffer of their own."""
    rows = flags * blocks.length
    places = torch.full_like(rows, -1)
    for ranks in [range(len(rows))] if own < 0 else [[n for n in range(len(rows)) if n != own], [own]]:
        some = rows[list(ranks)]
        at = some.flatten().cumsum(0).view(some.shape) - some
        places[list(ranks)] = torch.where(flags[list(ranks)] > 0, at, -1).int()
    return Packing(blocks, places, own)


@pytest.mark.parametrize("size, dim", [(4, 8), (4, 20), (7, 8), (7, 20), (80, 20)])
@pytest.mark.parametrize("lists", [1, HEADS])
def test_there_and_back(size, lists, dim, form):
    blocks, flags, rows = make(size, lists)
    total = 5 * size
    # As they come out of one projection: heads of keys beside those of values.
    k, v = torch.randn(total, 2 * HEADS, dim).to(torch.bfloat16).chunk(2, 1)
    for own in (-1, 0, 1):  # rank 1 has nothing
        packing = packing_of(blocks, flags, own)
        apart = sum(rank == own for rank, *_ in rows)
        front = k.new_empty(apart + 3, 2 * packing.heads_of(k), dim)
        packed = pack((k, v), packing, len(rows) - apart, front)
        buffers = torch.cat([front[:apart], packed]).chunk(2, 1)  # rank 0 comes first anyhow
        for x, buffer in zip((k, v), buffers, strict=True):
            wanted = torch.stack([x[token, head].view(-1, dim) for _, head, token in rows])
            assert torch.equal(buffer, wanted)

        returned = [torch.randn(x.shape) for x in buffers]
        before = [torch.randn(total, HEADS, dim) for _ in range(2)]
        shares, *more = make_shares(blocks, HEADS, dim)
        for given in (None, shares):
            found = [x.clone() for x in before]
            wanted = [torch.zeros_like(x).double() if own == 0 else x.double() for x in before]
            for x, y in zip(wanted, returned):
                for (_, head, token), row in zip(rows, y):
                    x[token, head] += row.double() if lists == 1 else row[0].double()
            if given is not None:
                wanted = [x + y for x, y in zip(wanted, more, strict=True)]
            theirs = [x[:apart] for x in returned] if own >= 0 else None
            add_packed(found, packing, [x[apart:] for x in returned], given, theirs, fresh=own == 0)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    alone = [torch.zeros(total, HEADS, dim) for _ in range(2)]
    add_shares(alone, blocks, shares)
    for x, y in zip(alone, more, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_sums_are_in_the_order_of_ranks(form):
    """1 + 2^-30 - 1 in fp32 is 0 in one order and 2^-30 in another."""
    blocks = Blocks.of((0, 2), 2)
    rows = torch.tensor([1.0, -1.0, 2.0**-30]).repeat_interleave(2).view(3, 2, 1, 1)
    for own in (-1, 1):
        packing = packing_of(blocks, torch.ones(RANKS, 1, 1, dtype=torch.uint8), own)
        returned = [torch.cat([row for rank, row in enumerate(rows) if rank != own]) for _ in range(2)]
        found = [torch.zeros(2, 1, 1) for _ in range(2)]
        add_packed(found, packing, returned, own=None if own < 0 else [rows[own]] * 2)
        assert all((x == 2.0**-30).all() for x in found)


def test_nothing_to_send(form):
    blocks = Blocks.of((0, 5), 4)
    packing = packing_of(blocks, torch.zeros(RANKS, 1, 2, dtype=torch.uint8))
    k = torch.randn(5, 1, 8)
    buffers = pack((k, k), packing, 0).chunk(2, 1)
    assert [x.shape for x in buffers] == [(0, 1, 8)] * 2
    found = [k.clone(), k.clone()]
    add_packed(found, packing, buffers)
    assert all(torch.equal(x, k) for x in found)
