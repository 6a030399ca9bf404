"""Which tokens of which documents make up sample number i: split, packing, shuffling and blending.

Everything follows from (corpora, settings, seed) by random access, so the number of ranks plays no part and resuming
costs nothing. Permutations come from raw random bits, which stay the same across numpy versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from longspan.launcher.config import DataConfig
from longspan.launcher.corpus import Corpus
from longspan.launcher.errors import UserError

# What a permutation is for; together with seed, corpus and epoch it makes the random stream.
_SPLIT, _DOCUMENTS, _SAMPLES = range(3)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of one stored document."""

    corpus: int
    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Sample:
    """Pieces laid end to end, at most seq_len tokens in all."""

    pieces: tuple[Piece, ...]


class SampleStream:
    """An endless sequence of samples: `sample(i)` for any i >= 0.

    The documents of each corpus are split by the seed into training and validation, where data_config has a fraction
    for that. Each corpus repeats in epochs.
    - stream: the documents are shuffled anew each epoch, laid end to end and cut to seq_len, the samples shuffled; the
      rest of an epoch that does not fill a sample is left out.
    - documents: whole documents, shuffled, are packed into samples of at most seq_len tokens, and only documents longer
      than that are cut. The packing stays, its samples are shuffled anew each epoch.
    Corpora are blended by weight, counted in samples.

    data_config is a validated one. Not for several threads at once. Raises UserError where the corpora have too few
    documents for the split or, with `stream`, too few tokens for one sample.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        data_config: DataConfig,
        seed: int,
        split: Literal["train", "validation"] = "train",
    ):
        assert len(corpora) == len(data_config.corpora)
        self.corpora = tuple(corpora)
        self._corpus_samples = []
        for index, corpus in enumerate(corpora):
            documents = _documents_of_split(index, corpus, data_config.validation_fraction, seed, split)
            tokens = int(corpus.lengths[documents].sum())
            if data_config.packing == "stream" and tokens < data_config.seq_len:
                kept = split == "validation" and data_config.validation_fraction > 0
                raise UserError(
                    f"data.seq_len={data_config.seq_len:,} is longer than the {split} documents of corpus "
                    f"{corpus.prefix}, {tokens:,} tokens in all; use a smaller data.seq_len"
                    f"{', a larger data.validation_fraction' * kept} or more text"
                )
            self._corpus_samples.append(_CorpusSamples(index, corpus, documents, data_config, seed))
        self._shares = _shares([corpus.weight for corpus in data_config.corpora])

    def sample(self, index: int) -> Sample:
        """Sample number `index`, counted over all epochs and corpora."""
        assert index >= 0, index
        corpus, index = _blend(index, self._shares)
        return self._corpus_samples[corpus].sample(index)


def _shares(weights: list[float]) -> list[tuple[int, Fraction]]:
    """(corpus, its share among itself and the corpora after it), heaviest first, which keeps `_blend` most even."""
    exact = sorted(((Fraction(str(weight)), -corpus) for corpus, weight in enumerate(weights)), reverse=True)
    return [(-corpus, weight / sum(w for w, _ in exact[place:])) for place, (weight, corpus) in enumerate(exact)]


def _blend(index: int, shares: list[tuple[int, Fraction]]) -> tuple[int, int]:
    """(corpus, index among the samples of that corpus) of blended sample `index`.

    Of the first i samples the first corpus gets i * share, rounded, the next one its share of the remaining ones, and
    so on: counts stay within a sample or so of the weights (1.5 for 8 corpora), and no state is needed.
    """
    for corpus, share in shares:
        taken = _rounded(index, share)
        if _rounded(index + 1, share) > taken:
            return corpus, taken
        index -= taken
    raise AssertionError("the last share is 1")


def _rounded(count: int, share: Fraction) -> int:
    return (2 * count * share.numerator + share.denominator) // (2 * share.denominator)


def _documents_of_split(index: int, corpus: Corpus, fraction: float, seed: int, split: str) -> np.ndarray:
    """int64: the documents of `corpus` that belong to `split`, ascending; documents without tokens belong to none.

    Without a fraction the corpus is not split.
    """
    documents = np.flatnonzero(corpus.lengths)
    if not fraction:
        return documents
    num_validation = max(1, round(fraction * len(documents)))
    if num_validation >= len(documents):
        raise UserError(
            f"data.validation_fraction={fraction} of the {len(documents)} documents of corpus {corpus.prefix} leaves "
            f"none for training; set it to 0 or prepare the text as more documents"
        )
    order = documents[_permutation(len(documents), seed, _SPLIT, index)]
    return np.sort(order[:num_validation] if split == "validation" else order[num_validation:])


class _CorpusSamples:
    """The samples of one corpus: its documents laid end to end in some order, cut into samples, these in some order."""

    def __init__(self, index: int, corpus: Corpus, documents: np.ndarray, data: DataConfig, seed: int):
        self._index, self._documents, self._lengths = index, documents, corpus.lengths[documents]
        self._packing, self._seq_len, self._seed = data.packing, data.seq_len, seed
        self._lay_out(epoch=0)
        self._start(epoch=0)

    def sample(self, index: int) -> Sample:
        epoch, index = divmod(index, self._num_samples)
        if epoch != self._epoch:
            # `documents` keeps its packing, so that the number of samples is the same in every epoch.
            if self._packing == "stream":
                self._lay_out(epoch)
            self._start(epoch)
        number = self._sample_order[index]
        begin, end = self._bounds[number : number + 2].tolist()
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        touched = self._order[first : last + 1]
        lengths = self._lengths[touched]
        starts = self._ends[first : last + 1] - lengths
        pieces = zip(
            self._documents[touched].tolist(),
            np.maximum(begin - starts, 0).tolist(),
            np.minimum(end - starts, lengths).tolist(),
        )
        return Sample(tuple(Piece(self._index, *piece) for piece in pieces))

    def _lay_out(self, epoch: int) -> None:
        self._order = _permutation(len(self._documents), self._seed, _DOCUMENTS, self._index, epoch)
        self._ends = np.cumsum(self._lengths[self._order])
        self._bounds = _PACKINGS[self._packing](self._ends, self._seq_len)
        self._num_samples = len(self._bounds) - 1

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        self._sample_order = _permutation(self._num_samples, self._seed, _SAMPLES, self._index, epoch)


def _cut(ends: np.ndarray, seq_len: int) -> np.ndarray:
    return np.arange(ends[-1] // seq_len + 1) * seq_len


def _next_fit(ends: np.ndarray, seq_len: int) -> np.ndarray:
    bounds = [0]
    while bounds[-1] < ends[-1]:
        limit = bounds[-1] + seq_len
        fitting = np.searchsorted(ends, limit, side="right")  # documents that end within the limit
        end = int(ends[fitting - 1]) if fitting else 0
        bounds.append(end if end > bounds[-1] else limit)  # a document longer than seq_len is cut
    return np.array(bounds, dtype=np.int64)


# From int64 [documents], where documents laid end to end end, to int64 [samples + 1], where samples start, and the end.
_PACKINGS = {"stream": _cut, "documents": _next_fit}


def _permutation(size: int, *key: int) -> np.ndarray:
    """int64 [size]: a permutation that depends on the key alone (numpy guarantees the raw bits of its generators)."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
