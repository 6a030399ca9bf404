"""Linear attention on one GPU, longspan's kernels beside those of other libraries, forward and backward.

    python -m longspan.benchmarks.linear_kernels --output benchmarks/results/linear_kernels.json
    python -m longspan.benchmarks.linear_kernels --sweep flat --output benchmarks/results/linear_flat.json

Every implementation and family runs in its own process; what fails or takes too long is recorded and the rest goes on.
See benchmarks/README.md for what is measured and what the columns mean.
"""

import argparse
import importlib.metadata
import sys
import time

import torch

from longspan.benchmarks.arguments import parse_linear_kernels
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.linear_cases import Problem, bytes_per_token_head
from longspan.benchmarks.linear_peers import IMPLEMENTATIONS
from longspan.benchmarks.linear_worker import Step
from longspan.benchmarks.worker import prepare_all, run_steps

DIRECTIONS = ("forward", "forward+backward")
ERRORS = ("out", "dq", "dk", "dv", "dg", "dbeta")
FLAT_TOKENS = [1 << n for n in range(10, 21)]
FLAT_HEADS, FLAT_HEADS_TOKENS = (4, 8, 16, 32), 1 << 15
CHECK_TOKENS = 1024


def main(arguments: argparse.Namespace | None = None) -> int:
    start = time.monotonic()
    arguments = arguments or parse_linear_kernels()
    deadline = start + arguments.budget
    device = torch.device(arguments.device)
    record = new_record("linear_kernels", vars(arguments)) | {"reference": {}, "rows": [], "errors": []}
    peers = [name for name in arguments.peers if arguments.sweep is None]
    missing = {name: IMPLEMENTATIONS[name].missing() for name in peers}
    record["not_measured"] = {name: reason for name, reason in missing.items() if reason}
    names = ["longspan", *(name for name in peers if not missing[name])]
    record["versions"] |= _versions(names)
    batches = [
        make_steps(arguments, name, family, device)
        for family in arguments.families
        for name in names
        if family in IMPLEMENTATIONS[name].families
    ]

    rows = {}

    def note(step, result):
        if step.kind in ("copy", "matmul"):
            record["reference"][step.kind] = result
        elif step.kind == "check":
            record["errors"].append({"family": step.problem.family, "by": step.by} | result)
        else:
            problem = step.problem
            key = problem.family, step.by, problem.tokens, problem.heads
            row = rows.setdefault(key, dict(zip(("family", "by", "tokens", "heads"), key, strict=True)))
            row.setdefault(step.direction, {})[step.kind] = result
        record["rows"] = finish_rows(list(rows.values()), record["reference"], arguments.head_dim)
        print(progress(step, result), flush=True)
        if arguments.output:
            save(record | {"seconds": time.monotonic() - start}, arguments.output)

    if arguments.prepare_seconds and device.type == "cuda":
        began = time.monotonic()
        print(f"compiling {len(batches)} cases at once", flush=True)
        prepare = [[Step(b[0].by, "prepare", _first_problem(b, arguments.tokens))] for b in batches]
        prepare_all(prepare, limit_s=min(arguments.prepare_seconds, deadline - time.monotonic()))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    for steps in (_reference_steps(arguments, device), *batches):
        if time.monotonic() > deadline:
            for step in steps:
                note(step, {"error": f"skipped: --budget of {arguments.budget:.0f} s is spent"})
            continue
        for step, result in run_steps(steps, limit_s=arguments.step_seconds, deadline=deadline):
            note(step, result)

    print()
    print(summary(record, arguments.sweep))
    return int(any("error" in result for by, result in _results(record) if by == "longspan"))


def make_steps(arguments, name: str, family: str, device: torch.device) -> list[Step]:
    """Everything measured of one implementation and family: the check first, CUDA graphs last."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [(tokens, arguments.heads) for tokens in arguments.tokens]
    if arguments.sweep == "flat":
        sizes = [(tokens, arguments.heads) for tokens in FLAT_TOKENS]
        sizes += [(FLAT_HEADS_TOKENS, heads) for heads in FLAT_HEADS if (FLAT_HEADS_TOKENS, heads) not in sizes]

    def step(kind, tokens, heads, **options):
        problem = Problem(family, tokens, heads, arguments.head_dim, dtype, device)
        return Step(name, kind, problem, seconds=arguments.seconds, seed=arguments.seed, **options)

    steps = []
    if arguments.sweep is None:
        # With as many heads as are timed: peers compile and tune anew for another number.
        steps.append(step("check", min(CHECK_TOKENS, max(arguments.tokens)), arguments.heads))
    for kind in ("eager", "graph") if device.type == "cuda" else ("eager",):
        steps += [step(kind, *size, direction=direction) for size in sizes for direction in DIRECTIONS]
    return steps


def _reference_steps(arguments, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = Problem("none", 1, 1, 1, dtype, device)
    return [Step("reference", kind, problem, seconds=arguments.seconds) for kind in ("copy", "matmul")]


def _first_problem(steps, tokens):
    """The problem to compile for: the smallest that is timed."""
    return next((s.problem for s in steps if s.kind == "eager" and s.problem.tokens == min(tokens)), steps[-1].problem)


def finish_rows(rows: list[dict], reference: dict, head_dim: int) -> list[dict]:
    """Adds to every measured time what follows from it: ns per token-head, shares of the two memory bounds at the copy
    rate of this run, and fla's time over it (eager against eager, graph against graph)."""
    rate = reference.get("copy", {}).get("TB/s")
    fla = {(row["family"], row["tokens"], row["heads"]): row for row in rows if row["by"] == "fla"}
    for row in rows:
        token_heads = row["tokens"] * row["heads"]
        bounds = bytes_per_token_head(row["family"], head_dim)
        peer = fla.get((row["family"], row["tokens"], row["heads"]), {})
        for direction in DIRECTIONS:
            for kind, found in row.get(direction, {}).items():
                if "ms" not in found:
                    continue
                found["ns_per_token_head"] = 1e6 * found["ms"] / token_heads
                for bound in bounds if rate else ():
                    least_ms = bounds[bound][direction] * token_heads / rate / 1e9
                    found[f"{bound}_ms"], found[f"share_of_{bound}"] = least_ms, least_ms / found["ms"]
                theirs = peer.get(direction, {}).get(kind, {}).get("ms")
                if theirs:
                    found["fla_over_this"] = theirs / found["ms"]
    return rows


def progress(step: Step, result: dict) -> str:
    shown = result.get("error") or ", ".join(
        f"{name} {value:.4g}" for name, value in (result.get("errors") or result).items() if isinstance(value, float)
    )
    problem = step.problem
    where = "" if step.by == "reference" else f" {problem.family} T={problem.tokens} H={problem.heads} {step.direction}"
    return f"{step.by} {step.kind}{where}: {shown[:160]}"


def summary(record: dict, sweep: str | None) -> str:
    rates = ", ".join(f"{kind} {result}" for kind, result in record["reference"].items())
    lines = [f"reference rates: {rates}; not measured: {record['not_measured'] or 'nothing'}"]
    if sweep == "flat":
        return "\n".join([*lines, flat_table(record["rows"])])
    errors = [
        {"family": row["family"], "by": row["by"], "note": row.get("error", "")[:60]}
        | {name: f"{value:.1e}" for name, value in row.get("errors", {}).items()}
        for row in record["errors"]
    ]
    lines += ["relative errors against fp64", format_table(errors, ["family", "by", *ERRORS, "note"])]
    return "\n".join([*lines, "", kernel_table(record["rows"])])


def kernel_table(rows: list[dict]) -> str:
    """One line per implementation, family and length; the shares and the ratio are those of the eager times."""
    lines = []
    for row in rows:
        line = {name: row[name] for name in ("family", "by", "tokens")}
        for short, direction in (("f", DIRECTIONS[0]), ("fb", DIRECTIONS[1])):
            eager, graph = (row.get(direction, {}).get(kind, {}) for kind in ("eager", "graph"))
            line |= {
                f"{short} ms": _ms(eager),
                f"{short} graph": _ms(graph),
                f"{short} ns/th": _number(eager.get("ns_per_token_head"), "{:.2f}"),
                f"{short} once": _number(eager.get("share_of_once"), "{:.0%}"),
                f"{short} design": _number(eager.get("share_of_design"), "{:.0%}"),
                f"{short} xfla": _number(eager.get("fla_over_this"), "{:.2f}"),
                f"{short} n": eager.get("launches"),
            }
        lines.append(line)
    return format_table(lines, list(lines[0])) if lines else "nothing was timed"


def flat_table(rows: list[dict]) -> str:
    """ns per token-head: one line per family, direction and mode, one column per size."""
    lines, columns = {}, {}
    for row in rows:
        column = f"{row['tokens'] // 1024}K" + ("" if row["heads"] == 16 else f" h{row['heads']}")
        columns[column] = None
        for direction in DIRECTIONS:
            for kind, found in row.get(direction, {}).items():
                line = lines.setdefault((row["family"], direction, kind), {})
                line[column] = _number(found.get("ns_per_token_head"), "{:.2f}") or "failed"
    table = [{"family": f, "ns per token-head": f"{d} {kind}"} | line for (f, d, kind), line in lines.items()]
    return format_table(table, ["family", "ns per token-head", *columns])


def _ms(found: dict) -> str | None:
    return "failed" if "error" in found else _number(found.get("ms"), "{:.3f}")


def _number(value, pattern: str) -> str | None:
    return None if value is None else pattern.format(value)


def _results(record):
    for row in record["rows"]:
        for direction in DIRECTIONS:
            yield from ((row["by"], result) for result in row.get(direction, {}).values())
    yield from ((row["by"], row) for row in record["errors"])


def _versions(names):
    versions = {}
    for distribution in {d for name in names for d in IMPLEMENTATIONS[name].distributions}:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = None
    return versions


if __name__ == "__main__":
    sys.exit(main())
