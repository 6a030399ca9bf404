"""sparse_attention on 1 to 8 ranks against the selection's definition and the full masked matrix, in fp64."""

import zlib
from functools import cache

import parity
import pytest
import torch
from cases import LENGTHS
from oracles import with_gradients
from parity import Case
from spawn import run_ranks

from longspan.attention import sparse_attention
from longspan.attention.selections import TopBlocks
from longspan.parallel import SequenceParallel, contiguous

HEAD_SIZE = 8
SMALL = {"query_block": 16, "key_block": 8}
# name: (query heads, key heads, keyword arguments)
VARIANTS = {
    "causal": (2, 2, {"selection": TopBlocks(2, **SMALL)}),
    "causal_gqa": (4, 2, {"selection": TopBlocks(0.3, **SMALL)}),
    "causal_forced": (2, 1, {"selection": TopBlocks(4, **SMALL, first=1, recent=1)}),
    "causal_odd": (2, 2, {"selection": TopBlocks(3, query_block=12, key_block=7)}),
    "full": (2, 2, {"selection": TopBlocks(3, **SMALL), "causal": False}),
    "full_gqa": (4, 2, {"selection": TopBlocks(0.2, **SMALL), "causal": False}),
}


def all_cases():
    for i, variant in enumerate(VARIANTS):
        for j, layout in enumerate(["contiguous", "zigzag", "random", "holes"]):
            yield Case(variant, "one", layout, ["fetch", "ring"][(i + j) % 2])
            yield Case(variant, "mixed", layout, ["ring", "fetch", "auto"][(i + j) % 3])
            yield Case(variant, ["two", "ones", "few", "single_token"][(i + j) % 4], layout, "auto")
        yield Case(variant, "mixed", "zigzag", "auto", torch.float32)


def make_inputs(variant, lengths, dtype=torch.float64):
    heads, key_heads, kwargs = VARIANTS[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(heads):
        return torch.randn(sum(lengths), heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)

    return {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}, normal(heads), kwargs


def blocks_seen(q, k, causal, selection):
    """[query heads, T, T] of one document, token by token from the definition in TopBlocks."""
    length, per_key = q.shape[0], q.shape[1] // k.shape[1]
    query_starts, key_starts = (range(0, length, n) for n in (selection.query_block, selection.key_block))
    seen = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    for key_head in range(k.shape[1]):
        group = slice(key_head * per_key, (key_head + 1) * per_key)
        means = [k[j : j + selection.key_block, key_head].mean(0) for j in key_starts]
        for i in query_starts:
            stop = min(i + selection.query_block, length)
            past = [n for n, j in enumerate(key_starts) if not causal or j + selection.key_block <= i]
            kept = set()
            if past:
                router = q[i - selection.query_block : i, group] if causal else q[i:stop, group]
                scores = {n: (router.mean((0, 1)) @ means[n]).item() for n in past}
                forced = [*past[: selection.first], *past[len(past) - selection.recent :]]
                scores |= dict.fromkeys(forced, torch.inf)
                count = selection.keep if selection.keep >= 1 else max(1, int(selection.keep * len(past)))
                kept |= set(sorted(past, key=scores.get, reverse=True)[:count])
            if causal:
                kept |= {n for n, j in enumerate(key_starts) if j < stop and j + selection.key_block > i}
            for n in kept:
                j = key_starts[n]
                seen[group, i:stop, j : j + selection.key_block] = True
    return seen.tril() if causal else seen


def full_matrix(q, k, v, lengths, *, selection, causal=True):
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        seen = blocks_seen(q[rows].detach(), k[rows].detach(), causal, selection)
        k_rows, v_rows = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[rows], k_rows) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hts,shd->thd", weights, v_rows))
        start += length
    return torch.cat(out)


@cache
def expected(variant, lengths, dtype):
    inputs, grad_out, kwargs = make_inputs(variant, LENGTHS[lengths], dtype)
    return with_gradients(full_matrix, inputs, grad_out, LENGTHS[lengths], **kwargs)


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, sparse_attention, make_inputs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_full_matrix(world_size):
    cases = list(all_cases())
    ranks = run_ranks(run_cases, world_size, cases, timeout=180)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


@pytest.mark.parametrize("variant", ["causal", "causal_gqa", "causal_forced", "causal_odd"])
def test_no_token_reaches_an_earlier_one(variant):
    """Changing a token changes no earlier output, nor any block chosen for one."""
    inputs, _, kwargs = make_inputs(variant, (200,))
    selection, layout = kwargs["selection"], contiguous((200,), 1)
    tables = selection.tables(SequenceParallel().context(layout), True)

    def run(inputs):
        out = sparse_attention(**inputs, layout=layout, **kwargs)
        return out, selection.choose(inputs["q"], inputs["k"], None, tables, lambda x: x)[0]

    out, chosen = run(inputs)
    for token in (0, 15, 16, 50, 111, 199):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[token] += 3.0
        new_out, new_chosen = run(changed)
        assert torch.equal(new_out[:token], out[:token]) and not torch.equal(new_out[token:], out[token:])
        block = token // selection.query_block
        assert torch.equal(new_chosen[:, : block + 1].sort(-1).values, chosen[:, : block + 1].sort(-1).values)
