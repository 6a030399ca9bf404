"""Block-sparse attention on one GPU beside dense attention and other libraries' block-sparse kernels.

    python -m longspan.benchmarks.sparse_kernels --output benchmarks/results/sparse_kernels_H200.json

Cases run in order of importance; one that fails is recorded and the rest goes on. See benchmarks/README.md.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, replace

import torch

from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.sparse_cases import LINEAR, OURS, SELECTIONS, Case, Step
from longspan.benchmarks.sparse_peers import PEERS, peers_of
from longspan.benchmarks.worker import prepare_all, run_steps
from longspan.launcher.arguments import num_tokens

CASES = (
    "top128:2x16x32Kx128", "sla:2x16x32Kx128", "llsa2:2x4x64Kx64", "top128:1x8x128Kx128", "sla:1x8x128Kx128",
    "llsa2:2x4x256Kx64", "top128:2x16x32Kx128:clustered", "top128:1x8x128Kx128:clustered", "sla:1x2x512Kx128",
    "llsa3:2x4x64Kx64", "llsa3:2x4x256Kx64", "sla:1x2x1Mx128", "llsa3:1x4x1Mx64", "top:2x16x32Kx128",
    "top:1x8x128Kx128", "top:1x2x1Mx128", "top:2x16x32Kx128:clustered", "llsa2:2x4x64Kx64:clustered",
)  # fmt: skip
DIRECTIONS = ("forward", "forward+backward")
KERNELS = ("kernels_forward", "columns", "kernels_backward")


def finish(row: dict) -> dict:
    """Adds efficiency, dense time / sparse time * density, the share of choosing and lists in the forward pass, and
    other libraries' times over ours: of kernels that are given lists by query block and make those by key block, over
    the same parts of ours."""
    dense, made, parts = (row.get(name, {}) for name in ("dense", "sparse", "parts"))
    for direction in DIRECTIONS:
        if direction in dense and direction in made and "density" in parts:
            made[direction]["speedup"] = dense[direction]["ms"] / made[direction]["ms"]
            made[direction]["efficiency"] = made[direction]["speedup"] * parts["density"]
    if "forward" in made and "select" in parts:
        chosen_ms = parts["select"]["ms"] + parts["rows"]["ms"]
        made["selection_share_of_forward"] = chosen_ms / made["forward"]["ms"]
    for name in PEERS.keys() & row.keys():
        ours = {direction: made[direction]["ms"] for direction in DIRECTIONS if direction in made}
        if PEERS[name].given_lists:
            parts_ms = [parts.get(part, {}).get("ms", math.nan) for part in KERNELS]
            ours = {"forward": parts_ms[0], "forward+backward": sum(parts_ms)}
        for direction in ours.keys() & row[name].keys():
            row[name][direction]["over_ours"] = row[name][direction]["ms"] / ours[direction]
    return row


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        made, dense, parts = (row.get(name, {}) for name in ("sparse", "dense", "parts"))
        line = {"case": row["name"]}
        for short, direction in (("f", "forward"), ("fb", "forward+backward")):
            line[f"{short} ms"] = _number(made, direction, "ms")
            line[f"{short} graph"] = _number(made, direction, "graph")
            line[f"{short} dense"] = _number(dense, direction, "ms")
            line[f"{short} x"] = _number(made, direction, "speedup", pattern="{:.1f}")
            line[f"{short} E"] = _number(made, direction, "efficiency")
        for name in ("select", "rows", "columns", "kernels_forward", "kernels_backward"):
            line[name.replace("kernels_", "k ")] = _number(parts, name, "ms")
        for name in PEERS.keys() & row.keys():
            line["peer"] = name
            for short, direction in zip(("f", "fb"), DIRECTIONS, strict=True):
                line[f"peer {short}"] = _number(row[name], direction, "ms")
                line[f"peer/ours {short}"] = _number(row[name], direction, "over_ours", pattern="{:.2f}")
        lines.append(line)
    return format_table(lines, list(max(lines, key=len))) if lines else "nothing was measured"


def _number(found, *names, pattern="{:.3f}"):
    for name in names:
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return pattern.format(found) if isinstance(found, int | float) else None


def main(argv=None) -> int:
    start, arguments = time.monotonic(), parse_arguments(argv)
    record = new_record("sparse_kernels", vars(arguments) | {"cases": [asdict(case) for case in arguments.cases]})
    record |= {"rows": [], "not_measured": {}}
    rows, steps, shapes = {}, [], set()
    for case in arguments.cases:
        rows[case] = asdict(case) | {"name": _name(case)}
        for name in (*OURS, *peers_of(SELECTIONS[case.selection], case.selection in LINEAR)):
            missing = PEERS[name].missing() if name in PEERS else None
            if missing:
                record["not_measured"][name] = missing
            elif name != "dense" or _shape(case) not in shapes:
                steps.append(_step(arguments, case, name))
        shapes.add(_shape(case))
    for name, missing in record["not_measured"].items():
        print(f"{name} is not measured: {missing}", flush=True)

    failed, deadline = False, start + arguments.budget
    if arguments.prepare_seconds and arguments.device == "cuda":
        prepare_all(_preparations(arguments, steps), limit_s=min(arguments.prepare_seconds, arguments.budget))
        print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    for step, found in run_steps(steps, limit_s=arguments.limit, deadline=deadline, go_on=True):
        row = rows[step.case]
        row[step.name] = found
        if step.name == "dense":  # once for all cases of a shape
            for case in rows:
                if _shape(case) == _shape(step.case):
                    rows[case]["dense"] = found
        failed |= "error" in found and step.name in OURS and time.monotonic() < deadline
        print(f"{row['name']} {step.name}: {_short(found)}", flush=True)
        record["rows"] = [finish(row) for row in rows.values() if "sparse" in row]
        if arguments.output:
            save(record | {"seconds": time.monotonic() - start}, arguments.output)
    print("\n" + table(record["rows"]))
    return int(failed)


def _step(arguments, case, name) -> Step:
    return Step(case, name, torch.device(arguments.device), arguments.seed, arguments.seconds, arguments.dense_tokens)


def _preparations(arguments, steps) -> list[list[Step]]:
    """What Triton compiles, at once: longspan for each selection and width, peers for each shape."""
    found = {}
    for step in sorted(steps, key=lambda step: step.case.tokens):
        case = replace(step.case, inputs="random")
        key = (step.name, case) if step.name in PEERS else (case.selection, case.head_dim)
        if step.name in ("sparse", *PEERS):
            found.setdefault(key, [_step(arguments, case, f"prepare {step.name}")])
    return list(found.values())


def _shape(case):
    return case.batch, case.heads, case.tokens, case.head_dim


def _name(case):
    return f"{case.selection} B={case.batch} H={case.heads} N={case.tokens} D={case.head_dim} {case.inputs}"


def _short(found):
    pairs = ((name, value["ms"] if isinstance(value, dict) else value) for name, value in found.items())
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in pairs)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=writable, help="JSON file, saved again after every measurement")
    parser.add_argument(
        "--cases", nargs="+", type=Case.parse, default=[Case.parse(text) for text in CASES], help=Case.parse.__doc__
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed repetitions of one measurement, about")
    parser.add_argument("--dense-tokens", type=num_tokens, default=1 << 17, help="extrapolated with the square above")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which one measurement is given up")
    parser.add_argument("--prepare-seconds", type=float, default=60.0, help="at most, compiling at once; 0: do not")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing is measured")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "seconds", "limit", "budget")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
