"""Which tokens become which sample: split, packing, shuffling, blending."""

from collections import Counter

import numpy as np
import pytest
from corpora import MemoryCorpus, data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.launcher.errors import UserError
from longspan.launcher.samples import Piece, SampleStream

LENGTHS = [7, 1, 0, 30, 4, 12, 3, 3, 64, 2, 9]


def stream_of(lengths, seed=0, split="train", **config):
    return SampleStream([MemoryCorpus(lengths)], data_config(**config), seed, split)


def samples_of(stream, start, stop):
    return [stream.sample(index) for index in range(start, stop)]


def num_tokens(sample):
    return sum(map(len, sample.pieces))


def tokens_of(samples):
    return Counter((p.corpus, p.document, t) for s in samples for p in s.pieces for t in range(p.start, p.stop))


def every_token(lengths, documents=None):
    documents = range(len(lengths)) if documents is None else documents
    return Counter((0, document, t) for document in documents for t in range(lengths[document]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 50), st.integers(0, 5))
def test_stream_epochs_hold_every_token_at_most_once(lengths, seq_len, seed):
    per_epoch = sum(lengths) // seq_len
    if not any(lengths) or not per_epoch:
        return
    stream = stream_of(lengths, seed, seq_len=seq_len)
    for epoch in range(2):
        samples = samples_of(stream, epoch * per_epoch, (epoch + 1) * per_epoch)
        assert all(num_tokens(sample) == seq_len for sample in samples)
        seen = tokens_of(samples)
        assert seen.total() == per_epoch * seq_len and max(seen.values()) == 1
        assert not seen - every_token(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 50), st.integers(0, 5))
def test_documents_are_packed_whole(lengths, seq_len, seed):
    if not any(lengths):
        return
    stream = stream_of(lengths, seed, seq_len=seq_len, packing="documents")
    per_epoch = stream._corpus_samples[0]._num_samples
    epochs = [samples_of(stream, epoch * per_epoch, (epoch + 1) * per_epoch) for epoch in range(2)]
    for samples in epochs:
        assert tokens_of(samples) == every_token(lengths)
        assert all(0 < num_tokens(sample) <= seq_len for sample in samples)
        for piece in (piece for sample in samples for piece in sample.pieces):
            whole = (piece.start, piece.stop) == (0, lengths[piece.document])
            assert whole or lengths[piece.document] > seq_len and piece.start % seq_len == 0
            assert piece.stop == min(piece.start + seq_len, lengths[piece.document])
    assert Counter(epochs[0]) == Counter(epochs[1])


def test_next_fit_fills_samples():
    stream = stream_of([10] * 100, seq_len=35, packing="documents")
    assert [num_tokens(stream.sample(index)) for index in range(33)].count(30) >= 32


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_random_access_equals_sequential(packing):
    first, second = (stream_of(LENGTHS, 3, seq_len=8, packing=packing) for _ in range(2))
    expected = samples_of(first, 0, 100)
    for index in np.random.default_rng(0).permutation(100).tolist():
        assert second.sample(index) == expected[index]
    assert samples_of(stream_of(LENGTHS, 4, seq_len=8, packing=packing), 0, 100) != expected


def test_epochs_and_long_documents_are_shuffled():
    stream = stream_of([1000], seq_len=10)
    starts = [stream.sample(index).pieces[0].start for index in range(200)]
    assert starts[:100] != sorted(starts[:100]) and starts[:100] != starts[100:]
    assert sorted(starts[:100]) == sorted(starts[100:]) == list(range(0, 1000, 10))


def test_order_never_changes():
    """Resuming after an upgrade must meet the same data, so these literals may not change."""
    stream = stream_of([5, 9, 4], seed=7, seq_len=6)
    assert [s.pieces for s in samples_of(stream, 0, 3)] == [
        (Piece(0, 1, 0, 6),),
        (Piece(0, 1, 6, 9), Piece(0, 2, 0, 3)),
        (Piece(0, 2, 3, 4), Piece(0, 0, 0, 5)),
    ]


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_split_is_disjoint_and_complete(packing):
    lengths = [5] * 40 + [0]
    config = dict(seq_len=5, packing=packing, validation_fraction=0.2)
    train = samples_of(stream_of(lengths, 1, **config), 0, 32)
    validation = samples_of(stream_of(lengths, 1, "validation", **config), 0, 8)
    assert tokens_of(train) + tokens_of(validation) == every_token(lengths)
    assert len({piece.document for sample in validation for piece in sample.pieces}) == 8


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_blending_follows_the_weights(weights):
    corpora = [MemoryCorpus([3] * (index + 1)) for index in range(len(weights))]
    stream = SampleStream(corpora, data_config(weights=weights, seq_len=3), 0)
    counts = np.zeros(len(weights))
    for index in range(150):
        counts[stream.sample(index).pieces[0].corpus] += 1
        assert np.all(np.abs(counts - (index + 1) * np.array(weights) / sum(weights)) <= 1.6)


def test_blended_corpora_are_each_read_in_order():
    corpora = [MemoryCorpus([50]), MemoryCorpus([20, 20])]
    stream = SampleStream(corpora, data_config(weights=[1, 3], seq_len=5), 0)
    alone = SampleStream(corpora[:1], data_config(seq_len=5), 0)
    mixed = [sample for sample in samples_of(stream, 0, 80) if sample.pieces[0].corpus == 0]
    assert mixed == samples_of(alone, 0, 20)


def test_millions_of_documents():
    lengths = np.random.default_rng(0).integers(0, 50, size=1_000_000)
    for packing in ("stream", "documents"):
        stream = stream_of(lengths, seq_len=2048, packing=packing, validation_fraction=0.01)
        assert num_tokens(stream.sample(10_000)) > 1900


@pytest.mark.parametrize(
    ("lengths", "split", "config", "message"),
    [
        ([3, 4], "train", dict(seq_len=8), r"data.seq_len=8 is longer than the train documents.*memory, 7 tokens"),
        ([9], "train", dict(seq_len=2, validation_fraction=0.1), "0.1 of the 1 documents of corpus memory leaves none"),
        ([2, 9], "validation", dict(seq_len=10, validation_fraction=0.5), "larger data.validation_fraction or more"),
    ],
)
def test_too_little_data(lengths, split, config, message):
    with pytest.raises(UserError, match=message):
        stream_of(lengths, 0, split, **config)
