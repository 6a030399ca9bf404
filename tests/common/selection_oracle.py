"""What selections let queries see, token by token from the published rules: bool [query heads, T, T] of one document.

q: [T, H, D]; k: [T, G, D]; G divides H.
"""

from itertools import product
from math import ceil, floor, log2, prod

import torch

from longspan.attention import Antidiagonal, BlockLists, CompressedTop, Radial, TokenTop, Window


def everybody(mask, q, causal):
    """One mask for all heads."""
    return (mask.tril() if causal else mask).expand(q.shape[1], -1, -1)


def places(selection, length):
    """The place of every token in its grid."""
    first = selection.shape[0] or ceil(length / prod(selection.shape[1:]))
    grid = (first, *selection.shape[1:])
    cells = list(product(*map(range, grid)))
    if selection.order == "morton":
        sliced = selection.shape[0] == 0  # the first axis is slowest

        def code(cell):
            inner = cell[1:] if sliced else cell
            bits = ["".join(column) for column in zip(*(format(x, "010b") for x in inner))]
            return (cell[0] if sliced else 0, "".join(bits))

        cells = sorted(cells, key=code) if len(grid) > sliced else cells
    return cells[:length], grid


def window_seen(q, k, causal, selection, document):
    cells, grid = places(selection, len(q))
    flags = selection.causal_axes or [causal and axis == 0 for axis in range(len(grid))]
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for t, cell in enumerate(cells):
        ranges = []
        for i, n, width, one_way in zip(cell, grid, selection.window, flags):
            if one_way:
                ranges.append(range(i - width + 1, i + 1))
            else:  # of the windows of min(width, n) places inside the axis, that which starts nearest to i - width // 2
                starts = range(max(n - width, 0) + 1)
                start = min(starts, key=lambda s: abs(s - (i - width // 2)))
                ranges.append(range(start, start + min(width, n)))
        seen[t] = torch.tensor([all(x in r for x, r in zip(other, ranges)) for other in cells])
    return everybody(seen, q, causal)


def radial_seen(q, k, causal, selection, document):
    s, length = selection.frame, len(q)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for a in range(length):
        for b in range(length):
            distance, offset = abs(a // s - b // s), abs(a % s - b % s)
            power = 2 ** floor(log2(max(distance, 1)))
            near = power <= s and offset + 1 <= s / power
            diagonal = distance % ceil(power / s) == 0 and offset == 0
            seen[a, b] = near or diagonal or b < s
    whole = torch.zeros_like(seen)
    for i, j in product(range(0, length, selection.query_block), range(0, length, selection.key_block)):
        block = slice(i, i + selection.query_block), slice(j, j + selection.key_block)
        whole[block] = seen[block].any()
    return everybody(whole, q, causal)


def lists_seen(q, k, causal, selection, document):
    lists = torch.as_tensor(selection.lists(len(q)) if callable(selection.lists) else selection.lists[document])
    lists = lists if lists.ndim == 3 else lists[None]
    lists = lists.repeat_interleave(q.shape[1] // len(lists), 0)
    seen = torch.zeros(q.shape[1], len(q), len(q), dtype=torch.bool)
    for head, t in product(range(q.shape[1]), range(len(q))):
        for j in lists[head, t // selection.query_block].tolist():
            if j >= 0:
                seen[head, t, j * selection.key_block : (j + 1) * selection.key_block] = True
    return seen.tril() if causal else seen


def antidiagonal_seen(q, k, causal, selection, document):
    S, length, per_key = selection.stride, len(q), q.shape[1] // k.shape[1]
    zero = q.new_zeros(q.shape[-1])

    def logit(head, r, c):  # of a group of queries and one of keys
        total = 0.0
        for i in range(S):
            a, b = r * S + S - 1 - i, c * S + i
            total += ((q[a, head] if a < length else zero) @ (k[b, head // per_key] if b < length else zero)).item()
        return total / (S * q.shape[-1] ** 0.5)

    seen = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    starts = range(0, length, selection.key_block)
    for key_head, i in product(range(k.shape[1]), range(0, length, selection.query_block)):
        group = slice(key_head * per_key, (key_head + 1) * per_key)
        past = [n for n, j in enumerate(starts) if not causal or j + selection.key_block <= i]
        shares = dict.fromkeys(past, 0.0)
        chooses = i - selection.query_block if causal else i
        for r in range(chooses // S, ceil(min(chooses + selection.query_block, length) / S) if past else 0):
            for head in range(group.start, group.stop):
                columns = [
                    (n, c)
                    for n in past
                    for c in range(starts[n] // S, ceil(min(starts[n] + selection.key_block, length) / S))
                ]
                weights = torch.tensor([logit(head, r, c) for _, c in columns], dtype=torch.float64).softmax(0)
                for (n, _), weight in zip(columns, weights.tolist()):
                    shares[n] += weight
        forced = past[: selection.first]
        kept, total = [], 0.0
        for n in sorted(past, key=lambda n: (n in forced, shares[n]), reverse=True):
            if n in forced or total < selection.threshold * sum(shares.values()):
                kept.append(n)
                total += shares[n]
        stop = min(i + selection.query_block, length)
        if causal:
            kept += [n for n, j in enumerate(starts) if j < stop and j + selection.key_block > i]
        for n in kept:
            seen[group, i:stop, starts[n] : starts[n] + selection.key_block] = True
    return seen.tril() if causal else seen


def token_seen(q, k, causal, selection, document):
    B, length, per_key = selection.key_block, len(q), q.shape[1] // k.shape[1]
    means = [k[j : j + B].mean(0) for j in range(0, length, B)]
    seen = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    for head, t in product(range(q.shape[1]), range(length)):
        scores = {n: (q[t, head] @ mean[head // per_key]).item() for n, mean in enumerate(means)}
        if causal:
            scores = {n: torch.inf if n == t // B else score for n, score in scores.items() if n <= t // B}
        for n in sorted(scores, key=scores.get, reverse=True)[: selection.keep]:
            seen[head, t, n * B : (n + 1) * B] = True
    return seen.tril() if causal else seen


def compressed_seen(q, k, causal, selection, document):
    B, width, d = selection.key_block, selection.window, selection.stride
    length, per_key = len(q), q.shape[1] // k.shape[1]
    windows = range(0, length - width + 1, d)
    keys = [k[start : start + width].mean(0) for start in windows]
    seen = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    for key_head, t in product(range(k.shape[1]), range(length)):
        group = range(key_head * per_key, (key_head + 1) * per_key)
        visible = [n for n, start in enumerate(windows) if not causal or start + width <= t + 1]
        blocks = range((t if causal else length - 1) // B + 1)
        scores = dict.fromkeys(blocks, 0.0)
        for head in group:
            logits = [(q[t, head] @ keys[n][key_head]).item() * q.shape[-1] ** -0.5 for n in visible]
            for n, weight in zip(visible, torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()):
                for stretch in range(windows[n], windows[n] + width, d):
                    if stretch // B in scores:
                        scores[stretch // B] += weight
        for n in blocks:
            if n < selection.first or t // B - selection.recent < n <= t // B:
                scores[n] = torch.inf
        for n in sorted(scores, key=scores.get, reverse=True)[: selection.keep]:
            seen[group.start : group.stop, t, n * B : (n + 1) * B] = True
    return seen.tril() if causal else seen


SEEN = {
    Window: window_seen,
    Radial: radial_seen,
    BlockLists: lists_seen,
    Antidiagonal: antidiagonal_seen,
    TokenTop: token_seen,
    CompressedTop: compressed_seen,
}
