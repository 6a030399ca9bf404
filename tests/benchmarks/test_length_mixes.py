"""Batches of the length mixes: exact totals, bounds, and the public files' shares of documents, tokens and squares."""

import numpy as np
import pytest

from longspan.benchmarks.length_mixes import MIXES, Mix, draw

UPPER = [1024 * 2**i for i in range(8)]  # of the buckets below; the last bucket is open

# Percent of documents, of tokens and of the sum of squared lengths, counted in the files themselves (magi: midpoints).
SHARES = {
    "prolong": (
        (15.0, 38.4, 27.0, 14.4, 4.3, 0.8, 0.15, 0.04, 0.02),
        (4.2, 18.6, 25.4, 26.5, 15.1, 5.4, 2.1, 1.2, 1.7),
        (0.3, 2.4, 6.5, 13.2, 14.5, 10.4, 7.9, 9.4, 35.4),
    ),
    "wlbllm": (
        (16.0, 15.8, 32.0, 33.9, 1.0, 0.5, 0.35, 0.53, 0.0),
        (2.1, 6.1, 24.8, 44.6, 2.9, 2.6, 4.2, 12.8, 0.0),
        (0.1, 0.5, 4.2, 12.5, 1.8, 3.2, 10.7, 67.1, 0.0),
    ),
    "wikipedia": (
        (78.8, 10.8, 6.0, 2.8, 1.1, 0.35, 0.10, 0.02, 0.0),
        (24.9, 15.4, 16.7, 15.5, 12.3, 7.6, 4.5, 2.0, 1.1),
        (0.9, 1.6, 3.5, 6.5, 10.2, 12.4, 14.6, 12.7, 37.7),
    ),
    "magi": (
        (71.4, 15.7, 7.3, 3.1, 1.3, 0.85, 0.14, 0.17, 0.14),
        (17.2, 13.5, 12.7, 10.5, 8.9, 11.8, 3.8, 9.2, 12.5),
        (0.3, 0.6, 1.1, 1.8, 3.0, 8.0, 5.1, 25.0, 55.2),
    ),
}
MEANS = {"prolong": 3052, "wlbllm": 3962, "wikipedia": 1014, "magi": 1783}


def stratified(name, per_bucket=1000):
    """Lengths and their weights, as many from every bucket: rare long documents then weigh without noise."""
    mix = MIXES[name]
    buckets = np.repeat(np.arange(len(mix.counts)), per_bucket)
    return mix.lengths(np.random.default_rng(0), buckets), np.array(mix.counts)[buckets] / per_bucket


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("tokens, longest", [(1, 1), (7, 3), (1000, 1), (65_536, 65_536), (500_001, 4096)])
def test_a_batch_holds_exactly_its_tokens_within_bounds(name, tokens, longest):
    lengths = draw(name, np.random.default_rng(3), tokens, longest)
    assert sum(lengths) == tokens
    assert all(type(length) is int and 1 <= length <= longest for length in lengths)
    assert lengths == draw(name, np.random.default_rng(3), tokens, longest)


@pytest.mark.parametrize("name", MIXES)
def test_every_bucket_keeps_its_bounds(name):
    mix = MIXES[name]
    lengths, _ = stratified(name)
    for lower, upper, drawn in zip(mix.edges, mix.edges[1:], lengths.reshape(len(mix.counts), -1), strict=False):
        assert lower < drawn.min() and drawn.max() <= upper


@pytest.mark.parametrize("name", MIXES)
def test_documents_tokens_and_squares_are_shared_out_as_in_the_files(name):
    lengths, weights = stratified(name)
    place = np.searchsorted(UPPER, lengths)
    for power, expected in enumerate(SHARES[name]):
        held = np.bincount(place, weights * lengths.astype(float) ** power, minlength=9)
        np.testing.assert_allclose(100 * held / held.sum(), expected, atol=1.5 if power == 2 else 0.3)
    assert np.average(lengths, weights=weights) == pytest.approx(MEANS[name], rel=0.02)


@pytest.mark.parametrize("name", MIXES)
def test_batches_follow_the_mix(name):
    lengths = np.array(draw(name, np.random.default_rng(0), 20_000_000, 1 << 18))
    found = 100 * np.bincount(np.searchsorted(UPPER, lengths), minlength=9) / len(lengths)
    np.testing.assert_allclose(found, SHARES[name][0], atol=2)


def test_lengths_inside_a_bucket_are_log_uniform_or_even():
    buckets = np.zeros(20_000, np.int64)
    log, even = (
        Mix((999, 8000), (1,), even).lengths(np.random.default_rng(0), buckets) for even in (False, True)
    )  # fmt: skip
    assert np.median(log) == pytest.approx(np.sqrt(1000 * 8000), rel=0.03)
    assert np.median(even) == pytest.approx(4500, rel=0.03)


def test_wrong_requests_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="prolong, wlbllm, wikipedia, magi"):
        draw("github", generator, 10, 10)
    with pytest.raises(ValueError, match="at least 1"):
        draw("magi", generator, 0, 10)
    with pytest.raises(ValueError, match="one more edge"):
        Mix((0, 1), (1, 1))
