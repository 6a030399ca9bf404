"""Other launch options for the linear attention kernels, checked and timed beside those in use.

    python -m longspan.benchmarks.linear_options --families fixed scalar \
        --try "fused.SWEEP[2,128]" "(64, 4, 3)" "(128, 8, 3)" --try fused.LONE_STAGES 2 3

Names are those of tables and constants in longspan.kernels.linear; the values are Python literals. For another GPU, or
another width of heads, than the options were chosen for.
"""

import argparse
import ast
import contextlib
import importlib
import re
import sys
import time

import torch

from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.linear_cases import FAMILIES, Problem
from longspan.benchmarks.linear_worker import KINDS, Step
from longspan.benchmarks.worker import describe
from longspan.launcher.arguments import num_tokens

DIRECTIONS = ("forward", "forward+backward")
NAME = re.compile(r"(\w+)\.(\w+)((?:\[[^\[\]]+\])*)")


class Option:
    """One entry of a table, or one constant, such as fused.SWEEP[2,128] or fused.LONE_STAGES, of a module of `package`.
    ValueError if there is none of that name."""

    def __init__(self, name: str, package: str = "longspan.kernels.linear"):
        found = NAME.fullmatch(name)
        if not found:
            raise ValueError(f"{name!r} is no name like fused.SWEEP[2,128] or fused.LONE_STAGES")
        try:
            self.holder, self.key = vars(importlib.import_module(f"{package}.{found[1]}")), found[2]
            for key in re.findall(r"\[([^\[\]]+)\]", found[3]):
                self.holder, self.key = self.holder[self.key], ast.literal_eval(key)
            self.value = self.holder[self.key]
        except (ImportError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{package} has no {name}: {describe(error)}") from None
        self.name = name

    @contextlib.contextmanager
    def set_to(self, value):
        self.holder[self.key] = value
        try:
            yield
        finally:
            self.holder[self.key] = self.value


def main() -> int:
    arguments = parse_arguments()
    device, start = torch.device(arguments.device), time.monotonic()
    record = new_record("linear_options", vars(arguments) | {"tried": None}) | {"rows": []}
    kind = "graph" if device.type == "cuda" else "eager"
    record |= {"reference": KINDS["copy"](Step("reference", "copy", Problem("none", 1, 1, 1, torch.float32, device)))}
    for family in arguments.families:
        for option, values in arguments.tried:
            for value in dict.fromkeys([option.value, *values]):
                row = {"family": family, "option": option.name, "value": repr(value), "in use": value == option.value}
                if time.monotonic() - start > arguments.budget:
                    row["error"] = f"skipped: --budget of {arguments.budget:.0f} s is spent"
                else:
                    with option.set_to(value):
                        row |= measure(family, kind, device, arguments)
                record["rows"].append(row)
                print(f"{family} {option.name} = {value!r}: {row.get('error') or row['ms']}", flush=True)
                if arguments.output:
                    save(record, arguments.output)
    print()
    print(summary(record["rows"]))
    return 0


def measure(family: str, kind: str, device: torch.device, arguments) -> dict:
    """ms by direction and the largest relative error against fp64, or the error that ended it: too much shared memory,
    for one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def step(kind, tokens, direction="forward"):
        problem = Problem(family, tokens, arguments.heads, arguments.head_dim, dtype, device)
        return Step("longspan", kind, problem, direction, seconds=arguments.seconds)

    try:
        errors = KINDS["check"](step("check", min(1024, arguments.tokens)))
        if "error" in errors:
            return errors
        times = {direction: KINDS[kind](step(kind, arguments.tokens, direction))["ms"] for direction in DIRECTIONS}
    except Exception as error:  # compilers fail in many ways
        return {"error": describe(error)}
    return {"ms": times, "largest error": max(errors["errors"].values())}


def summary(rows: list[dict]) -> str:
    """One line per value, with its times over those of the value in use."""
    in_use = {(row["family"], row["option"]): row.get("ms") for row in rows if row["in use"]}
    lines = []
    for row in rows:
        line = {name: row[name] for name in ("family", "option", "value")} | {"note": row.get("error", "")[:80]}
        base = in_use[row["family"], row["option"]]
        if "ms" in row:
            line["error"] = f"{row['largest error']:.1e}"
            for direction, ms in row["ms"].items():
                line[direction] = f"{ms:.3f}" + (f" ({ms / base[direction]:.3f})" if base else "")
        lines.append(line)
    return format_table(lines, ["family", "option", "value", *DIRECTIONS, "error", "note"])


def parse_arguments(argv=None):
    on_gpu, default = torch.cuda.is_available(), "(default: %(default)s)"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--try", dest="tried", nargs="+", action="append", required=True, metavar="NAME VALUE", help="may be repeated")
    add("--families", nargs="+", choices=list(FAMILIES), default=["fixed"], help=default)
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--tokens", type=num_tokens, default=1 << 15 if on_gpu else 256, help=default)
    add("--heads", type=int, default=16 if on_gpu else 2, help=default)
    add("--head-dim", type=int, default=128 if on_gpu else 16, help=default)
    add("--seconds", type=float, default=0.3, help=f"timed repetitions of one measurement, about {default}")
    add("--budget", type=float, default=540.0, help=f"seconds after which nothing more is started {default}")
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "tokens", "heads", "head_dim", "seconds", "budget")
    try:
        arguments.tried = [(Option(name), [literal(value) for value in values]) for name, *values in arguments.tried]
    except ValueError as error:
        parser.error(f"--try: {error}")
    return arguments


def literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"{text!r} is no Python literal, such as 3 or (64, 4, 2)") from None


if __name__ == "__main__":
    sys.exit(main())
