"""Block-sparse attention on one GPU beside dense attention and other libraries' block-sparse kernels.

    python -m longspan.benchmarks.sparse_kernels --output benchmarks/results/sparse_kernels_H200.json

Cases run in order of importance; one that fails is recorded and the rest goes on. See benchmarks/README.md.
"""

import argparse
import importlib.util
import sys
import time
import traceback
from dataclasses import asdict, dataclass

import torch

from longspan.attention import Hierarchical, TopBlocks, sparse, sparse_attention
from longspan.attention.gather_rows import Ranks
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.linear_worker import describe, launched_kernels, time_calls
from longspan.kernels import softmax
from longspan.kernels.sparse import BlockPlan
from longspan.launcher.parsing import parse_tokens
from longspan.parallel import SequenceParallel

SELECTIONS = {
    "top": TopBlocks(0.05, query_block=128, key_block=64),
    "top128": TopBlocks(0.05, query_block=128, key_block=128),
    "llsa1": Hierarchical(16, 8, 1),
    "llsa2": Hierarchical(16, 8, 2),
    "llsa3": Hierarchical(16, 8, 3),
}
CASES = (
    "top:2x16x32Kx128", "top:1x8x128Kx128", "llsa2:2x4x64Kx64", "top128:2x16x32Kx128", "top128:1x8x128Kx128",
    "llsa2:2x4x256Kx64", "top:1x2x512Kx128", "top:1x2x1Mx128", "llsa3:2x4x64Kx64", "llsa3:2x4x256Kx64",
    "llsa3:1x4x1Mx64", "top:2x16x32Kx128:clustered", "top:1x8x128Kx128:clustered", "llsa2:2x4x64Kx64:clustered",
)  # fmt: skip
DENSE_TOKENS = 1 << 17  # of longer documents dense attention is extrapolated with the square of the length
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


class Bench:
    """What is measured of one case: name -> milliseconds and more."""

    def __init__(self, case: Case, arguments, device):
        self.case, self.arguments, self.device = case, arguments, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.inputs = case.random(arguments.seed, device, self.dtype)
        self.selection, self.scale = SELECTIONS[case.selection], case.head_dim**-0.5
        self.seq = SequenceParallel(device=device).context((case.tokens,) * case.batch)
        self.tables = self.selection.tables(self.seq, False)  # made with the batch, like positions: not timed

    def steps(self):
        yield "sparse", self.sparse
        yield "dense", self.dense
        yield "parts", self.parts
        for block in (128, 64):
            yield f"nvidia_bsa_{block}", lambda block=block: self.nvidia_bsa(block)

    def time(self, call) -> dict:
        return time_calls([call], self.device, self.arguments.seconds)

    def sparse(self):
        q, k, v, d_out = self.inputs
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def attend(*tensors):
            return sparse_attention(*tensors, selection=self.selection, causal=False, seq=self.seq)

        def forward():
            with torch.no_grad():
                attend(q, k, v)

        def both():
            torch.autograd.grad(attend(*leaves), leaves, d_out)

        found = {"forward": self.time(forward), "forward+backward": self.time(both)}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            both()
            found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
            for name, call in (("forward", forward), ("forward+backward", both)):
                found[name]["kernels"] = launched_kernels(call)
                found[name]["launches"] = sum(kernel["count"] for kernel in found[name]["kernels"])
        return found

    def dense(self):
        """The fastest back end here, a document after the other: packed calls are slower in some libraries."""
        tokens = min(self.case.tokens, DENSE_TOKENS)
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
            listed = [part.plan for part in parts if "columns" not in vars(part.plan)]  # others come with the batch
            out, lse, *_ = sparse.attend(q, (k, v), coarse, parts, [], [], None, self.scale)
            calls = {
                "select": choose,
                "rows": lambda: plan(chosen),
                "columns": lambda: [BlockPlan.columns.func(plan) for plan in listed],
                "kernels_forward": lambda: sparse.attend(q, (k, v), coarse, parts, [], [], None, self.scale),
                "kernels_backward": lambda: sparse.gradients_of(
                    d_out, q, (k, v), coarse, out, lse, (), parts, None, self.scale
                ),
            }
            found = {name: self.time(call) for name, call in calls.items()}
        found["keys_per_query"] = sum(map(_pairs, (part.plan for part in parts))) / (self.case.batch * self.case.tokens)
        found["density"] = found["keys_per_query"] / self.case.tokens
        return found

    def nvidia_bsa(self, block):
        """Block-sparse attention of cudnn-frontend over random lists of as many keys: kernels alone, lists given."""
        case = self.case
        if importlib.util.find_spec("cudnn") is None:
            return {"not_measured": "the package cudnn is not installed"}
        if case.selection.startswith("llsa") or case.head_dim != 128 or self.device.type != "cuda":
            return {"not_measured": "takes heads of 128 on a GPU and no weights of keys"}
        from cudnn.block_sparse_attention import block_sparse_attention_backward, block_sparse_attention_forward

        blocks = case.tokens // block
        kept, rows = max(1, int(0.05 * blocks)), (case.batch, case.heads, blocks)
        lists = torch.empty(*rows, kept, dtype=torch.int32, device=self.device)
        for head in range(case.heads):  # scores of one head at a time
            scores = torch.rand(case.batch, blocks, blocks, device=self.device)
            lists[:, head] = scores.topk(kept, -1).indices.sort(-1).values.int()
        given = [x.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous() for x in self.inputs]
        options = {"sparse_block_size": block, "softmax_scale": self.scale}

        def forward():
            return block_sparse_attention_forward(*given[:3], lists, **options)

        out, lse = tuple(forward().values())[:2]

        def both():
            forward()
            block_sparse_attention_backward(given[3], *given[:3], out, lse, lists, **options)

        return {"kept": kept, "forward": self.time(forward), "forward+backward": self.time(both)}


def _pairs(plan) -> float:
    """Pairs of queries and keys that a head's lists name, on average over the lists."""
    heads, rows = plan.heads, plan.row_ptr.diff(dim=1).long()
    total = 0
    for head in range(heads):
        listed = plan.keys.length[plan.row_idx[head, : int(plan.row_ptr[head, -1])]]
        total += int((plan.queries.length.repeat_interleave(rows[head]).long() * listed).sum())
    return total / heads


def finish(row: dict) -> dict:
    """Adds efficiency, dense time / sparse time * density, and the share of choosing and lists in the forward pass."""
    dense, made, parts = (row.get(name, {}) for name in ("dense", "sparse", "parts"))
    for direction in ("forward", "forward+backward"):
        if direction in dense and direction in made and "density" in parts:
            made[direction]["speedup"] = dense[direction]["ms"] / made[direction]["ms"]
            made[direction]["efficiency"] = made[direction]["speedup"] * parts["density"]
    if "forward" in made and "select" in parts:
        chosen_ms = parts["select"]["ms"] + parts["rows"]["ms"]
        made["selection_share_of_forward"] = chosen_ms / made["forward"]["ms"]
    return row


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        made, dense, parts = (row.get(name, {}) for name in ("sparse", "dense", "parts"))
        line = {"case": row["name"]}
        for short, direction in (("f", "forward"), ("fb", "forward+backward")):
            line[f"{short} ms"] = _number(made, direction, "ms")
            line[f"{short} dense"] = _number(dense, direction, "ms")
            line[f"{short} x"] = _number(made, direction, "speedup", pattern="{:.1f}")
            line[f"{short} E"] = _number(made, direction, "efficiency")
        for name in ("select", "rows", "columns", "kernels_forward", "kernels_backward"):
            line[name.replace("kernels_", "k ")] = _number(parts, name, "ms")
        line["bsa f"] = _number(row, "nvidia_bsa_128", "forward", "ms")
        line["bsa fb"] = _number(row, "nvidia_bsa_128", "forward+backward", "ms")
        lines.append(line)
    return format_table(lines, list(lines[0])) if lines else "nothing was measured"


def _number(found, *names, pattern="{:.3f}"):
    for name in names:
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return pattern.format(found) if isinstance(found, int | float) else None


def main(argv=None) -> int:
    start, arguments = time.monotonic(), parse_arguments(argv)
    device, failed = torch.device(arguments.device), False
    record = new_record("sparse_kernels", vars(arguments) | {"cases": [asdict(case) for case in arguments.cases]})
    record |= {"rows": [], "skipped": []}
    for case in arguments.cases:
        row = asdict(case) | {"name": _name(case)}
        if time.monotonic() - start > arguments.budget:
            record["skipped"].append(row["name"])
            continue
        record["rows"].append(row)
        try:
            bench = Bench(case, arguments, device)
            steps = list(bench.steps())
        except Exception as error:
            traceback.print_exc()
            row["error"], failed, steps = describe(error), True, []
        for name, step in steps:
            if time.monotonic() - start > arguments.budget:
                row[name] = {"error": "skipped: --budget is spent"}
                continue
            try:
                row[name] = step()
            except Exception as error:
                traceback.print_exc()
                row[name] = {"error": describe(error)}
                failed |= not name.startswith("nvidia")
            print(f"{row['name']} {name}: {_short(row[name])}", flush=True)
            if arguments.output:
                finish(row)
                save(record | {"seconds": time.monotonic() - start}, arguments.output)
        finish(row)
        bench = steps = step = None  # memory of a case is free before the next
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.output:
        save(record | {"seconds": time.monotonic() - start}, arguments.output)
    print("\n" + table(record["rows"]))
    return int(failed)


def _name(case):
    return f"{case.selection} B={case.batch} H={case.heads} N={case.tokens} D={case.head_dim} {case.inputs}"


def _short(found):
    pairs = ((name, value["ms"] if isinstance(value, dict) else value) for name, value in found.items())
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in pairs)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", help="JSON file, saved again after every measurement")
    parser.add_argument(
        "--cases", nargs="+", type=Case.parse, default=[Case.parse(text) for text in CASES], help=Case.parse.__doc__
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed repetitions of one measurement, about")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing more is started")
    arguments = parser.parse_args(argv)
    for name in ("seconds", "budget"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)} must be greater than 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
