"""Batches of documents and ways to lay them out over ranks that every parity test goes through."""

import random
from functools import cache

from longspan.parallel import Layout, Span, balanced, contiguous, zigzag

# Documents laid end to end. Chunked kernels see lengths around and beyond their chunk; primes divide nothing.
LENGTHS = {
    "one": (293,),
    "mixed": (1, 37, 5, 2, 150, 3, 1, 11),
    "two": (128, 64),
    "ones": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "few": (2, 1),
    "single_token": (1,),
}


def random_layout(lengths, world_size, seed, empty=()):
    """Documents cut at random places, the pieces shuffled and dealt to random ranks, none to the ranks in `empty`.

    Neighbouring pieces of one document may land on one rank in any order, and a rank may get nothing by chance.
    """
    rng = random.Random(seed)
    pieces = []
    for document, length in enumerate(lengths):
        cuts = rng.sample(range(1, length), min(length - 1, rng.randint(0, 2 * world_size)))
        bounds = [0, *sorted(cuts), length]
        pieces += [Span(document, start, stop) for start, stop in zip(bounds, bounds[1:])]
    rng.shuffle(pieces)
    hands = [[] for _ in range(world_size)]
    dealt_to = [rank for rank in range(world_size) if rank not in empty]
    for piece in pieces:
        hands[rng.choice(dealt_to)].append(piece)
    return Layout(tuple(lengths), tuple(map(tuple, hands)))


@cache
def layouts(lengths, world_size):
    """Named layouts of one batch: the three of the library and two that no sensible plan would choose."""
    empty = {0, world_size // 2} if world_size > 2 else {0} if world_size == 2 else set()
    return {
        "contiguous": contiguous(lengths, world_size),
        "zigzag": zigzag(lengths, world_size),
        "balanced": balanced(lengths, world_size),
        "random": random_layout(lengths, world_size, seed=world_size),
        "holes": random_layout(lengths, world_size, seed=100 + world_size, empty=empty),
    }
