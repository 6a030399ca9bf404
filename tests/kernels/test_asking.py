"""What ranks ask of one another and where it comes to lie, piece by piece."""

from types import SimpleNamespace

import pytest
import torch

from longspan.kernels.sparse import ask, asking, count, forms, place, rename

pytest.importorskip("longspan.kernels.sparse.asking_triton", reason="Triton is not installed")
RANKS, WIDTH = 4, 7


@pytest.fixture(params=["plain", "triton"])
def form(request, monkeypatch):
    monkeypatch.setattr(forms, "takes", lambda x: request.param == "triton")
    if request.param == "triton":
        from longspan.kernels.sparse import asking_triton

        monkeypatch.setattr(asking_triton, "TILE", 4)  # several to a list and to a rank


def make(lists, turns):
    """(blocks that every rank lists, pieces of each block, Pieces of every rank)."""
    generator = torch.Generator().manual_seed(10 * lists + turns)
    local = [WIDTH, 4, 0, 5]  # pieces of each rank
    there = torch.cat([rank * WIDTH + torch.arange(n) for rank, n in enumerate(local)])
    there = there[torch.randperm(len(there), generator=generator)]
    of_block = torch.full((-(-len(there) // turns), turns), -1)
    of_block.view(-1)[: len(there)] = there
    chosen = [torch.randint(-1, len(of_block), (lists, rows, 3), generator=generator) for rows in (5, 2, 0, 6)]
    columns = torch.randint(1, 9, (4, RANKS * WIDTH), generator=generator).int()
    columns[0][[n for n in range(RANKS * WIDTH) if n not in there.tolist()]] = 0
    keys = [
        SimpleNamespace(
            starts=columns[3],
            lengths=columns[0],
            positions=columns[1],
            steps=columns[2],
            width=WIDTH,
            size=8,
            local=range(local[rank]),
        )
        for rank in range(RANKS)
    ]
    return [x.int() for x in chosen], of_block, keys


@pytest.mark.parametrize("lists, turns", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    "own, groups, window", [(False, 1, 0), (True, 1, 0), (True, 2, 0), (False, 1, 50), (True, 2, 50)]
)
def test_places_and_numbers(lists, turns, own, groups, window, form):
    if lists % groups:
        pytest.skip("one list is one group")
    chosen, of_block, keys = make(lists, turns)
    pieces = [
        [[[n for b in row if b >= 0 for n in of_block[b].tolist() if n >= 0] for row in x] for x in blocks.tolist()]
        for blocks in chosen
    ]
    named = [[sorted({n for row in rows for n in row}) for rows in of_rank] for of_rank in pieces]  # [who][list]
    lengths = keys[0].lengths.tolist()
    asked = [ask(blocks, of_block, RANKS, WIDTH) for blocks in chosen]
    shown = torch.stack([x for _, x in asked])
    counts = count(shown, keys[0].lengths, lists)
    for who in range(RANKS):
        assert asked[who][0].shape[2] == 3 * turns
        found = [[[n for n in row if n >= 0] for row in rows] for rows in asked[who][0].tolist()]
        assert found == pieces[who]
        for owner in range(RANKS):
            theirs = [[n for n in x if n // WIDTH == owner] for x in named[who]]
            entries = sum(n // WIDTH == owner for rows in pieces[who] for row in rows for n in row)
            wanted = [*(sum(lengths[n] for n in x) for x in theirs), *map(len, theirs), entries]
            assert counts[who, owner].tolist() == wanted
    for rank in range(RANKS):
        table, arriving, places = place(shown, counts, keys[rank], lists, rank, own, groups, window)
        others, halves = [n for n in range(RANKS) if n != rank], torch.arange(lists).chunk(groups)
        order = [(rank, x) for x in range(lists)] * own
        order += [(owner, x) for half in halves for owner in others for x in half.tolist()]
        coming = [(x, n) for owner, x in order for n in named[rank][x] if n // WIDTH == owner]
        number = {pair: at + (0 if own else len(arriving)) for at, pair in enumerate(coming)}
        begin, last = 0, len(coming)
        assert last <= len(arriving)
        for x in range(lists):
            for n in range(RANKS * WIDTH):
                here = n % WIDTH if n // WIDTH == rank and not own else -1
                assert table[x, n] == number.get((x, n), here)
        for at, (_, n) in enumerate(coming):
            columns = arriving.start, arriving.length, arriving.position, arriving.step, arriving.document
            values = begin, lengths[n], int(keys[0].positions[n]), int(keys[0].steps[n]), lengths[n]
            assert tuple(int(column[at]) for column in columns) == values
            begin += lengths[n]
        wanted, row = torch.full((RANKS, lists, len(keys[rank].local)), -1), 0
        for at, (who, x) in enumerate(order):
            row = 0 if at == own * lists else row  # others' are in another buffer
            for n in named[who][x]:
                if n // WIDTH == rank:
                    slot = (who - (who > rank)) * lists + x
                    there = slot * window + int(keys[0].starts[n])  # where it is here
                    wanted[who, x, n % WIDTH] = there if window and who != rank else row
                    row += lengths[n]
        assert torch.equal(places, wanted.int())
        columns = rename(asked[rank][0], table)
        for x in range(lists):
            flat = asked[rank][0][x].flatten().tolist()
            assert columns[x].flatten().tolist() == [-1 if n < 0 else int(table[x, n]) for n in flat]


def test_entries_are_counted_where_they_are_asked_for(form):
    chosen, of_block, _ = make(2, 1)
    (_, shown), (_, without) = (ask(chosen[0], of_block, RANKS, WIDTH, listed=given) for given in (True, False))
    assert shown[: 4 * RANKS].any() and not without[: 4 * RANKS].any()
    assert torch.equal(*(asking.flags_of(x[None].expand(RANKS, -1), 2, WIDTH) for x in (shown, without)))
