"""Tokens and labels of every rank, for every dp x sp, against a brute force over whole documents; the read-ahead."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpora import MemoryCorpus, data_config, write_megatron
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.launcher.batches import NO_LABEL, BatchLoader, TextBuilder, deal
from longspan.launcher.config import Config
from longspan.launcher.corpus import open_corpus
from longspan.launcher.errors import UserError
from longspan.launcher.samples import SampleStream
from longspan.launcher.tasks import step_builder
from longspan.parallel import SequenceParallel

LENGTHS = [7, 1, 30, 4, 12, 3, 3, 64, 2, 9, 25, 40]
SETTINGS = [
    dict(packing="stream", respect_documents=True),
    dict(packing="stream", respect_documents=False),
    dict(packing="documents", respect_documents=True),
]


def rank_of(rank, world_size, layout="auto"):
    """One rank's view of an SP group; building batches communicates nothing, so no process group is needed."""
    parallel = SequenceParallel(layout=layout)
    parallel.rank, parallel.world_size = rank, world_size
    return parallel


def make_stream(corpora=None, seq_len=20, seed=1, **config):
    corpora = corpora or [MemoryCorpus(LENGTHS)]
    return SampleStream(corpora, data_config(len(corpora), seq_len=seq_len, **config), seed)


def make_loader(stream, parallel=None, **changes):
    prefetch = changes.pop("prefetch", 2)
    return BatchLoader(make_builder(stream, parallel, **changes), prefetch=prefetch)


def make_builder(stream, parallel=None, **changes):
    options = dict(dp=1, dp_rank=0, samples=4, respect_documents=True, vocab_size=10_000_000, device="cpu")
    return TextBuilder(stream, parallel or rank_of(0, 1), **(options | changes))


def brute_force(stream, sample, respect_documents):
    """(lengths, tokens, labels) of a sample from whole documents."""
    lengths, tokens, labels = [], [], []
    for piece in sample.pieces:
        document = stream.corpora[piece.corpus].tokens(piece.document).tolist()
        lengths.append(len(piece))
        tokens += document[piece.start : piece.stop]
        labels += (document + [NO_LABEL])[piece.start + 1 : piece.stop + 1]
    if not respect_documents:
        lengths = [sum(lengths)]
        labels = tokens[1:] + labels[-1:]
    return tuple(lengths), tokens, labels


def gathered(batches):
    """(lengths, tokens, labels) of one micro-batch from the batches of all its SP ranks."""
    layout = batches[0].seq.layout
    tokens, labels = np.empty((2, layout.num_tokens), dtype=np.int64)
    for rank, batch in enumerate(batches):
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert len(batch.tokens) == len(batch.labels) == layout.tokens_per_rank[rank]
        tokens[layout.global_indices(rank)] = batch.tokens.numpy()
        labels[layout.global_indices(rank)] = batch.labels.numpy()
    return layout.lengths, tokens.tolist(), labels.tolist()


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c['packing']}-{c['respect_documents']}")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("dp", "sp"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 8), (1, 32)])
def test_every_split_of_ranks_sees_the_same_samples(config, layout, dp, sp):
    stream, respect = make_stream(**config), config["respect_documents"]
    for step in range(3):
        samples = [stream.sample(step * 4 + index) for index in range(4)]
        expected = [brute_force(stream, sample, respect) for sample in samples]
        num_labels = sum(label != NO_LABEL for _, _, labels in expected for label in labels)
        seen = []
        for dp_rank in range(dp):
            options = dict(dp=dp, dp_rank=dp_rank, respect_documents=respect)
            ranks = [make_builder(stream, rank_of(rank, sp, layout), **options) for rank in range(sp)]
            for micro_batch in zip(*(rank.build(step * 4) for rank in ranks), strict=True):
                seen.append(gathered(micro_batch))
                assert {batch.num_labels_global for batch in micro_batch} == {num_labels}
        assert sorted(seen) == sorted(expected)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=10),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from(SETTINGS),
)
def test_labels_for_any_documents(lengths, seq_len, sp, config):
    if sum(lengths) < seq_len or max(lengths) < 2 or seq_len < 2:
        return
    stream, respect = make_stream([MemoryCorpus(lengths)], seq_len=seq_len, **config), config["respect_documents"]
    ranks = [make_builder(stream, rank_of(rank, sp), samples=8, respect_documents=respect) for rank in range(sp)]
    try:
        micro_batches = list(zip(*(rank.build(0) for rank in ranks), strict=True))
    except UserError as error:
        assert "no labels" in str(error)
        return
    expected = [brute_force(stream, stream.sample(index), respect) for index in range(8)]
    assert sorted(map(gathered, micro_batches)) == sorted(expected)


def test_every_inner_token_is_a_label_once():
    """Cutting documents loses no label: over an epoch each token but a document's first is predicted once."""
    stream = make_stream(seq_len=8)
    batches = make_builder(stream, samples=sum(LENGTHS) // 8).build(0)
    labels = torch.cat([batch.labels for batch in batches])
    assert len(labels[labels != NO_LABEL].unique()) == (labels != NO_LABEL).sum() == batches[0].num_labels_global


def test_a_rank_reads_its_spans_and_one_token():
    corpus = MemoryCorpus([1000])
    for rank in range(4):
        stream = make_stream([corpus], seq_len=400)
        corpus.reads.clear()
        (batch,) = make_builder(stream, rank_of(rank, 4, "zigzag"), samples=1).build(0)
        start = stream.sample(0).pieces[0].start
        spans = [(start + span.start, start + span.stop) for span in batch.seq.layout.spans[rank]]
        assert corpus.reads == [(0, begin, min(end + 1, 1000)) for begin, end in spans]
        assert sum(stop - begin for _, begin, stop in corpus.reads) <= 100 + len(spans)


def test_labels_are_counted_without_reading():
    corpus = MemoryCorpus(LENGTHS)
    builder = make_builder(make_stream([corpus]), rank_of(63, 64), dp=2)
    batches = builder.build(0)
    read = sum(stop - start for _, start, stop in corpus.reads)
    assert read <= 2 * 2 and batches[0].num_labels_global > 50


def test_tokens_of_files(tmp_path):
    prefixes = [
        write_megatron(tmp_path / name, [[list(range(base, base + n))] for n in (9, 14, 5)])
        for name, base in (("a", 0), ("b", 100))
    ]
    corpora = [open_corpus(prefix) for prefix in prefixes]
    batches = make_builder(make_stream(corpora, seq_len=6), samples=8).build(0)
    for batch in batches:
        known = batch.labels != NO_LABEL
        assert torch.equal(batch.labels[known], batch.tokens[known] + 1)
    assert {bool(batch.tokens[0] >= 100) for batch in batches} == {True, False}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_validation_corpora_of_their_own(tmp_path, dtype):
    lengths = {"train": (9, 14, 5), "validation": (3, 7)}
    for name, base in (("train", 0), ("validation", 60_000)):
        documents = [[list(range(base, base + length))] for length in lengths[name]]
        write_megatron(tmp_path / name, documents, dtype)
    mesh = SimpleNamespace(dp=1, dp_rank=0, device="cpu")

    def builder(*settings):
        paths = [f"data.{key}=[{{path: {tmp_path / name}}}]" for key, name in
                 (("corpora", "train"), ("validation_corpora", "validation"))]  # fmt: skip
        settings = ("data.seq_len=28", "data.packing=documents", "log.validation_interval=1", *paths, *settings)
        config = Config.load(None, settings)
        return step_builder(config, SequenceParallel(), mesh)

    build = builder("model.vocab_size=60007")
    for split in ("train", "validation"):
        documents = [x for batch in build(split, 1).build(0) for x in split_documents(batch)]
        base = 60_000 * (split == "validation")
        expected = [list(range(base, base + length)) for length in lengths[split]]
        assert sorted(documents, key=len) == sorted(expected, key=len)
    with pytest.raises(UserError, match="holds token id 60006, outside of model.vocab_size=60006"):
        builder("model.vocab_size=60006")("validation", 1).build(0)


def split_documents(batch):
    return [part.tolist() for part in batch.tokens.split(batch.seq.layout.lengths)]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(1, 5))
def test_deal(costs, dp):
    costs = (costs * dp)[: len(costs) // dp * dp or dp]
    hands = deal(costs, dp)
    assert sorted(sum(hands, [])) == list(range(len(costs))) and {len(hand) for hand in hands} == {len(costs) // dp}
    rounds = list(zip(*hands))
    for earlier, later in zip(rounds, rounds[1:]):
        assert min(costs[index] for index in earlier) >= max(costs[index] for index in later)
    sums = [sum(costs[index] for index in hand) for hand in hands]
    assert max(sums) - min(sums) <= max(costs)


def tokens_of(step):
    return [batch.tokens.tolist() for batch in step]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c['packing']}-{c['respect_documents']}")
def test_resumed_equals_uninterrupted(config):
    options = dict(respect_documents=config["respect_documents"])
    whole = make_loader(make_stream(**config), **options)
    expected = [tokens_of(whole.next_step()) for _ in range(20)]  # several epochs
    whole.close()
    for stop in (0, 1, 7):
        before = make_loader(make_stream(**config), **options)
        assert [tokens_of(before.next_step()) for _ in range(stop)] == expected[:stop]
        time.sleep(0.02)  # the thread reads ahead, which must not count
        state = before.state_dict()
        assert state == {"position": 4 * stop}
        before.close()
        after = make_loader(make_stream(**config), dp=2, dp_rank=0, **options)
        after.next_step()  # a position replaces what was read ahead, too
        after.load_state_dict(state)
        other = make_loader(make_stream(**config), dp=2, dp_rank=1, **options)
        other.load_state_dict(state)
        for step in range(stop, 20):
            assert sorted(tokens_of(after.next_step()) + tokens_of(other.next_step())) == sorted(expected[step])
        after.close()
        other.close()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "longspan-batches"]


def test_prefetch_is_bounded_and_close_ends_the_thread():
    corpus = MemoryCorpus([4] * 1000)
    loader = make_loader(make_stream([corpus], seq_len=4), prefetch=3)
    assert not corpus.reads and not reader_threads()
    loader.next_step()
    deadline = time.monotonic() + 5
    while len(corpus.reads) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(corpus.reads) == 16, "the step handed out and three ahead, of 4 samples each"
    loader.close()
    loader.close()
    assert not reader_threads()
    assert loader.state_dict() == {"position": 4}


def test_error_of_the_thread_reaches_every_call():
    corpus = MemoryCorpus([4] * 10, prefix="data/broken")
    loader = make_loader(make_stream([corpus], seq_len=4), vocab_size=8003)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"data/broken.bin: document [89] holds token id [89]00\d, outside of .*=8003"
        ):
            for _ in range(20):
                loader.next_step()
    loader.close()
    assert not reader_threads()


def test_look_ahead_token_is_checked():
    stream = make_stream([MemoryCorpus([10])], seq_len=5)
    with pytest.raises(UserError, match="token id 5, outside"):
        make_builder(stream, samples=2, vocab_size=5).build(0)


def test_errors():
    stream = make_stream()
    with pytest.raises(UserError, match="6 samples cannot be dealt evenly to 4 .*train.global_batch"):
        make_loader(stream, dp=4, samples=6)
    with pytest.raises(UserError, match="samples 0 to 3 have no labels"):
        make_builder(make_stream([MemoryCorpus([1] * 8)], seq_len=2)).build(0)


@pytest.mark.gpu
def test_gpu_batches_are_copied_from_pinned_memory():
    parallel = SequenceParallel(device="cuda")
    builder = make_builder(make_stream(), parallel, device="cuda")
    batches = builder.build(0)
    assert all(batch.tokens.is_pinned() and batch.labels.is_pinned() for batch in batches)
    expected = tokens_of(make_builder(make_stream()).build(0))
    assert tokens_of(builder.to_device(batches)) == expected
    loader = make_loader(make_stream(), parallel, device="cuda")
    step = loader.next_step()
    assert all(batch.tokens.is_cuda and batch.labels.is_cuda for batch in step) and tokens_of(step) == expected
    loader.close()
