"""What ranks are expected to ask for, against what selections choose of random queries and keys."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import longspan
from longspan.attention.expected_requests import expected_requests
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.selections import TopBlocks
from longspan.parallel import Layout, SequenceParallel, Span, contiguous, zigzag
from longspan.parallel.balanced import balanced

CASES = {
    "top": (TopBlocks(3, query_block=8, key_block=4), True),
    "top, a share": (TopBlocks(0.05, query_block=4, key_block=16), True),
    "top, both ways": (TopBlocks(3, query_block=8, key_block=4), False),
    "one level": (Hierarchical(4, 3, 1), True),
    "two levels": (Hierarchical(8, 2, 2), True),
    "two levels, both ways": (Hierarchical(8, 2, 2), False),
    "three levels": (Hierarchical(4, 2, 3), True),
}
LAYOUTS = {
    "zig-zag": zigzag([3000], 2),
    "four ranks": balanced([2500], 4),
    "documents": contiguous([1500, 37, 900, 1], 3),
    "by turns": Layout([600], [[Span(0, n, n + 30) for n in range(first, 600, 60)] for first in (0, 30)]),
}


@lru_cache
def held(layout, block):
    """[blocks of all documents, ranks]: tokens that each rank holds."""
    rows = []
    for document, length in enumerate(layout.lengths):
        owner = np.zeros(length, int)
        for rank, spans in enumerate(layout.spans):
            for span in spans:
                if span.document == document:
                    owner[span.start : span.stop] = rank
        for begin in range(0, length, block):
            rows.append(np.bincount(owner[begin : begin + block], minlength=layout.world_size))
    return np.array(rows)


def requests(chosen, layout, query_block, key_block):
    """(tokens, listed) [who, whom] of one list: for all query blocks of all documents, key blocks, -1 for none."""
    queries, keys = held(layout, query_block), held(layout, key_block)
    found = np.zeros((2, layout.world_size, layout.world_size))
    for who in range(layout.world_size):
        named = np.concatenate([row for mine, row in zip(queries[:, who], chosen, strict=True) if mine])
        times = np.bincount(named[named >= 0], minlength=len(keys))
        found[:, who] = (times > 0) @ keys, times @ (keys / keys.sum(1, keepdims=True))
        found[:, who, who] = 0
    return found


def drawn(selection, length, causal, random):
    """Key blocks of one document that every query block names, drawn evenly."""
    if isinstance(selection, TopBlocks):
        for begin in range(0, length, selection.query_block):
            candidates = (begin if causal else length + selection.key_block - 1) // selection.key_block
            wanted = selection.keep if selection.keep >= 1 else max(1, int(selection.keep * candidates))
            yield random.permutation(candidates)[:wanted]
        return
    above, block = None, selection.block
    for level in range(selection.levels, 0, -1):
        rows, found = -(-length // block**level), []
        for row in range(rows):
            if above is None:
                candidates = range(row if causal else rows)
            else:
                mine = [*above[row // block], *([row // block] if causal else [])]
                candidates = [x for up in mine for x in range(up * block, min(rows, (up + 1) * block))]
                candidates = [x for x in candidates if x < row or not causal]
            found.append(random.permutation(candidates).astype(int)[: selection.keep])
        above = found
    yield from above


def sizes_of(selection):
    return [getattr(selection, name, getattr(selection, "block", 0)) for name in ("query_block", "key_block")]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("selection, causal", CASES.values(), ids=list(CASES))
def test_even_choices_ask_for_what_is_expected(selection, causal, layout):
    random, sizes, counts = np.random.default_rng(0), sizes_of(selection), []
    for _ in range(30):
        rows, base = [], 0
        for length in layout.lengths:
            rows += [row + base for row in drawn(selection, length, causal, random)]
            base += -(-length // sizes[1])
        counts.append(requests(rows, layout, *sizes))
    for found, wanted in zip(expected_requests(selection, layout, causal), np.mean(counts, 0)):
        assert np.abs(found - wanted).max() <= 0.1 * wanted.max() + sizes[1], (found, wanted)


@pytest.mark.parametrize("selection, causal", CASES.values(), ids=list(CASES))
def test_real_choices_ask_for_no_more(selection, causal):
    """Of random queries and keys. Under a row that chose, queries agree somewhat: so do the parts of what it chose."""
    layout = LAYOUTS["zig-zag"]
    q, k = torch.randn(2, layout.num_tokens, 16, 192)
    tables = selection.tables(SequenceParallel().context(layout.lengths), causal)
    coarse, _ = selection.coarse(k, k, tables, None)
    chosen, _ = selection.choose(q, k, coarse, tables, None)
    wanted = np.mean([requests(rows.numpy(), layout, *sizes_of(selection))[0] for rows in chosen], 0)
    found = expected_requests(selection, layout, causal)[0]
    assert wanted.sum() * 0.98 <= found.sum() <= wanted.sum() * 1.1


def test_where_all_are_chosen_all_that_a_mask_shows_are_asked_for():
    layout = zigzag([512], 2)  # quarters: one rank has the outer, one the inner
    for selection in (TopBlocks(1000, 32, 16), Hierarchical(4, 1000, 2)):
        assert expected_requests(selection, layout, True)[0] == pytest.approx(np.array([[0, 256], [128, 0]]))
        assert expected_requests(selection, layout, False)[0] == pytest.approx(np.array([[0, 256], [256, 0]]))


def test_what_was_fetched_on_gpus_is_near():
    """Unique rows that lists of random inputs named, keys and values and their gradients of 4 heads, over 4 ranks."""
    path = Path(longspan.__file__).parent / "benchmarks" / "results" / "sparse_ranks_4xH200.json"
    selections = {"sla_ratio": TopBlocks(), "sla_top16": TopBlocks(16), "llsa2": Hierarchical()}
    selections["llsa3"] = Hierarchical(levels=3)
    rows = [row for row in json.loads(path.read_text())["rows"] if row["strategy"] == "fetch"]
    assert {row["case"] for row in rows} == selections.keys()
    for row in rows:
        tokens, _ = expected_requests(selections[row["case"]], zigzag([row["tokens"]], 4), False)
        assert tokens.sum() / 4 * 4 * 4 * 128 * 2 / 2**20 == pytest.approx(row["blocks_mib"], rel=0.1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_documents_on_one_rank_ask_for_nothing(ranks):
    lengths, selection = [2048, 300, 300, 300, 300], Hierarchical(4, 8, 2)
    layout = balanced(lengths, ranks)
    cut = {d for d in range(5) if sum(any(span.document == d for span in spans) for spans in layout.spans) > 1}
    assert 0 in cut and len(cut) < 5
    kept = {d: n for n, d in enumerate(sorted(cut))}
    alone = Layout(
        [lengths[d] for d in sorted(cut)],
        [[Span(kept[s.document], s.start, s.stop) for s in spans if s.document in cut] for spans in layout.spans],
    )
    for found, wanted in zip(expected_requests(selection, layout, True), expected_requests(selection, alone, True)):
        assert (found == wanted).all() and found.sum() > 0
    for found in expected_requests(selection, balanced([64] * 4, 4), True):
        assert found.shape == (4, 4) and not found.any()


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_unequal_popularity_are_named_less_often(causal):
    """Each drawn as often, beside others, as a weight of its own says, from an exponential distribution."""
    random, selection, layout = np.random.default_rng(0), TopBlocks(3, query_block=8, key_block=8), zigzag([2400], 2)
    counts = []
    for _ in range(30):
        weights = random.exponential(size=300)
        # The first of exponential times with these rates: one draw after the other without putting back.
        times = random.exponential(size=(300, 300)) / weights
        if causal:
            times[np.triu_indices(300)] = np.inf
        rows = [np.argsort(row)[: min(3, np.isfinite(row).sum())] for row in times]
        counts.append(requests(rows, layout, 8, 8)[0])
    wanted = np.mean(counts, 0).sum(1)
    even, found = (expected_requests(selection, layout, causal, alike)[0].sum(1) for alike in (False, True))
    assert np.abs(found / wanted - 1).max() < 0.1 < (even / wanted - 1).min(), (found, wanted, even)
