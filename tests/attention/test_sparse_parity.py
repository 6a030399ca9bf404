"""sparse_attention on 1 to 8 ranks against the selection's definition and the full masked matrix, in fp64."""

import zlib
from dataclasses import replace
from functools import cache

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS
from oracles import with_gradients
from parity import Case
from spawn import run_ranks
from traffic import Traffic

from longspan.attention import Hierarchical, TopBlocks, sparse, sparse_attention
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
    "levels1": (2, 2, {"selection": Hierarchical(8, 2, 1)}),
    "levels2": (4, 2, {"selection": Hierarchical(4, 2, 2)}),
    "levels3": (2, 2, {"selection": Hierarchical(3, 2, 3)}),
    "levels1_full": (2, 2, {"selection": Hierarchical(8, 2, 1), "causal": False}),
    "levels2_full": (2, 1, {"selection": Hierarchical(4, 3, 2), "causal": False}),
    "levels3_full": (4, 2, {"selection": Hierarchical(3, 2, 3), "causal": False}),
}


def all_cases(world_size):
    """Every variant on one long document and on mixed lengths; layouts, strategies and small batches take turns."""
    turn = world_size
    for variant in VARIANTS:
        for lengths in ("one", "mixed", ["two", "ones", "few", "single_token"][turn % 4]):
            layout = ["contiguous", "zigzag", "random", "holes", "balanced"][turn % 5]
            yield Case(variant, lengths, layout, ["fetch", "ring", "auto"][turn % 3])
            turn += 1
        if turn % 4 == 0:
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


def hierarchy_seen(q, k, causal, selection):
    """(fine [query heads, T, T], [(level, row, log weight)], coarse [query heads, T, rows]) of one document."""
    B, length, per_key = selection.block, q.shape[0], q.shape[1] // k.shape[1]
    rows = {n: range(-(-length // B**n)) for n in range(1, selection.levels + 1)}
    spans = {(n, r): (r * B**n, min((r + 1) * B**n, length)) for n in rows for r in rows[n]}
    names = list(spans)
    fine = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    coarse = torch.zeros(q.shape[1], length, len(names), dtype=torch.bool)
    for key_head in range(k.shape[1]):
        group = slice(key_head * per_key, (key_head + 1) * per_key)

        def query(n, r):  # the mean that chooses for a row
            start, stop = spans[n, r - 1 if causal else r]
            return q[start:stop, group].mean((0, 1))

        def best(n, r, candidates):
            candidates = [c for c in candidates if not causal or c < r]
            if not candidates:
                return []
            means = {c: k[slice(*spans[n, c]), key_head].mean(0) for c in candidates}
            router = query(n, r)
            return sorted(candidates, key=lambda c: (router @ means[c]).item(), reverse=True)[: selection.keep]

        top = selection.levels
        chosen = {(top, r): best(top, r, rows[top]) for r in rows[top]}
        for n in range(top - 1, 0, -1):
            for r in rows[n]:
                parents = [*chosen[n + 1, r // B], *([r // B] if causal else [])]
                chosen[n, r] = best(n, r, [c for c in rows[n] if c // B in parents])
        for t in range(length):
            i = t // B
            for block in [*chosen[1, i], *([i] if causal else [])]:
                fine[group, t, block * B : (block + 1) * B] = True
            for index, (n, r) in enumerate(names):
                if n == top:
                    listed = True
                else:
                    above = i // B**n  # the row of level n + 1 that t is in
                    listed = r // B in [*chosen[n + 1, above], *([above] if causal else [])]
                coarse[group, t, index] = listed and (not causal or (r + 1) * B**n <= t)
    return fine.tril() if causal else fine, spans, coarse


def hierarchy_matrix(q, k, v, lengths, *, selection, causal=True):
    """Fine keys and means of rows side by side; a mean's weight is its number of tokens."""
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        fine, spans, coarse = hierarchy_seen(q[rows].detach(), k[rows].detach(), causal, selection)
        seen = torch.cat([fine, coarse], 2)
        heads = q.shape[1] // k.shape[1]
        k_rows, v_rows = (
            torch.cat([x[rows], *(x[rows][a:b].mean(0, keepdim=True) for a, b in spans.values())]).repeat_interleave(
                heads, 1
            )
            for x in (k, v)
        )
        weight = torch.cat([torch.zeros(length), torch.tensor([float(b - a) for a, b in spans.values()]).log()]).to(
            q.dtype
        )
        scores = torch.einsum("thd,shd->hts", q[rows], k_rows) * q.shape[-1] ** -0.5 + weight
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hts,shd->thd", weights, v_rows))
        start += length
    return torch.cat(out)


@cache
def expected(variant, lengths, dtype):
    inputs, grad_out, kwargs = make_inputs(variant, LENGTHS[lengths], dtype)
    oracle = hierarchy_matrix if isinstance(kwargs["selection"], Hierarchical) else full_matrix
    return with_gradients(oracle, inputs, grad_out, LENGTHS[lengths], **kwargs)


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, sparse_attention, make_inputs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_full_matrix(world_size):
    cases = list(all_cases(world_size))
    ranks = run_ranks(run_cases, world_size, cases, timeout=180)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "full" not in name])
def test_no_token_reaches_an_earlier_one(variant):
    """Changing a token changes no earlier output, nor any block chosen for one."""
    inputs, _, kwargs = make_inputs(variant, (200,))
    selection, layout = kwargs["selection"], contiguous((200,), 1)
    tables = selection.tables(SequenceParallel().context(layout), True)

    def run(inputs):
        coarse, _ = selection.coarse(inputs["k"], inputs["v"], tables, lambda x: x)
        chosen = selection.choose(inputs["q"], inputs["k"], coarse, tables, lambda x: x)
        return sparse_attention(**inputs, layout=layout, **kwargs), [x.sort(-1).values for x in chosen if x is not None]

    out, chosen = run(inputs)
    for token in (0, 15, 16, 50, 111, 199):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[token] += 3.0
        new_out, new_chosen = run(changed)
        assert torch.equal(new_out[:token], out[:token]) and not torch.equal(new_out[token:], out[token:])
        block = token // tables.queries.size
        for new, old in zip(new_chosen, chosen, strict=True):
            assert torch.equal(new[:, : block + 1], old[:, : block + 1])


@pytest.mark.parametrize("variant", ["causal_gqa", "levels2", "levels2_full"])
def test_triton_kernels_in_its_place(variant, monkeypatch):
    fused = pytest.importorskip("longspan.kernels.sparse.fused", reason="Triton is not installed")
    monkeypatch.setattr(sparse, "choose", lambda *arguments: (fused, None))
    inputs, grad_out, kwargs = make_inputs(variant, (100,), torch.float32)
    blocks = {"block": 16} if "levels" in variant else {"query_block": 32, "key_block": 16}
    kwargs = kwargs | {"selection": replace(kwargs["selection"], **blocks)}
    oracle = hierarchy_matrix if "levels" in variant else full_matrix
    wanted = with_gradients(oracle, inputs, grad_out, (100,), **kwargs)
    share = parity.run_share(sparse_attention, inputs, grad_out, contiguous((100,), 1), 0, **kwargs)
    assert all(parity.relative_error(share[name], x) < 1e-5 for name, x in wanted.items())


def run_traffic(rank, world_size, strategy):
    """Bytes of keys and values sent, and what the blocks of others that this rank's queries chose weigh."""
    inputs, grad_out, _ = make_inputs("causal_gqa", (1024,), torch.float32)
    layout = contiguous((1024,), world_size)
    selection = TopBlocks(2, query_block=64, key_block=16)
    rows = torch.from_numpy(layout.global_indices(rank))
    q, k, v = (inputs[name][rows] for name in "qkv")
    with Traffic() as traffic:
        sparse_attention(q, k, v, selection=selection, layout=layout, group=dist.group.WORLD, strategy=strategy)
    seen = blocks_seen(inputs["q"], inputs["k"], True, selection)[:, rows]  # [query heads, rows, T]
    wanted = sum(seen[2 * head].any(0).sum() - seen[2 * head][:, rows].any(0).sum() for head in range(2)).item()
    return traffic.bytes["isend"], wanted * 2 * HEAD_SIZE * 4


def test_only_blocks_that_are_chosen_travel():
    fetched, ring = (run_ranks(run_traffic, 4, strategy) for strategy in ("fetch", "ring"))
    sent, wanted = map(sum, zip(*fetched))
    assert sent == wanted > 0
    assert sum(sent for sent, _ in ring) > 2 * wanted
