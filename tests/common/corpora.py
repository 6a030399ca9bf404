"""Small corpora for tests: in memory, with a record of what was read, or on disk in Megatron's format."""

import numpy as np

from longspan.launcher.config import CorpusConfig, DataConfig


class MemoryCorpus:
    """What batches and samples need of a Corpus. Token t of document d is d * 1000 + t, so every token is known."""

    vocab_size = None

    def __init__(self, lengths, prefix="memory", offset=0):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.prefix, self.offset, self.reads = prefix, offset, []

    def tokens(self, document):
        return self.offset + document * 1000 + np.arange(self.lengths[document])

    def read(self, document, start, stop):
        assert 0 <= start < stop <= self.lengths[document]
        self.reads.append((document, start, stop))
        return self.tokens(document)[start:stop]


def data_config(num_corpora=1, weights=None, **settings):
    weights = weights or [1.0] * num_corpora
    corpora = [CorpusConfig(path=f"corpus{index}", weight=weight) for index, weight in enumerate(weights)]
    return DataConfig(corpora=corpora, **settings)


def write_megatron(prefix, documents, dtype=np.int32):
    """documents: for each document its sequences, each a list of token ids."""
    from longspan.launcher.corpus import _indexed_dataset

    builder = _indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document([token for sequence in sequences for token in sequence], [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
