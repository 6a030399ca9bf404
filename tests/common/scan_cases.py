"""Scans of states against a loop over spans, for every kind of transition and layout."""

import random
from functools import cache

import torch
from cases import LENGTHS, layouts, random_layout
from traffic import Traffic

from longspan.kernels.fold import fold_chains, step, summarize
from longspan.parallel import Span, contiguous
from longspan.parallel.scan import TRANSPORTS, start_scan

ARITHMETIC = {"fold": fold_chains, "summarize": summarize, "step": step}
TRANSITIONS = ["none", "scalar", "vector", "matrix"]


# Every span's summary is a function of the span, so that all ranks know all of them.


@cache
def summary(span, kind, sizes):
    """(state, gradient, transition) of a span in fp64."""
    heads, keys, values = sizes
    generator = torch.Generator().manual_seed(1000 * span.document + span.start)
    tail = {"none": (), "scalar": (heads,), "vector": (heads, keys), "matrix": (heads, keys, keys)}[kind]
    draws = [torch.randn(shape, generator=generator).double() for shape in (sizes, sizes, tail)]
    draws[2] = {"none": None, "matrix": draws[2] / keys**0.5}.get(kind, -draws[2].abs())
    return draws


def scan_loop(layout, kind, sizes):
    """What enters each span, [H, K, V] by direction and span: a loop over each document."""
    entries = {"forward": {}, "backward": {}, "whole": {}}
    for document in range(len(layout.lengths)):
        spans = sorted(span for spans in layout.spans for span in spans if span.document == document)
        reached = reached_back = torch.zeros(sizes, dtype=torch.float64)
        for span in spans:
            state, _, transition = summary(span, kind, sizes)
            entries["forward"][span] = reached
            reached = step(state, transition, reached)
        for span in reversed(spans):
            _, gradient, transition = summary(span, kind, sizes)
            entries["backward"][span] = reached_back
            reached_back = step(gradient, transition.mT if kind == "matrix" else transition, reached_back)
        entries["whole"] |= dict.fromkeys(spans, reached)
    return entries


def scan_and_check(plan, layout, kind, transport, sizes, group, expected, device, dtype, limit, where, peers=None):
    """Scans forward, backward and, where possible, whole documents. Returns the traffic of each."""
    spans = layout.spans[plan.rank]
    example = summary(Span(0, 0, 1), kind, sizes)
    mine = [summary(spans[n], kind, sizes) for n in plan.linked]
    state, gradient, transition = (
        None if x is None else torch.stack([x, *(one[i] for one in mine)])[1:].to(device, dtype)
        for i, x in enumerate(example)
    )
    traffic, transitions = {}, None
    for direction in ("forward", "backward", "whole"):
        if direction == "whole" and TRANSPORTS[transport].causal_only:
            continue
        start, given = (gradient, transitions) if direction == "backward" else (state, transition)
        if direction == "backward" and kind == "matrix":
            given = given.mT
        with Traffic() as traffic[direction]:
            scan = start_scan(transport, plan, direction, start, given, group, **ARITHMETIC, peers=peers)
            entries, got = scan.wait()
        if direction == "forward":
            transitions = got
        which = getattr(plan, direction).which
        assert entries.shape == (len(which), *sizes), where
        for n, entry in zip(which, entries.cpu().double()):
            wanted = expected[direction][spans[n]]
            error = (entry - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert error <= limit, f"{where}, {direction}, span {n}: off by {error:.1e}"
    return traffic


def all_layouts(world_size, names=tuple(LENGTHS)):
    """The layouts of tests/common, and documents of which only some are on several ranks."""
    for name in names:
        yield from layouts(LENGTHS[name], world_size).items()
    yield "aligned", contiguous((64,) * world_size, world_size)
    for seed in range(3):
        lengths = [random.Random(seed).randint(1, 40) for _ in range(4)]
        yield f"random {seed}", random_layout(lengths, world_size, seed)
