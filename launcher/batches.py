"""What a rank trains on: batches of tokens, labels and sequence context, read by the spans of this rank's layout.

Training and validation batches both come from a `StepBuilder`; `BatchLoader` runs one ahead of training.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import torch

from longspan.launcher.corpus import Corpus
from longspan.launcher.errors import UserError
from longspan.launcher.samples import Piece, Sample, SampleStream
from longspan.parallel import SequenceContext, SequenceParallel

NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """One sample as this rank sees it.

    tokens, labels: int64 [T_local] in the order of `seq.layout`, T_local may be 0. A label is the next token of the
    same document, NO_LABEL where a stored document ends. num_labels_global: labels of all samples of the optimizer
    step, over all data-parallel ranks and micro-batches.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    num_labels_global: int
    seq: SequenceContext

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model gets in front of `seq`."""
        return self.tokens, self.labels

    def map(self, move) -> "Batch":
        """The same with every tensor passed through `move`."""
        return replace(self, tokens=move(self.tokens), labels=move(self.labels))


class StepBuilder:
    """What builders of any task share: `build(position)` gives this rank's samples / dp micro-batches of the step that
    consists of the samples [position, position + samples), whatever the number of ranks.

    Raises UserError when `dp` does not divide `samples`.
    """

    def __init__(self, *, dp: int, dp_rank: int, samples: int, device: torch.device | str):
        if samples < 1 or samples % dp:
            raise UserError(
                f"{samples} samples cannot be dealt evenly to {dp} data-parallel ranks; "
                f"make train.global_batch (for validation log.validation_samples) a multiple of {dp}"
            )
        self.samples, self.device = samples, torch.device(device)
        self._dp, self._dp_rank = dp, dp_rank

    def pin(self, batch):
        """The batch in pinned memory, from which copies do not wait, when the device is a GPU."""
        return batch.map(torch.Tensor.pin_memory) if self.device.type == "cuda" else batch

    def to_device(self, batches: list) -> list:
        """The batches on the device; copies from pinned memory do not wait for the GPU."""
        return [batch.map(lambda x: x.to(self.device, non_blocking=True)) for batch in batches]


class TextBuilder(StepBuilder):
    """Builds the batches of text of one optimizer step, or of one validation pass, for one rank.

    respect_documents: every piece of a sample is a document of its own; else a sample is one document, whose labels
    follow its tokens across pieces, the last one looking ahead in its stored document.
    placement: dp, dp_rank, samples and device of StepBuilder. `build` raises UserError for token ids beyond vocab_size.
    """

    def __init__(
        self,
        stream: SampleStream,
        sequence_parallel: SequenceParallel,
        *,
        respect_documents: bool,
        vocab_size: int,
        **placement,
    ):
        super().__init__(**placement)
        self._stream, self._sequence_parallel, self._vocab_size = stream, sequence_parallel, vocab_size
        self._respect_documents = respect_documents

    def build(self, position: int) -> list[Batch]:
        """The samples / dp micro-batches of this rank, in pinned CPU memory when the device is a GPU."""
        samples = [self._documents(self._stream.sample(position + index)) for index in range(self.samples)]
        num_labels = sum(document.num_labels for documents in samples for document in documents)
        if not num_labels:
            raise UserError(
                f"samples {position} to {position + self.samples - 1} have no labels, since all their documents "
                "have one token; use longer documents or more samples per step"
            )
        costs = [sum(document.length**2 for document in documents) for documents in samples]
        return [self._batch(samples[index], num_labels) for index in deal(costs, self._dp)[self._dp_rank]]

    def _documents(self, sample: Sample) -> list["_Document"]:
        runs = [(piece,) for piece in sample.pieces] if self._respect_documents else [sample.pieces]
        return [_Document.of(pieces, self._stream.corpora) for pieces in runs]

    def _batch(self, documents: list["_Document"], num_labels_global: int) -> Batch:
        seq = self._sequence_parallel.context([document.length for document in documents])
        spans = seq.layout.spans[seq.rank]
        tokens = np.empty(sum(span.stop - span.start for span in spans), dtype=np.int64)
        labels = np.full_like(tokens, NO_LABEL)
        offset = 0
        for span in spans:
            length = span.stop - span.start
            # One token more than the span where there is one: the label of its last token.
            read = self._read(documents[span.document], span.start, span.stop + 1)
            tokens[offset : offset + length] = read[:length]
            labels[offset : offset + len(read) - 1] = read[1:]
            offset += length
        return self.pin(Batch(torch.from_numpy(tokens), torch.from_numpy(labels), num_labels_global, seq))

    def _read(self, document: "_Document", start: int, stop: int) -> np.ndarray:
        """int64: tokens [start, stop) of a document, as many as there are, checked against the vocabulary."""
        parts = []
        for piece in document.readable:
            if start < len(piece) and stop > 0:
                part = Piece(
                    piece.corpus, piece.document, piece.start + max(start, 0), piece.start + min(stop, len(piece))
                )
                parts.append(self._read_piece(part))
            start, stop = start - len(piece), stop - len(piece)
        return np.concatenate(parts)

    def _read_piece(self, piece: Piece) -> np.ndarray:
        corpus = self._stream.corpora[piece.corpus]
        tokens = corpus.read(piece.document, piece.start, piece.stop)
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(outside):
            raise UserError(
                f"corpus {corpus.prefix}.bin: document {piece.document} holds token id {outside[0]}, outside of "
                f"model.vocab_size={self._vocab_size}; set model.vocab_size to that of the corpus's tokenizer"
            )
        return tokens


@dataclass(frozen=True, slots=True)
class _Document:
    """A document of a sample: `length` tokens made of pieces laid end to end."""

    length: int
    readable: tuple[Piece, ...]  # the pieces, with one look-ahead token where the last stored document goes on

    @classmethod
    def of(cls, pieces: Sequence[Piece], corpora: Sequence[Corpus]) -> "_Document":
        last = pieces[-1]
        goes_on = last.stop < corpora[last.corpus].lengths[last.document]
        return cls(sum(map(len, pieces)), (*pieces[:-1], replace(last, stop=last.stop + 1) if goes_on else last))

    @property
    def num_labels(self) -> int:
        return sum(map(len, self.readable)) - 1


def deal(costs: Sequence[float], dp: int) -> list[list[int]]:
    """Indices of samples for each of `dp` ranks, as many for each; micro-batch number i is alike in cost on all ranks.

    Ranks meet in every micro-batch, so samples of neighbouring cost share one. Dealing back and forth (a snake)
    balances the sums. Equal costs keep their order.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    rounds = [order[start : start + dp] for start in range(0, len(order), dp)]
    return [
        [hand[rank if number % 2 == 0 else dp - 1 - rank] for number, hand in enumerate(rounds)] for rank in range(dp)
    ]


class BatchLoader:
    """The batches of training, step by step, built ahead by one CPU thread.

    prefetch: steps that are built ahead (at least 1). Reading starts with the first `next_step`.
    """

    def __init__(self, builder: StepBuilder, *, prefetch: int):
        assert prefetch >= 1, prefetch
        self._builder = builder
        self._prefetch, self._position, self._reader = prefetch, 0, None

    def next_step(self) -> list:
        """The micro-batches of the next optimizer step for this rank; raises what went wrong while building them."""
        if self._reader is None:
            self._reader = _ReadAhead(self._builder, self._position, self._prefetch)
        batches = self._builder.to_device(self._reader.take())
        self._position += self._builder.samples
        return batches

    def state_dict(self) -> dict[str, int]:
        """The position: samples handed out so far, over all ranks. What was read ahead does not count."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position, whatever the number of ranks of the run that saved it."""
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Ends the thread; a later `next_step` would start a new one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _ReadAhead:
    """A thread that builds the steps from `position` on, at most `prefetch` of them ahead."""

    def __init__(self, builder: StepBuilder, position: int, prefetch: int):
        self._builder, self._position = builder, position
        self._free = threading.Semaphore(prefetch)
        self._built: SimpleQueue[list | Exception] = SimpleQueue()
        self._stopped = False
        self._cuda_device = torch.cuda.current_device() if builder.device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="longspan-batches", daemon=True)
        self._thread.start()

    def take(self) -> list:
        built = self._built.get()
        if isinstance(built, Exception):
            self._built.put(built)  # the thread has ended: the next call must fail as well, not wait
            raise built
        self._free.release()
        return built

    def close(self) -> None:
        self._stopped = True
        self._free.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._cuda_device is not None:  # a new thread starts on GPU 0
                torch.cuda.set_device(self._cuda_device)
            while True:
                self._free.acquire()
                if self._stopped:
                    return
                self._built.put(self._builder.build(self._position))
                self._position += self._builder.samples
        except Exception as error:  # handed to the caller of next_step
            self._built.put(error)
