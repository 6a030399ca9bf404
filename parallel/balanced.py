"""The default base layout: equal tokens on every rank, and equal causal attention within 1 %, for any mix of lengths.

A document cut in head-tail pairs has as many query-key pairs for each of its tokens as half of it is long. With equal
tokens on all ranks, attention is equal where each has as many pairs above the average, in long documents, as below it,
in short ones.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise

from longspan.parallel.layout import Layout, check_lengths, check_world_size
from longspan.parallel.shares import Share, spans_of

SLACK = 0.005  # of a rank's pairs: so far off a border may be that it then lies between two documents


def balanced(lengths, world_size: int) -> Layout:
    """Documents on as few ranks as their work needs, in head-tail pairs; totals differ by at most one token.

    Long documents, with more than the average of query-key pairs a token, lie end to end in one row, the others in a
    second one. Rank after rank takes the next tokens of both, as many of each as even out its pairs. So fewer than
    2 * world_size documents are cut, each over ranks in a row, and a rank has at most six spans of those: in each row
    the last of one document and two of the next. One document alone is plain zig-zag.
    """
    lengths, world_size = check_lengths(lengths), check_world_size(world_size)
    total, pairs = sum(lengths), sum(length * (length + 1) for length in lengths) // 2
    surplus = [(length + 1) * total - 2 * pairs for length in lengths]  # a token's pairs above the average, * 2 * total
    longest_first = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    others = [d for d in longest_first if surplus[d] <= 0]
    dealt = [d for hand in range(world_size) for d in others[hand::world_size]]  # every stretch has all lengths
    long = _Row([d for d in longest_first if surplus[d] > 0], lengths, surplus)
    short = _Row(dealt, lengths, surplus)
    shares = []
    for row, borders in zip((long, short), _borders(long, short, world_size, SLACK * 2 * total * pairs / world_size)):
        shares += row.shares(borders)
    spans = spans_of(lengths, world_size, shares)
    return Layout(lengths, tuple(tuple(sorted(of_rank)) for of_rank in spans))


def _borders(long, short, world_size, slack):
    """Tokens of either row in front of each rank, and of all ranks."""
    floor, extra = divmod(long.tokens + short.tokens, world_size)
    before, of_long = [0], [0]
    for rank in range(world_size):
        step = floor + (rank < extra)
        tokens = before[-1] + step
        fewest, most = max(of_long[-1], tokens - short.tokens), min(of_long[-1] + step, long.tokens)

        def over(border):  # pairs above the average in front of this border, after so many tokens of long documents
            return long.surplus(border) + short.surplus(tokens - border)

        exact = fewest + bisect_left(range(fewest, most), 0, key=over)
        ends = *long.ends(exact), *(tokens - end for end in short.ends(tokens - exact))
        near = [end for end in ends if fewest <= end <= most and abs(over(end)) <= slack]
        before.append(tokens)
        of_long.append(min(near, key=lambda end: abs(over(end)), default=exact))
    return of_long, [tokens - border for tokens, border in zip(before, of_long)]


class _Row:
    """Documents end to end."""

    def __init__(self, documents, lengths, surplus):
        self.documents, self.slopes = documents, [*(surplus[d] for d in documents), 0]
        self.starts = [0, *accumulate(lengths[d] for d in documents)]
        self.sums = [0, *accumulate(lengths[d] * surplus[d] for d in documents)]
        self.tokens = self.starts[-1]

    def surplus(self, tokens):
        """Of the first `tokens` together."""
        place = bisect_right(self.starts, tokens) - 1
        return self.sums[place] + (tokens - self.starts[place]) * self.slopes[place]

    def ends(self, tokens):
        """Where the document that is there after so many tokens begins and ends."""
        place = bisect_left(self.starts, tokens)
        return self.starts[max(place - 1, 0) : place + 1]

    def shares(self, borders):
        """Of every document, with borders between ranks."""
        for document, (start, stop) in zip(self.documents, pairwise(self.starts)):
            ranks = range(bisect_right(borders, start) - 1, bisect_left(borders, stop))
            held = ((rank, min(stop, borders[rank + 1]) - max(start, borders[rank])) for rank in ranks)
            yield Share(document, *zip(*(part for part in held if part[1])))
