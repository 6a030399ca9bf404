"""Errors of linear attention against fp64: over ranks beside one rank, and along a long sequence."""

import torch
import torch.distributed as dist

from longspan.attention import linear_attention
from longspan.benchmarks.head_parallel import HEAD_PARALLEL, HeadParallel
from longspan.benchmarks.linear_cases import Inputs, gradients
from longspan.kernels.segments import CHUNK

LIMIT = 1.5  # error over ranks over error of one rank
ENDS = 16  # chunks at the start and at the end that are compared
GROUPS = 16  # runs of chunks whose errors are recorded in between


def parity(ranks, problem, strategies, seed: int) -> list[dict]:
    """Relative errors of out and gradients of one rank and of all ranks, documents crossing ranks; one row per layout
    and strategy. broken: somewhere more than LIMIT times the error of one rank."""
    lengths = _documents(problem.tokens)
    whole = problem.random(seed)
    expected = _run(whole.double(), ranks.alone(lengths))
    one = {name: x.double() - expected[name] for name, x in _run(whole, ranks.alone(lengths)).items()}
    one = {name: (x.norm() / expected[name].norm()).item() for name, x in one.items()}
    rows = []
    for layout in ("zigzag", "contiguous"):
        for strategy in strategies:
            seq = ranks.context(lengths, layout, "auto" if strategy == HEAD_PARALLEL else strategy)
            tokens, part = _part(whole, seq, problem.device)
            attend = None
            if strategy == HEAD_PARALLEL:
                attend = HeadParallel(seq.layout, ranks.mesh.sp_group, problem.device)
            many = {}
            for name, x in _run(part, seq, attend).items():
                squares = (x.double() - expected[name][tokens]).square().sum()
                dist.all_reduce(squares, group=ranks.mesh.sp_group)
                many[name] = (squares.sqrt() / expected[name].norm()).item()
            ratio = {name: many[name] / one[name] for name in many}
            broken = not all(value <= LIMIT for value in ratio.values())
            rows.append(
                {"family": problem.family, "layout": layout, "strategy": strategy, "lengths": lengths, "one": one,
                 "many": many, "ratio": ratio, "broken": broken}
            )  # fmt: skip
    return rows


def drift(ranks, problem, seed: int) -> list[dict]:
    """Relative error of out, dq, dk and dv by chunks of one long document: what was carried from far away must not be
    worse than what was just begun. One row for one rank, one for all ranks."""
    lengths, whole = (problem.tokens,), problem.random(seed)
    expected = _run(whole.double(), ranks.alone(lengths))
    chunks = torch.arange(problem.tokens, device=problem.device) // CHUNK
    rows = []
    for label, seq in (("one rank", ranks.alone(lengths)), ("all ranks", ranks.context(lengths, "zigzag", "lasp2"))):
        tokens, part = _part(whole, seq, problem.device)
        first, last, groups = {}, {}, {}
        for name, x in _run(part, seq).items():
            if name in ("dg", "dbeta"):
                continue
            error = (x.double() - expected[name][tokens]).square().flatten(1).sum(1)
            size = expected[name].square().flatten(1).sum(1)
            error = torch.zeros_like(size[::CHUNK]).index_add_(0, chunks[tokens], error)
            size = torch.zeros_like(error).index_add_(0, chunks, size)
            if seq.world_size > 1:
                dist.all_reduce(error, group=ranks.mesh.sp_group)
            first[name], last[name] = _error(error[:ENDS], size[:ENDS]), _error(error[-ENDS:], size[-ENDS:])
            pairs = zip(error.tensor_split(GROUPS), size.tensor_split(GROUPS), strict=True)
            groups[name] = [_error(*pair) for pair in pairs if len(pair[0])]
        rows.append({"family": problem.family, "run": label, "first": first, "last": last, "chunks": groups})
    return rows


def _documents(tokens: int) -> tuple[int, ...]:
    """A document of one token and three longer ones, the longest over more than half of the ranks."""
    middle = tokens // 2 + 7
    return tokens // 4 + 13, 1, middle, tokens - tokens // 4 - 14 - middle


def _part(whole: Inputs, seq, device) -> tuple[torch.Tensor, Inputs]:
    """This rank's tokens and its part of the inputs."""
    tokens = torch.from_numpy(seq.layout.global_indices(seq.rank)).to(device)
    return tokens, whole.map(lambda x: x if x.ndim == 1 else x.detach()[tokens])


def _run(inputs: Inputs, seq, attend=None) -> dict[str, torch.Tensor]:
    x = inputs.map(lambda tensor: tensor.detach())
    x.leaves()
    attend = attend or linear_attention
    out = attend(x.q, x.k, x.v, log_decay=x.log_decay, beta=x.beta, seq=seq)
    return {"out": out.detach()} | gradients(out, x)


def _error(squares: torch.Tensor, sizes: torch.Tensor) -> float:
    return (squares.sum() / sizes.sum()).sqrt().item()
