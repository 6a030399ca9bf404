"""Blocks read from other ranks' windows and gradients written there, row by row: all ranks in one process."""

from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES

pytest.importorskip("triton", reason="Triton is not installed")
from longspan.kernels.sparse import READ_PAST, peers_triton  # noqa: E402
from longspan.kernels.sparse.peer_windows import window_bytes  # noqa: E402

RANKS = 3


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(peers_triton, "WORDS", 256)  # several tiles of a rank, and several turns of a block
    return request.param


def make(size, lists, device):
    """(Pieces of all ranks, their table and starts, offset, {(list, piece): first row}, rows of a buffer): what rank 1
    names, which is something of every rank, with blocks of fewer rows."""
    generator = torch.Generator().manual_seed(10 * size + lists)
    counts, width = (5, 3, 4), 5
    lengths, starts = torch.zeros(RANKS * width, dtype=torch.int32), torch.zeros(RANKS * width, dtype=torch.int32)
    for rank, count in enumerate(counts):
        mine = torch.randint(1, size + 1, (count,), generator=generator).int()
        lengths[rank * width : rank * width + count] = mine
        starts[rank * width : rank * width + count] = mine.cumsum(0) - mine
    tokens = tuple(lengths.view(RANKS, width).sum(1).tolist())
    keys = SimpleNamespace(size=size, width=width, tokens=tokens, lengths=lengths.to(device), starts=starts.to(device))
    table, offset, at, first, row = torch.full((lists, RANKS * width), -1), 7, [], {}, 0
    for listed in range(lists):
        for piece in torch.randperm(RANKS * width, generator=generator).tolist()[: 2 * width]:
            if lengths[piece]:
                table[listed, piece] = len(at) + offset
                at.append(row)
                if piece // width != 1:
                    first[listed, piece] = row
                row += int(lengths[piece])
    return keys, table.int().to(device), torch.tensor(at).int().to(device), offset, first, row


@pytest.mark.parametrize("size, dtype", [(4, torch.float32), (3, torch.bfloat16), (10, torch.float64)])
@pytest.mark.parametrize("lists, heads, programs", [(1, 2, 5), (2, 1, 1), (4, 1, 3)])
def test_there_and_back(size, dtype, lists, heads, programs, device):
    keys, table, starts, offset, first, rows = make(size, lists, device)
    most, all_heads, dim, rank = max(keys.tokens), lists * heads, 24, 1
    held, returned = window_bytes(most, RANKS, all_heads, dim, dtype.itemsize)
    windows = [torch.full((held + returned,), 255, dtype=torch.uint8, device=device) for _ in range(RANKS)]  # NaN
    addresses = torch.tensor([x.data_ptr() for x in windows], device=device)
    there = [x[:held].view(dtype).view(2, most, all_heads, dim) for x in windows]
    for x, count in zip(there, keys.tokens, strict=True):
        x[:, :count] = torch.randn(2, count, all_heads, dim, device=device).to(dtype)
    buffer = torch.full((rows + 3, 2 * heads, dim), torch.nan, dtype=dtype, device=device)
    wanted = buffer.clone()
    for (listed, piece), row in first.items():
        begin, count = int(keys.starts[piece]), int(keys.lengths[piece])
        of_list = slice(listed * heads, (listed + 1) * heads)
        for n in range(2):
            rows_there = there[piece // keys.width][n, begin : begin + count, of_list]
            wanted[row : row + count, n * heads : (n + 1) * heads] = rows_there
    for some in (range(0, lists // 2), range(lists // 2, lists)):
        given = addresses, table, starts, keys, rank, offset, some
        peers_triton.pull_blocks(*buffer.chunk(2, 1), *given, programs)
    assert torch.equal(buffer.nan_to_num(9.0), wanted.nan_to_num(9.0)) and not buffer.isnan().all()

    gradients = [torch.randn(rows + 3, heads, dim, device=device).to(dtype) for _ in range(2)]
    before = [x.clone() for x in windows]
    peers_triton.push_blocks(*gradients, addresses, held, table, starts, keys, rank, offset, programs)
    for owner, (window, wanted) in enumerate(zip(windows, before, strict=True)):
        back = wanted[held:].view(dtype).view(2, RANKS - 1, lists, most, heads, dim)
        slot = 0 if owner == 0 else 1  # of rank 1: ranks but the owner, in order
        for (listed, piece), row in first.items():
            begin, count = int(keys.starts[piece]), int(keys.lengths[piece])
            if piece // keys.width == owner:
                for n in range(2):
                    back[n, slot, listed, begin : begin + count] = gradients[n][row : row + count]
        assert torch.equal(window, wanted), owner
    assert {piece // keys.width for _, piece in first} == {0, 2}


@pytest.mark.parametrize("groups, own", [(1, True), (2, True), (4, True), (1, False), (2, False)])
def test_rows_behind_every_group_are_cleared(groups, own, device):
    """As far as the buffer goes, which ends amid those behind the last group."""
    lists, rank = 4, 1
    counts = torch.randint(50, 70, (RANKS, RANKS, 2 * lists + 1), generator=torch.Generator().manual_seed(groups))
    before, ends = int(counts[rank, rank, :lists].sum()) * own, []
    for group in counts[rank, [0, 2], :lists].view(2, groups, -1).sum((0, 2)).tolist():
        before += group
        ends.append(before)
    buffer = torch.full((before + 9, 2, 8), torch.nan, dtype=torch.bfloat16, device=device)
    peers_triton.clear_behind(buffer, counts.to(device), rank, own, groups)
    behind = {row for end in ends for row in range(end, min(end + READ_PAST, len(buffer)))}
    for row, values in enumerate(buffer.cpu()):
        assert values.eq(0).all() if row in behind else values.isnan().all(), row


def test_kernels_read_no_further():
    from longspan.kernels.sparse.hopper import ROWS

    run = pytest.importorskip("longspan.kernels.sparse.hopper.run", reason="Triton has no Gluon")
    assert max(tile for table in (run.FORWARD, run.QUERIES) for tile, *_ in table.values()) <= READ_PAST == 2 * ROWS
