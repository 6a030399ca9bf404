"""Ranks that share memory, as processes that take turns on one GPU: to the bit what the group gives.

The code is that of several GPUs; on a CPU it runs with kernels in the interpreter. All ranks see one L2 cache: this
shows that masks, flags, counts and windows that are used again are right, in many orders in which ranks may come; not
that what goes over a link keeps its order.
"""

import random
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from devices import telling
from sparse_oracle import sparse_attention as definition
from sparse_variants import SMALL, random_lists
from spawn import run_ranks
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from longspan.attention import (
    Hierarchical,
    LinearBranch,
    TokenTop,
    TopBlocks,
    Window,
    linear_attention,
    short_convolution,
    sparse_attention,
)
from longspan.attention.recompute import checkpoint_contexts
from longspan.parallel import SequenceParallel, peer_memory

pytest.importorskip("triton", reason="memory is shared by Triton kernels")
from one_gpu import through_host, windows_on_gpu  # noqa: E402
from shared_windows import shared_windows  # noqa: E402


@dataclass(frozen=True)
class Case:
    """heads: of queries, of keys. before: what is there before the sparse layers, whose halos and states go the same
    way: a short convolution and linear attention with a decay of so many dimensions. defined: by an oracle, too."""

    selection: object
    heads: tuple[int, int] = (4, 2)
    width: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = True
    branch: str | None = None
    lengths: tuple[int, ...] = LENGTHS["mixed"]
    layout: str = "zigzag"
    before: int = 0
    checkpointed: bool = False
    defined: bool = False


LARGE = {"width": 128, "dtype": torch.bfloat16, "lengths": (8192,), "layout": "contiguous"}
MIXED = LARGE | {"lengths": (2100, 1, 900, 5191), "layout": "zigzag"}
CASES = {
    # Blocks are so small that attention runs in plain PyTorch on a GPU, too.
    "top": Case(TopBlocks(2, **SMALL), defined=True),
    "top_branch": Case(TopBlocks(0.3, **SMALL), branch="all", layout="random"),
    "top_full": Case(TopBlocks(0.2, **SMALL), causal=False, branch="rest", layout="random"),
    "top_odd": Case(TopBlocks(3, query_block=12, key_block=7), (2, 2), dtype=torch.float64, layout="holes"),
    "llsa2": Case(Hierarchical(4, 2, 2), layout="random", checkpointed=True, defined=True),
    "llsa3_full": Case(Hierarchical(3, 2, 3), (2, 2), dtype=torch.float64, causal=False, layout="contiguous"),
    "window": Case(Window(37, **SMALL), dtype=torch.bfloat16, layout="holes"),
    "lists_full": Case(random_lists(LENGTHS["mixed"]), causal=False, layout="balanced", checkpointed=True),
    "tokens": Case(TokenTop(3, **SMALL), layout="random"),
    "stack": Case(TopBlocks(2, **SMALL), (2, 2), 16, branch="all", layout="random", before=2),
    "stack_fixed": Case(Hierarchical(4, 2, 2), (2, 2), 16, before=1, checkpointed=True),
    # Those that kernels for Hopper take.
    "large_top16": Case(TopBlocks(16), causal=False, branch="all", **LARGE),
    "large_top16_mixed": Case(TopBlocks(16), **MIXED),
    "large_llsa2": Case(Hierarchical(16, 8, 2), causal=False, **LARGE),
    "large_llsa3_mixed": Case(Hierarchical(16, 8, 3), **MIXED, checkpointed=True),
}
ON_CPU = {2: ["stack"], 3: ["top_full", "llsa2"], 4: ["stack_fixed"]}  # an interpreter takes its time
SEEDS, ROUNDS = 2, 2  # in the first round no rank hesitates


def make(case, seed):
    """Tensors of all ranks by name; those of single ranks have as many rows as there are tokens."""
    generator, (heads, key_heads), tokens = torch.Generator().manual_seed(seed), case.heads, sum(case.lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(case.dtype)

    made = {name: normal(tokens, n, case.width) for name, n in zip("qkvd", (heads, key_heads, key_heads, heads))}
    made |= {"project": normal(case.width, case.width), "bias": normal(case.width)}
    if case.before:
        made |= {"x": normal(tokens, heads * case.width), "weight": normal(heads * case.width, 4)}
        made["decay"] = -normal(*(tokens, heads)[2 - case.before :]).float().abs()
    return made


def inputs_of(case):
    names = ["q", "k", "v"] + ["project", "bias"] * (case.branch is not None)
    return names + ["x", "weight"] * (case.before > 0) + ["decay"] * (case.before == 2)


def both(attend, q, k, v):
    """Two layers: what one leaves in a window is not the other's."""
    return attend(q, k, v) + attend(q.flip(2), k.sin(), v.cos())


def run(case, made, layout, rank, peers, device):
    """The output and all gradients of this rank."""
    rows, names = torch.from_numpy(layout.global_indices(rank)), inputs_of(case)
    parallel = SequenceParallel(dist.group.WORLD, peers=peers, linear="lasp2", sparse="fetch", device=device)
    seq = parallel.context(layout)
    given = {name: (x[rows] if len(x) == layout.num_tokens else x).to(device) for name, x in made.items()}
    leaves = [given[name].requires_grad_() for name in names]

    def layer(*leaves):
        x = given | dict(zip(names, leaves, strict=True))
        q, branch = x["q"], LinearBranch(x["project"], x["bias"], over=case.branch) if case.branch else None
        if case.before:
            y = short_convolution(x["x"], x["weight"], activation="silu", seq=seq).view(q.shape)
            q = q + linear_attention(y, y.sin(), y.cos(), log_decay=x["decay"], seq=seq)
        options = {"selection": case.selection, "linear": branch, "causal": case.causal, "seq": seq}
        return both(partial(sparse_attention, **options), q, x["k"], x["v"])

    if case.checkpointed:
        out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=checkpoint_contexts)
    else:
        out = layer(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, given["d"])


def defined(case, made, layout, rank):
    """What `run` should give, token by token in fp64."""
    leaves = [made[name].double().requires_grad_() for name in "qkv"]
    options = {"lengths": case.lengths, "selection": case.selection, "causal": case.causal}
    out = both(partial(definition, **options), *leaves)
    rows = torch.from_numpy(layout.global_indices(rank))
    return [x[rows] for x in (out.detach(), *torch.autograd.grad(out, leaves, made["d"].double()))]


@contextmanager
def hesitating(rank, number, device):
    """A rank stops now and then around what it does with windows: ranks do not stop in the same places."""
    chance = random.Random(100 * number + rank)

    def pause():
        if chance.random() < 0.1:
            if device.type == "cuda":  # 30 ms of the current stream: longer than the others' hosts need for a layer
                torch.cuda._sleep(60_000_000)
            else:
                torch.randn(1000, 1000) @ torch.randn(1000, 1000)

    def slow(function):
        def call(*given, **options):
            pause()
            result = function(*given, **options)
            pause()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("signal", "wait", "start_gather", "collect_next"):
            patch.setattr(peer_memory.PeerMemory, name, slow(getattr(peer_memory.PeerMemory, name)))
        yield


def compare(rank, world_size, device, names, rounds=ROUNDS, log=False):
    """What this rank found wrong."""
    device, problems, start = torch.device(device), [], time.monotonic()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # for what runs in plain PyTorch
        peers = windows_on_gpu(world_size, device)
    else:
        peers = shared_windows(rank, world_size)
    for name in names:
        case, before = CASES[name], peers.received
        layout = layouts(case.lengths, world_size)[case.layout]
        made = [make(case, seed) for seed in range(SEEDS)]

        def one(*given):
            with through_host(), Traffic() as traffic:
                return run(case, *given, device), traffic

        wanted = []
        for seed in range(SEEDS):
            found, by_group = one(made[seed], layout, rank, None)
            wanted.append(found)
        for number in range(rounds):
            for seed in range(SEEDS):
                with hesitating(rank, number, device) if number else nullcontext():
                    found, by_peers = one(made[seed], layout, rank, peers)
                if not all(map(torch.equal, wanted[seed], found)):
                    worst = [(x - y).abs().max().item() for x, y in zip(wanted[seed], found) if x.numel()]
                    problems.append(f"rank {rank}: {name}, round {number}, seed {seed}: differs by {worst}")
        if not all(x.isfinite().all() for found in wanted for x in found):
            problems.append(f"rank {rank}: {name}: not finite")
        if case.defined:
            for x, y in zip(wanted[0], defined(case, made[0], layout, rank), strict=True):
                if not parity.relative_error(x.cpu(), y) < 1e-4:
                    problems.append(f"rank {rank}: {name}: not what is defined")
        if not peers.received > before or not by_peers.num_calls < by_group.num_calls:
            problems.append(f"rank {rank}: {name}: {by_peers.calls}, by the group {by_group.calls}")
        if log and rank == 0:
            print(f"  {world_size} ranks, {name}: {time.monotonic() - start:.1f} s, {len(problems)} wrong", flush=True)
    return problems


def check(world_size, *given):
    problems = sum(run_ranks(compare, world_size, *given, timeout=150), [])
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_as_by_the_group(world_size):
    check(world_size, "cpu", ON_CPU[world_size])


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", telling(2, rest=[3, 4]))
def test_the_same_as_by_the_group_on_one_gpu(world_size):
    names = [*CASES]
    check(world_size, "cuda:0", names if world_size == 2 else names[world_size % 2 :: 2])
