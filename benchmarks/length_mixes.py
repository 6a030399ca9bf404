"""Mixes of document lengths for benchmarks: histograms of four public data sets, and batches drawn from them.

| mix | documents | mean | longest | repository | file |
|---|---|---|---|---|---|
| `prolong` | 77,932 | 3,052 | 340,149 | github.com/hao-ai-lab/distca | distca/simulator/data/dist_prolong.json |
| `wlbllm` | 99,519 | 3,962 | 124,913 | github.com/hao-ai-lab/distca | distca/simulator/data/dist_wlbllm.json |
| `wikipedia` | 1,000,000 | 1,014 | 1,823,777 | github.com/PKU-DAIR/Hetu-Galvatron, branch flexsp | \
galvatron/datasets/wikipedia.txt |
| `magi` | 13,463,214 | 1,783 | 196,608 | github.com/SandAI-org/MagiAttention | \
exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv |

The first three files list every length, and were counted in quarters of an octave; the last is itself a histogram.
Numbers of documents below are by length, shortest first.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Mix:
    """A histogram of document lengths: bucket i holds counts[i] documents of edges[i] + 1 to edges[i + 1] tokens.

    even: lengths are uniform inside a bucket instead of log-uniform.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    even: bool = False

    def __post_init__(self):
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need one more edge, got {len(self.edges)}")

    @cached_property
    def _up_to(self) -> np.ndarray:
        return np.cumsum(self.counts)

    def buckets(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count]: buckets, each as likely as its share of the documents."""
        return np.searchsorted(self._up_to, generator.integers(self._up_to[-1], size=count), side="right")

    def lengths(self, generator: np.random.Generator, buckets: np.ndarray) -> np.ndarray:
        """int64 [count]: one length from each of the `buckets`."""
        first, stop = np.array(self.edges)[buckets] + 1, np.array(self.edges)[buckets + 1] + 1
        if self.even:
            return generator.integers(first, stop)
        drawn = first * (stop / first) ** generator.random(len(buckets))
        return np.clip(drawn.astype(np.int64), first, stop - 1)  # rounding may reach `stop`


def draw(name: str, generator: np.random.Generator, tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths of a batch of exactly `tokens` tokens from the mix `name`, none above `longest`.

    Longer documents are cut to `longest`, and the last one to what the batch has room for. ValueError for a name that
    is not in MIXES, and for fewer than 1 token.
    """
    if name not in MIXES:
        raise ValueError(f"there is no mix {name!r}; choose one of {', '.join(MIXES)}")
    if tokens < 1 or longest < 1:
        raise ValueError(f"tokens={tokens} and longest={longest} must be at least 1")
    mix, lengths, total = MIXES[name], [], 0
    while total < tokens:
        buckets = mix.buckets(generator, 1 + (tokens - total) // 1000)  # about as many as are missing
        drawn = np.minimum(mix.lengths(generator, buckets), longest).tolist()
        while drawn and total < tokens:
            lengths.append(min(drawn.pop(), tokens - total))
            total += lengths[-1]
    return tuple(lengths)


def _quarter_octaves(shortest: int, longest: int) -> tuple[int, ...]:
    """Edges at powers of 2^(1/4), below 64 of 2; the outermost buckets end at `shortest` and `longest` themselves."""
    powers = [2**k for k in range(6)] + [round(2 ** (k / 4)) for k in range(24, 100)]
    return (shortest - 1, *(edge for edge in powers if shortest <= edge < longest), longest)


MIXES = {
    "prolong": Mix(_quarter_octaves(575, 340149), (
        40, 1742, 4081, 5806, 7139, 7968, 7802, 7028, 6236, 5522, 4907, 4337, 3793, 3112, 2423, 1899, 1363, 960, 599,
        407, 286, 149, 91, 81, 44, 34, 22, 14, 11, 9, 5, 5, 2, 4, 0, 7, 1, 3,
    )),
    "wlbllm": Mix(_quarter_octaves(1, 124913), (
        21, 12, 26, 59, 118, 269, 513, 182, 229, 257, 298, 383, 439, 522, 664, 708, 880, 1068, 1244, 1473, 1841, 2153,
        2526, 3038, 3496, 4204, 4974, 5940, 7065, 8566, 10222, 11863, 14450, 7209, 246, 318, 334, 247, 132, 167, 108,
        84, 90, 98, 82, 94, 79, 123, 127, 137, 141,
    )),
    "wikipedia": Mix(_quarter_octaves(1, 1823777), (
        5, 23, 50, 126, 708, 4830, 38451, 26949, 42997, 52329, 47986, 49600, 52784, 46922, 52739, 48034, 47990, 55361,
        58970, 46576, 39030, 37426, 38201, 31935, 28395, 25918, 22134, 18425, 16127, 13695, 11335, 9172, 7831, 6041,
        4915, 3916, 3061, 2456, 1788, 1254, 966, 713, 532, 391, 271, 217, 148, 89, 64, 41, 34, 11, 14, 11, 6, 5, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0, 1,
    )),
    "magi": Mix((0, 10, 50, 100, 200, 500, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 196608), (
        30254, 391188, 699596, 1377757, 3794735, 3316785, 2106566, 988525, 410002, 173574, 115007, 18428, 22513, 18284,
    ), even=True),
}  # fmt: skip
