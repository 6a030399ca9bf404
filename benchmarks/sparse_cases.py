"""What is measured of block-sparse attention on one GPU, as steps for a process of its own (worker.py)."""

import argparse
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from longspan.attention import Hierarchical, LinearBranch, TopBlocks, sparse, sparse_attention
from longspan.attention.gather_rows import Ranks
from longspan.benchmarks.sparse_peers import PEERS, Problem
from longspan.benchmarks.worker import captured, launched_kernels, time_calls
from longspan.kernels import softmax
from longspan.kernels.sparse import BlockPlan
from longspan.launcher.parsing import parse_tokens
from longspan.parallel import SequenceParallel

SELECTIONS = {
    "top": TopBlocks(0.05, query_block=128, key_block=64),
    "top128": TopBlocks(0.05, query_block=128, key_block=128),
    "sla": TopBlocks(0.05, query_block=128, key_block=64),
    "llsa1": Hierarchical(16, 8, 1),
    "llsa2": Hierarchical(16, 8, 2),
    "llsa3": Hierarchical(16, 8, 3),
}
LINEAR = ("sla",)  # with a linear branch over all keys
OURS = ("sparse", "dense", "parts")
SLOW_S = 0.1  # longer calls are repeated 5 times
CLUSTER_TOKENS, CLUSTERS = 1024, 64


@dataclass(frozen=True)
class Case:
    """`batch` documents of `tokens` tokens laid end to end; every head attends to every token of its document."""

    selection: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    inputs: str = "random"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """SELECTION:BATCHxHEADSxTOKENSxHEAD_DIM[:random or clustered]"""
        try:
            selection, shape, *inputs = text.split(":")
            batch, heads, tokens, head_dim = shape.split("x")
            case = cls(selection, int(batch), int(heads), parse_tokens(tokens), int(head_dim), *inputs)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no case: {cls.parse.__doc__}") from error
        if selection not in SELECTIONS or case.inputs not in ("random", "clustered"):
            raise argparse.ArgumentTypeError(f"{text!r} is no case; selections: {', '.join(SELECTIONS)}")
        return case

    def random(self, seed: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k, v, d_out [tokens of all, heads, head_dim]; clustered: runs of queries and of keys have a direction in
        common, so that what neighbours choose is near and alike."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.batch * self.tokens, self.heads, self.head_dim
        q, k, v, d_out = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
        if self.inputs == "clustered":
            centres = torch.randn(CLUSTERS, *shape[1:], generator=generator, device=device, dtype=dtype)
            cluster = torch.arange(shape[0], device=device) // CLUSTER_TOKENS % CLUSTERS
            q, k = (x.add_(centres[cluster]) for x in (q, k))
        return [q, k, v, d_out]


@dataclass(frozen=True)
class Step:
    """name: one of OURS, a peer in PEERS, or one of these after "prepare ", which compiles and does not measure."""

    case: Case
    name: str
    device: torch.device
    seed: int
    seconds: float
    dense_tokens: int

    def run(self) -> dict:
        bench = _bench(replace(self, name=""))
        if self.name.startswith("prepare "):
            bench.prepare(self.name.removeprefix("prepare "))
            return {}
        return bench.peer(self.name) if self.name in PEERS else getattr(bench, self.name)()


@lru_cache(maxsize=1)
def _bench(step: Step) -> "Bench":
    return Bench(step)


class Bench:
    """What is measured of one case: name -> milliseconds and more."""

    def __init__(self, step: Step):
        self.case, self.step, self.device = step.case, step, step.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.inputs = self.case.random(step.seed, self.device, self.dtype)
        self.selection, self.scale = SELECTIONS[self.case.selection], self.case.head_dim**-0.5
        self.seq = SequenceParallel(device=self.device).context((self.case.tokens,) * self.case.batch)
        self.tables = self.selection.tables(self.seq, False)  # made with the batch, like positions: not timed
        self.branch = []  # weight and bias
        if self.case.selection in LINEAR:
            width, generator = self.case.head_dim, torch.Generator(self.device).manual_seed(step.seed)
            shapes = (width, width), (width,)
            self.branch = [torch.randn(x, generator=generator, device=self.device) / width**0.5 for x in shapes]

    def attend(self, q, k, v, *branch):
        linear = LinearBranch(*branch) if branch else None
        return sparse_attention(q, k, v, selection=self.selection, linear=linear, causal=False, seq=self.seq)

    def chosen(self):
        with torch.no_grad():
            return self.selection.choose(*self.inputs[:2], None, self.tables, Ranks())[0]

    def lists(self) -> torch.Tensor:
        """What `chosen` says, by document: [batch, heads, query blocks, kept]."""
        batch, blocks = self.case.batch, -(-self.case.tokens // self.selection.key_block)
        chosen = self.chosen().unflatten(1, (batch, -1)).transpose(0, 1)
        return chosen - blocks * torch.arange(batch, device=self.device)[:, None, None, None]

    def directions(self, attend, inputs, d_out):
        """Calls of one direction and of both, the latter with gradients of all inputs."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        parameters = list(attend.parameters()) if isinstance(attend, torch.nn.Module) else []

        def forward():
            with torch.no_grad():
                return attend(*inputs)

        def both():
            torch.autograd.grad(attend(*leaves), leaves + parameters, d_out)

        return {"forward": forward, "forward+backward": both}

    def ours(self):
        return self.directions(self.attend, self.inputs[:3] + self.branch, self.inputs[3])

    def theirs(self, name):
        case = self.case
        q, k, v, d_out = (x.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous() for x in self.inputs)
        attend = PEERS[name].make(Problem(self.selection, self.lists, self.scale, *self.branch))
        return self.directions(attend, [q, k, v], d_out)

    def prepare(self, name):
        for call in (self.theirs(name) if name in PEERS else self.ours()).values():
            call()

    def time(self, call) -> dict:
        return time_calls([call], self.device, self.step.seconds, SLOW_S)

    def measured(self, calls) -> dict:
        found = {name: self.time(call) for name, call in calls.items()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            calls["forward+backward"]()
            found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
            for name, call in calls.items():
                found[name]["kernels"] = launched_kernels(call)
                found[name]["launches"] = sum(kernel["count"] for kernel in found[name]["kernels"])
        return found

    def sparse(self):
        """graph: milliseconds in a CUDA graph, without the host, as where several layers are queued."""
        calls = self.ours()
        found = self.measured(calls)
        if self.device.type == "cuda":
            for name, call in calls.items():
                found[name]["graph"] = self.time(captured([call])[0])["ms"]
        return found

    def peer(self, name):
        """Another library's, and how far its output is from longspan's where both do the same."""
        calls, found = self.theirs(name), {}
        if PEERS[name].same:
            theirs, ours = calls["forward"]().transpose(1, 2).flatten(0, 1), self.ours()["forward"]()
            found["difference"] = ((theirs - ours).norm(dtype=torch.float32) / ours.norm(dtype=torch.float32)).item()
            del theirs, ours
        return found | self.measured(calls)

    def dense(self):
        """The fastest back end here, a document after the other: packed calls are slower in some libraries."""
        tokens = min(self.case.tokens, self.step.dense_tokens)
        backend, refused = softmax.choose("auto", self.device.type, self.dtype, self.case.head_dim)
        pack, options = softmax.Pack((0, tokens), (0, tokens), False), (self.scale,)
        q, k, v, d_out = (x[:tokens] for x in self.inputs)

        def both():
            out, lse = backend.forward(q, k, v, pack, *options)
            backend.backward(d_out, q, k, v, out, lse, pack, *options)

        factor = self.case.batch * (self.case.tokens / tokens) ** 2
        found = {"backend": backend.name, "refused": refused}
        found["extrapolated_from"] = None if tokens == self.case.tokens else tokens
        for name, call in (("forward", lambda: backend.forward(q, k, v, pack, *options)), ("forward+backward", both)):
            timed = self.time(call)
            found[name] = {"ms": timed["ms"] * factor, "document_ms": timed["ms"]}
        return found

    def parts(self):
        """Choosing, making lists and the kernels, each alone."""
        q, k, v, d_out = self.inputs
        tables = self.tables

        def choose():
            coarse = self.selection.coarse(k, v, tables, lambda x: x)
            return coarse, self.selection.choose(q, k, coarse[0], tables, Ranks())

        def plan(chosen):
            return sparse.parts_of(chosen, tables, False, "auto", None)[0]

        with torch.no_grad():
            coarse, chosen = choose()
            parts = plan(chosen)
            plans = [plan for part in parts for plan in part.plan.by_key or (part.plan,)]
            listed = [plan for plan in plans if "columns" not in vars(plan)]  # others come with the batch
            out, lse, *_ = sparse.attend(q, (k, v), coarse, parts, [], None, self.scale)
            calls = {
                "select": choose,
                "rows": lambda: plan(chosen),
                "columns": lambda: [BlockPlan.columns.func(plan) for plan in listed],
                "kernels_forward": lambda: sparse.attend(q, (k, v), coarse, parts, [], None, self.scale),
                "kernels_backward": lambda: sparse.gradients_of(
                    d_out, q, (k, v), coarse, out, lse, (), parts, None, self.scale
                ),
            }
            found = {name: self.time(call) for name, call in calls.items()}
        found["keys_per_query"] = sum(map(_pairs, (part.plan for part in parts))) / (self.case.batch * self.case.tokens)
        found["density"] = found["keys_per_query"] / self.case.tokens
        return found


def _pairs(plan) -> float:
    """Pairs of queries and keys that a head's lists name, on average over the lists."""
    heads, rows = plan.heads, plan.row_ptr.diff(dim=1).long()
    total = 0
    for head in range(heads):
        listed = plan.keys.length[plan.row_idx[head, : int(plan.row_ptr[head, -1])]]
        total += int((plan.queries.length.repeat_interleave(rows[head]).long() * listed).sum())
    return total / heads
