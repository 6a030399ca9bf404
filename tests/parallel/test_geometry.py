"""The one derivation of what attention sees, against counting every pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.parallel import Mask, Span, attention_pairs, contiguous, zigzag

MASKS = st.one_of(
    st.sampled_from([Mask(), Mask(causal=False)]), st.integers(1, 12).map(lambda window: Mask(window=window))
)
SPANS = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda x: Span(0, x[0], x[0] + x[1]))


def sees(mask, query, key):
    if not mask.causal:
        return True
    return key <= query and (mask.window is None or key > query - mask.window)


@given(MASKS, SPANS, SPANS)
def test_visible_keys_and_sees_all(mask, queries, keys):
    pairs = [[sees(mask, q, k) for k in range(keys.start, keys.stop)] for q in range(queries.start, queries.stop)]
    seen = [keys.start + i for i, column in enumerate(zip(*pairs, strict=True)) if any(column)]
    part = mask.visible_keys(queries, keys)
    assert mask.sees_all(queries, keys) == all(map(all, pairs))
    if seen:
        assert part is not None and part.start <= seen[0] and part.stop > seen[-1]
        if mask.window is None:
            assert (part.start, part.stop) == (seen[0], seen[-1] + 1)
    else:
        assert part is None


@given(MASKS, SPANS, SPANS)
def test_pieces_are_every_visible_pair_once(mask, queries, keys):
    if queries != keys and queries.start < keys.stop and keys.start < queries.stop:
        keys = Span(0, queries.stop, queries.stop + len(keys))  # neighbours, not overlapping
    for query, key in ((queries, keys), (keys, queries), (queries, queries)):
        found = []
        for shape, part, of_keys in mask.pieces(query, key):
            assert shape == "full" or len(part) == len(of_keys)
            for i in range(len(part)):
                seen = {"full": range(len(of_keys)), "lower": range(i + 1), "upper": range(i, len(part))}[shape]
                found += [(part.start + i, of_keys.start + j) for j in seen]
        inside = [(q, k) for q in range(query.start, query.stop) for k in range(key.start, key.stop)]
        assert sorted(found) == [pair for pair in inside if sees(mask, *pair)]


def test_a_window_far_shorter_than_spans_is_a_triangle_between_them():
    pieces = [*Mask(window=10).pieces(Span(0, 100, 200), Span(0, 0, 100))]
    assert pieces == [("upper", Span(0, 100, 109), Span(0, 91, 100))]


@given(MASKS, SPANS)
def test_pairs(mask, queries):
    length = queries.stop + 2
    expected = sum(sees(mask, q, k) for q in range(queries.start, queries.stop) for k in range(length))
    assert mask.pairs(queries, length) == expected


def test_documents_do_not_see_each_other():
    assert Mask(causal=False).visible_keys(Span(0, 0, 4), Span(1, 0, 4)) is None
    assert not Mask(causal=False).sees_all(Span(0, 0, 4), Span(1, 0, 4))
    assert not [*Mask(window=2).pieces(Span(0, 4, 8), Span(1, 0, 4))]


@pytest.mark.parametrize("make", [contiguous, zigzag])
def test_attention_pairs_of_all_ranks(make):
    lengths = (5, 1, 13)
    assert sum(attention_pairs(make(lengths, 3))) == sum(n * (n + 1) // 2 for n in lengths)


def test_refusals():
    for window in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="window=.* must be a whole number of at least 1"):
            Mask(window=window)
    with pytest.raises(ValueError, match="window=3 needs causal attention"):
        Mask(causal=False, window=3)
