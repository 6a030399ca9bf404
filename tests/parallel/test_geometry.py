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


@given(MASKS, SPANS)
def test_pairs(mask, queries):
    length = queries.stop + 2
    expected = sum(sees(mask, q, k) for q in range(queries.start, queries.stop) for k in range(length))
    assert mask.pairs(queries, length) == expected


def test_documents_do_not_see_each_other():
    assert Mask(causal=False).visible_keys(Span(0, 0, 4), Span(1, 0, 4)) is None
    assert not Mask(causal=False).sees_all(Span(0, 0, 4), Span(1, 0, 4))


@pytest.mark.parametrize("make", [contiguous, zigzag])
def test_attention_pairs_of_all_ranks(make):
    lengths = (5, 1, 13)
    assert sum(attention_pairs(make(lengths, 3))) == sum(n * (n + 1) // 2 for n in lengths)


def test_refusals():
    for window, causal in ((0, True), (3, False)):
        with pytest.raises(ValueError, match="window="):
            Mask(causal=causal, window=window)
