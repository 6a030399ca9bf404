"""Blocks read from other ranks' windows and gradients written there, row by row: all ranks in one process."""

from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES

pytest.importorskip("triton", reason="Triton is not installed")
from longspan.kernels.sparse import peers_triton  # noqa: E402
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
