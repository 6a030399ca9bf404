"""What chooses blocks: sums of blocks, the highest scores of rows, the best children, each against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.kernels.sparse import (
    Blocks,
    Families,
    Ranges,
    blocks_below,
    descend,
    forms,
    mean_levels,
    pool,
    sum_levels,
    top,
)

top_triton = pytest.importorskip("longspan.kernels.sparse.top_triton", reason="Triton is not installed")
top_few_triton = pytest.importorskip("longspan.kernels.sparse.top_few_triton", reason="Triton is not installed")
FORMS = ["plain", "triton"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms on the CPU."""
    monkeypatch.setattr(forms, "takes", lambda x: request.param == "triton")
    return request.param


@pytest.fixture(params=[*FORMS, "few"])
def top_form(request, monkeypatch):
    """All forms of `top` on the CPU."""
    monkeypatch.setattr(forms, "takes", lambda x: request.param != "plain")
    if request.param == "triton":
        monkeypatch.setattr(top_few_triton, "SCORES", 0)
    return request.param


def whole_numbers(*shape, high=3, generator=None, device="cpu"):
    """Products of such means are exact in every form, and many are equal."""
    return torch.randint(-high, high + 1, shape, generator=generator).float().to(device)


def expected_top(means, keys, router, ranges, first=0, recent=0, always=None):
    """Lists [H][R] by sorting (score, number)."""
    lists = []
    for head in range(keys.shape[1]):
        scores = (means[:, head].double() @ keys[:, head].double().T).tolist()
        rows = []
        for row, (start, stop, most) in enumerate(zip(*(x.tolist() for x in (ranges.first, ranges.stop, ranges.most)))):
            forced = {*range(start, min(start + first, stop)), *range(max(start, stop - recent), stop)}
            line = {n: torch.inf if n in forced else scores[router[row]][n] for n in range(start, stop)}
            order = sorted(line, key=lambda n: (-line[n], n))
            rows.append(sorted(order[:most]) + ([] if always is None else [n for n in always[row].tolist() if n >= 0]))
        lists.append(rows)
    return lists


def unpadded(chosen):
    """Lists of a tensor; -1 only after the last."""
    lists = chosen.tolist()
    assert all(-1 not in row[: len(row) - row.count(-1)] for rows in lists for row in rows)
    return [[[n for n in row if n >= 0] for row in rows] for rows in lists]


def make_ranges(documents, rows, keep, causal):
    """Documents of so many keys, each with so many rows."""
    first = np.repeat(np.cumsum([0, *documents[:-1]]), rows)
    share = np.tile(np.arange(rows), len(documents)) / rows if causal else 1.0
    return Ranges.of(first, (first + np.repeat(documents, rows) * share).astype(np.int64), keep)


# name: (keys of every document, rows of a document, heads, head dim, keep, causal, first, recent, always)
TOP = {
    "few": ((9,), 3, 2, 5, 2, False, 0, 0, 0),
    "share": ((200,), 20, 1, 16, 0.1, False, 0, 0, 0),
    "causal": ((150,), 40, 2, 16, 0.2, True, 2, 3, 2),
    "most of them": ((120,), 5, 1, 16, 0.9, False, 0, 0, 0),
    "documents": ((40, 1, 90, 3, 70), 4, 1, 20, 12, True, 1, 0, 3),
    "more forced than kept": ((100, 5), 6, 1, 16, 0.02, True, 3, 2, 0),
    "many more forced": ((120,), 5, 1, 16, 12, False, 20, 10, 0),
    "nothing but what always is": ((1,), 20, 1, 16, 2, True, 0, 0, 2),
    "all": ((80,), 3, 1, 16, 80, False, 0, 0, 1),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a few hundred keys take several tiles and passes."""
    monkeypatch.setattr(top_triton, "FEW", (16, 64, 4))
    monkeypatch.setattr(top_triton, "BAND", 8)


def make_top(name, device="cpu"):
    documents, rows, heads, dim, keep, causal, first, recent, more = TOP[name]
    generator = torch.Generator().manual_seed(len(name))
    ranges, num_keys = make_ranges(documents, rows, keep, causal), sum(documents)
    means = whole_numbers(len(ranges) + 2, heads, dim, generator=generator, device=device)
    keys = whole_numbers(num_keys + more, heads, dim, generator=generator, device=device)
    keys = keys.mT.contiguous().mT.bfloat16() if causal else keys  # exact in both
    router = torch.randint(0, len(means), (len(ranges),), generator=generator).int()
    always = None
    if more:
        listed = torch.randint(0, more + 1, (len(ranges), 1), generator=generator)
        always = torch.where(torch.arange(more) < listed, num_keys + torch.arange(more), -1).int().to(device)
    ranges = ranges.map(lambda x: x.to(device))
    return (means, keys, router.to(device), ranges), {"first": first, "recent": recent, "always": always}


@pytest.mark.parametrize("name", TOP)
def test_top_is_what_sorting_gives(name, top_form, small_tiles):
    given, options = make_top(name)
    assert unpadded(top(*given, **options)) == expected_top(*given, **options)


def scattered(generator, count=260):
    """Lines of scores of all sorts, [count] each."""
    at = torch.arange(float(count))
    sign = torch.randn(count, generator=generator).sign()
    return {
        "equal": torch.zeros(count),
        "zeros of both signs": torch.zeros(count) * sign,
        "two": (at % 7 == 3).float(),
        "over all magnitudes": 10.0 ** torch.randint(-30, 30, (count,), generator=generator) * sign,
        "a cluster": torch.where((at > 40) & (at < 70), 1000.0, 0.0) + at / 512,  # of which a sample sees little
        "descending": -at,
    }


def test_top_of_any_distribution(top_form, small_tiles):
    """A line per head, each upside down as well, and lists of all lengths side by side in a tile."""
    lines = torch.stack(list(scattered(torch.Generator().manual_seed(1)).values()), 1).to(torch.bfloat16).float()
    keys = torch.nn.functional.pad(lines[..., None], (0, 15))  # exact in halves
    means = torch.zeros(2, keys.shape[1], 16)
    means[0, :, 0], means[1, :, 0] = 1.0, -1.0
    most = torch.tensor([1, 7, 9, 40, 131, 259, 260]).repeat_interleave(2).int()
    first, stop = torch.zeros_like(most), torch.full_like(most, len(keys))
    ranges = Ranges(first, stop, most, torch.stack([first, stop], 1).numpy(), 260)
    given = means, keys, torch.arange(len(most), dtype=torch.int32) % 2, ranges
    assert unpadded(top(*given)) == expected_top(*given)


def test_top_of_forced_keys_that_no_sample_sees(top_form, small_tiles, monkeypatch):
    """The search then goes on up to the highest number there is."""
    monkeypatch.setattr(top_triton, "BAND", 2)
    generator = torch.Generator().manual_seed(0)
    means, keys = (torch.randn(n, 1, 16, generator=generator) for n in (4, 260))
    ranges = make_ranges((260,), 4, 1, False)
    assert unpadded(top(means, keys, torch.arange(4).int(), ranges, recent=3)) == [[[257]] * 4]


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("documents, causal", [((300,), False), ((300,), True), ((100, 70, 7, 150), True)])
def test_top_of_normal_numbers_is_right_but_for_near_ties(documents, causal, clustered):
    generator = torch.Generator().manual_seed(0)
    ranges = make_ranges(documents, 128 // len(documents), 0.1, causal)
    means, keys = (torch.randn(n, 1, 32, generator=generator) for n in (len(ranges), sum(documents)))
    keys = keys.cumsum(0) if clustered else keys
    for function in (top_triton.top_triton, top_few_triton.top_few_triton):
        check_near(means, keys, torch.arange(len(ranges)).int(), ranges, function)


def check_near(means, keys, router, ranges, function):
    """As many as asked for, of those in range, and none that is lower than one of them left out by more than products
    of halves may err."""
    chosen = function(means, keys, router, ranges, 0, 0, None)
    scores = torch.einsum("rhd,khd->hrk", means[router].double(), keys.double())
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=keys.device)
    taken = torch.nn.functional.pad(taken, (0, 1)).scatter_(2, chosen.long() % (len(keys) + 1), True)[..., :-1]
    assert torch.equal(taken.sum(2), ranges.most.expand(len(scores), -1).long())
    bound = 2.0**-15 * means[router].norm(dim=2).T.double() * keys.norm(dim=2).max()
    number = torch.arange(len(keys), device=keys.device)
    there = (number >= ranges.first[:, None]) & (number < ranges.stop[:, None])
    assert not (taken & ~there).any()
    worst = scores.masked_fill(~taken, torch.inf).amin(2) - scores.masked_fill(taken | ~there, -torch.inf).amax(2)
    assert (worst >= -bound).all(), worst.min()


POOL = {  # blocks: (offsets, size, heads in, heads out, head dim)
    "ragged": ((0, 70, 71, 200), 16, 2, 2, 20),
    "groups": ((0, 100), 64, 8, 2, 16),
    "long blocks": ((0, 300), 150, 3, 3, 5),
}


@pytest.mark.parametrize("name", POOL)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pool_and_its_gradient(name, mean, dtype, form):
    check_pool(name, mean, dtype, "cpu")


def check_pool(name, mean, dtype, device):
    offsets, size, heads, out_heads, dim = POOL[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(offsets[-1], dim, heads, generator=generator).to(device, dtype).mT.requires_grad_()  # strided
    blocks = Blocks.of(offsets, size).map(lambda t: t.to(device))
    out = pool(x, blocks, heads=out_heads, mean=mean)
    rows = [x[a : a + n].double().unflatten(1, (out_heads, -1)) for a, n in zip(blocks.start, blocks.length)]
    wanted = torch.stack([(r.mean((0, 2)) if mean else r.sum((0, 2))) for r in rows])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=generator).to(device)
    actual, expected = (torch.autograd.grad(y, x, g)[0] for y, g in ((out, grad), (wanted, grad.double())))
    torch.testing.assert_close(actual, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_means_and_sums_of_levels(count, dtype, form):
    """Means of two tensors side by side, the second with other strides, and sums of one, over heads that belong
    together; every level against its tokens."""
    check_levels(count, dtype, "cpu")


def check_levels(count, dtype, device):
    generator, offsets = torch.Generator().manual_seed(0), (0, 70, 71, 200)
    x, y = (torch.randn(200, 6, 20, generator=generator).to(device, dtype) for _ in range(2))
    y = y.mT.contiguous().mT
    levels, starts = [Blocks.of(offsets, 4)], [Blocks.of(offsets, 4).start.numpy()]
    rows = np.searchsorted(starts[0], offsets)
    for _ in range(count - 1):
        levels.append(Blocks.of(tuple(rows), 4))
        starts.append(starts[-1][levels[-1].start.numpy()])
        rows = np.searchsorted(starts[-1], offsets)
    ends = [np.append(at[1:], 200) for at in starts]
    size = torch.from_numpy(np.concatenate([b - a for a, b in zip(starts, ends)])).int().to(device)
    levels = [blocks.map(lambda t: t.to(device)) for blocks in levels]
    means = mean_levels((x, y), levels, size, x.dtype)
    spans = [(a, b) for start, stop in zip(starts, ends) for a, b in zip(start, stop)]
    wanted = torch.stack([torch.cat([t[a:b].double().mean(0) for t in (x, y)]) for a, b in spans])
    assert means.dtype == dtype and len(spans) == len(size)
    torch.testing.assert_close(means.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    sums = sum_levels(y, levels, 2)
    wanted = torch.stack([y[a:b].double().sum(0).unflatten(0, (2, 3)).sum(1) for a, b in spans])
    assert [len(x) for x in sums] == list(map(len, starts)) and sums[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(sums).double(), wanted, rtol=1e-5, atol=1e-5)


def make_families(seed, documents, block, chosen, device="cpu"):
    """Rows of documents under parents, half of them choosing; lists of `chosen` rows above of the same document."""
    generator = torch.Generator().manual_seed(seed)
    start, length, parent, lists, above = [], [], [], [], 0
    for rows in documents:
        begin, parents = len(parent), -(-rows // block)
        start += range(begin, begin + rows, block)
        length += [min(block, begin + rows - at) for at in range(begin, begin + rows, block)]
        parent += [above + n // block for n in range(rows)]
        for n in range(parents):  # of the past, as under a causal mask
            few = torch.randperm(n, generator=generator)[:chosen].sort().values + above
            lists.append(torch.nn.functional.pad(few, (0, chosen - len(few)), value=-1))
        above += parents
    parent = np.array(parent)
    chooses = torch.randperm(len(parent), generator=generator)[: len(parent) // 2 + 1].sort().values.numpy()
    groups = [[i for i, row in enumerate(chooses) if parent[row] == p] for p in range(above)]
    used = [(p, group) for p, group in enumerate(groups) if group]
    table = [group + [-1] * (block - len(group)) for _, group in used]
    router = np.maximum(np.arange(len(parent)) - 1, 0)
    columns = parent, start, length, router, chooses, table, [p for p, _ in used]
    families = Families(*(torch.tensor(np.array(x), dtype=torch.int32, device=device) for x in columns), block)
    return families, torch.stack(lists).int().expand(2, -1, -1).contiguous().to(device)


def check_descend(seed, documents, block, chosen, dim, keep, causal, device="cpu"):
    families, above = make_families(seed, documents, block, chosen, device)
    generator = torch.Generator().manual_seed(seed)
    means, keys = (whole_numbers(sum(documents), 2, dim, generator=generator, device=device) for _ in range(2))
    keys = keys.bfloat16() if seed % 2 else keys  # exact in both
    chosen = descend(means, keys, above, families, keep, causal)
    always = (torch.arange(2 * chosen.shape[1]).view(-1, 2) + len(keys)).int().to(device)
    more = descend(means, keys, above, families, keep, causal, always)
    assert torch.equal(more, torch.cat([chosen, always.expand(2, -1, -1)], 2))
    found = unpadded(chosen)
    start, length = (x.tolist() for x in (families.start, families.length))
    for head in range(2):
        scores = means[:, head].double() @ keys[:, head].double().T
        for place, row in enumerate(families.chooses.tolist()):
            parent = int(families.parent[row])
            parents = [p for p in above[head, parent].tolist() if p >= 0] + [parent] * causal
            candidates = [c for p in parents for c in range(start[p], start[p] + length[p]) if not causal or c < row]
            line = scores[int(families.router[row])].tolist()
            assert found[head][place] == sorted(sorted(candidates, key=lambda c: (-line[c], c))[:keep]), (
                row,
                candidates,
            )


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_below(causal, form):
    check_blocks_below(causal, "cpu")


def check_blocks_below(causal, device):
    """Lists of rows above turn into the blocks under them, and under the row itself; and what is always listed."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(-1, 700, (3, 700, 5), generator=generator).int()
    blocks = torch.cat([torch.randint(-1, 99, (700, 2), generator=generator), torch.full((1, 2), -1)]).int()
    rows = torch.arange(1400) // 2
    wanted = [
        [[n for above in [*line, *[row] * causal] for n in blocks[above].tolist()] for row, line in zip(rows, lines)]
        for lines in found[:, rows].tolist()
    ]
    given = [x.to(device) for x in (found, rows, blocks)]
    assert blocks_below(*given, causal).tolist() == wanted
    for more in (0, 3):
        always = torch.randint(-1, 99, (1400, more), generator=generator).int()
        lists = [[line + last for line, last in zip(lines, always.tolist())] for lines in wanted]
        assert blocks_below(*given, causal, always.to(device)).tolist() == lists


@settings(max_examples=8, deadline=None)
@example(0, (1,), 3, 1, 2, True)
@example(1, (30, 8), 4, 3, 5, True)
@given(
    st.integers(0, 2**20), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(2, 9), st.integers(1, 4),
    st.integers(1, 12), st.booleans(),
)  # fmt: skip
def test_descend_is_what_sorting_gives(seed, documents, block, chosen, keep, causal):
    for which in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forms, "takes", lambda x, which=which: which == "triton")
            check_descend(seed, documents, block, chosen, 5, keep, causal)


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("name", TOP)
    @pytest.mark.parametrize("kept", [1 << 24, 0])
    def test_top_is_what_sorting_gives(self, name, kept, monkeypatch):
        monkeypatch.setattr(top_few_triton, "SCORES", kept)
        given, options = make_top(name, "cuda")
        assert forms.takes(given[0])
        chosen = top(*given, **options)
        assert unpadded(chosen) == expected_top(*given, **options)
        assert all(torch.equal(chosen, top(*given, **options)) for _ in range(3)), "differs from run to run"

    @pytest.mark.parametrize("keep", [3, 0.05, 0.3])
    @pytest.mark.parametrize("documents, dim", [((16384,), 128), ((2048, 512, 100, 3000), 64)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_top_of_many(self, documents, dim, keep, causal):
        generator = torch.Generator("cuda").manual_seed(0)
        ranges = make_ranges(documents, 300, keep, causal).map(lambda x: x.cuda())
        means = torch.randn(len(ranges), 2, dim, device="cuda", generator=generator)
        keys = torch.randn(sum(documents), 2, dim, device="cuda", generator=generator).cumsum(0) / 30  # clustered
        given = means, keys, torch.arange(len(ranges), device="cuda").int(), ranges
        check_near(*given, top_triton.top_triton)
        if top_few_triton.takes(ranges, 2):
            check_near(*given, top_few_triton.top_few_triton)

    @pytest.mark.parametrize("name", POOL)
    @pytest.mark.parametrize("mean", [False, True])
    def test_pool_and_its_gradient(self, name, mean):
        check_pool(name, mean, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_means_and_sums_of_levels(self, count):
        check_levels(count, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_descend_is_what_sorting_gives(self, causal, dim):
        check_blocks_below(causal, "cuda")
        check_descend(dim // 64, (1000, 17, 300), 16, 8, dim, 8, causal, "cuda")
