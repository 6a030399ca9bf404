"""Batches of generated images with the noise and the times at which a diffusion transformer sees them.

Everything about image number i of a split follows from the seed and i, so the number of ranks plays no part, a rank
makes only the pixels that it holds, and resuming costs nothing. No image comes twice.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.launcher.batches import StepBuilder, deal
from longspan.launcher.random_bits import normal
from longspan.launcher.scenes import scene
from longspan.models.config import CHANNELS
from longspan.models.morton import coordinates
from longspan.parallel import SequenceContext, SequenceParallel, Span

# What random numbers are for, and of which split; together with seed and image they are the key.
_SCENE, _NOISE, _TIME = range(3)
SPLITS = {"train": 0, "validation": 1, "sample": 2}


@dataclass(frozen=True)
class ImageBatch:
    """One sample as this rank sees it: images of equal size, each a document in Morton order.

    image, noise: fp32 [T_local, 3], pixels in [-1, 1] and standard normal numbers; times: fp32 [N], of every image of
    the sample. num_labels_global: pixels of all samples of the optimizer step.
    """

    image: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    num_labels_global: int
    seq: SequenceContext

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model gets in front of `seq`."""
        return self.image, self.noise, self.times

    def map(self, move) -> "ImageBatch":
        """The same with every tensor passed through `move`."""
        return replace(self, image=move(self.image), noise=move(self.noise), times=move(self.times))


class ImageBuilder(StepBuilder):
    """Builds the batches of images of one optimizer step, or of one validation pass, for one rank.

    size: pixels on a side, a power of two; seq_len: pixels of a sample, a multiple of size^2; split: a name in SPLITS.
    placement: dp, dp_rank, samples and device of StepBuilder.
    """

    def __init__(self, parallel: SequenceParallel, size: int, seq_len: int, seed: int, split: str, **placement):
        super().__init__(**placement)
        assert size.bit_count() == 1 and seq_len % size**2 == 0, (size, seq_len)
        self._parallel, self._size, self._key = parallel, size, (seed, SPLITS[split])
        self._lengths = (size**2,) * (seq_len // size**2)

    def build(self, position: int) -> list[ImageBatch]:
        """The samples / dp micro-batches of this rank, in pinned CPU memory when the device is a GPU."""
        mine = deal([1] * self.samples, self._dp)[self._dp_rank]
        return [self.pin(self._batch(position + index)) for index in mine]

    def _batch(self, sample: int) -> ImageBatch:
        seq, images = self._parallel.context(self._lengths), len(self._lengths)
        numbers = range(sample * images, (sample + 1) * images)
        image, noise = np.empty((2, seq.num_tokens_local, CHANNELS), np.float32)
        for span, offset in zip(seq.layout.spans[seq.rank], seq.layout.local_offsets(seq.rank)):
            here, number = slice(offset, offset + len(span)), numbers[span.document]
            rows, columns = coordinates(np.arange(span.start, span.stop))
            image[here] = scene(rows, columns, self._size, *self._key, _SCENE, number)
            noise[here] = noise_of(span, *self._key, number)
        times = np.array([time_of(*self._key, number) for number in numbers], np.float32)
        return ImageBatch(*map(torch.from_numpy, (image, noise, times)), self.samples * seq.num_tokens, seq)


def noise_of(span: Span, seed: int, split: int, number: int) -> np.ndarray:
    """fp64 [len(span), 3]: standard normal numbers for these tokens of an image."""
    return normal(len(span), seed, split, _NOISE, number, first=span.start)[:, :CHANNELS]


def time_of(seed: int, split: int, number: int) -> float:
    """The time at which an image is seen: the logistic function of a standard normal number, which favours the middle
    of the path (arXiv 2403.03206, section 3.1)."""
    return 1 / (1 + np.exp(-normal(1, seed, split, _TIME, number)[0, 0]))
