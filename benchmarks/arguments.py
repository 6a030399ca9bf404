"""Arguments of benchmarks, those of `longspan bench` in whole: `--help` need not wait for torch, which nothing here
imports before the words have been understood. So what there is to choose from is named here; a test compares.
"""

import argparse
import ast
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longspan.benchmarks.length_mixes import MIXES
from longspan.launcher.arguments import num_tokens, writable, writable_folder

DEFAULT = "(default: %(default)s)"
BUDGET = "seconds after which no case is started; the first call of each, which compiles, is not counted"
FAMILIES = ("none", "fixed", "scalar", "channel", "delta", "gated_delta", "kda")  # of linear_cases
LINEAR_PEERS = ("fla", "flash_qla", "cudnn_kda")  # of linear_peers
PASSING = ("lasp2", "lasp", "all_scan", "hierarchical", "lasp2_nccl", "all_to_all")  # of linear_ranks
LAYOUTS = ("contiguous", "zigzag")
STRATEGIES = ("zeppelin", "zeppelin_even", "hybrid")  # of parallel.planner
SCHEMES = (
    "te_ring", "grouped_ring", "all_gather", "ulysses", "usp", "hybrid", "zeppelin_even", "balanced", "zeppelin",
)  # fmt: skip
ONE = "one"  # a single document, beside MIXES
COSTS = ("pairs", "default")
RECALL_FAMILIES = ("none", "fixed", "scalar", "gla", "hgrn2", "delta", "gated_delta")
HYBRIDS = tuple(f"{family}-{ratio}" for family in ("fixed", "hgrn2", "gated_delta") for ratio in ("7:1", "3:1"))
MODELS = (*RECALL_FAMILIES, *HYBRIDS, "softmax")
QUICK = {
    "models": ["fixed", "gated_delta", "softmax"],
    "pairs": [4, 8, 16],
    "tokens": 1024,
    "num_keys": 64,
    "num_values": 64,
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "steps": 600,
    "learning_rates": [3e-3],
    "evaluation_batches": 2,
}


@dataclass(frozen=True)
class ByDevice:
    """A default that depends on --device."""

    gpu: Any
    cpu: Any

    def __str__(self) -> str:
        return f"{self.gpu}; on CPUs {self.cpu}"


def read(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, sys.argv's if None."""
    arguments = parser.parse_args(argv)
    for name, value in list(vars(arguments).items()):
        if isinstance(value, ByDevice):
            setattr(arguments, name, value.gpu if arguments.device == "cuda" else value.cpu)
    return arguments


def device_name(text: str) -> str:
    """cuda or cpu, as the type of an argument: cuda only where torch sees a GPU, and for "auto" where it does."""
    import torch

    available = torch.cuda.is_available()
    if text == "cuda" and not available:
        raise argparse.ArgumentTypeError("torch sees no GPU for cuda; use cpu, or install a CUDA build of torch")
    return {"auto": "cuda" if available else "cpu"}.get(text, text)


def require_positive(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str) -> None:
    """Ends with an error where one of these arguments is given and not above 0, or has such a value among several."""
    for name in names:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value <= 0:
                parser.error(f"--{name.replace('_', '-')} {value} must be greater than 0")


def parser_of(module: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=summary(module))


def summary(module: str) -> str:
    """The first line of a benchmark's docstring, read from its file."""
    source = Path(find_spec(f"longspan.benchmarks.{module}").origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device_name, choices=["cuda", "cpu"], default="auto", help="(default: cuda if there is one)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a model's attention and of how it and the links are measured."""
    add = parser.add_argument
    add("--heads", type=int, default=32, help=f"query heads of the model {DEFAULT}")
    add("--kv-heads", type=int, default=8, help=f"key and value heads {DEFAULT}")
    add("--head-dim", type=int, default=128, help=DEFAULT)
    add("--short", type=num_tokens, default=ByDevice(4096, 64), help=f"tokens of short documents {DEFAULT}")
    add("--long", type=num_tokens, default=ByDevice(32768, 1024), help=f"tokens of the long one {DEFAULT}")
    add("--megabytes", type=int, default=ByDevice(256, 16), help=f"of one exchange {DEFAULT}")
    add("--seconds", type=float, default=5.0, help=f"of one measurement of cost, about {DEFAULT}")
    add_device(parser)


def check_model_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    require_positive(parser, arguments, "heads", "kv_heads", "head_dim", "short", "megabytes", "seconds")
    if arguments.long < 2 * arguments.short:
        parser.error(f"--long {arguments.long} must be at least twice --short {arguments.short}")
    if arguments.heads % arguments.kv_heads:
        parser.error(f"--kv-heads {arguments.kv_heads} does not divide --heads {arguments.heads}")


def parse_calibrate(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("calibrate")
    parser.add_argument(
        "--output", type=writable, help="JSON file for parallel.costs; without it the costs are only printed"
    )
    add_model_arguments(parser)
    arguments = read(parser, argv)
    check_model_arguments(parser, arguments)
    return arguments


def parse_linear_kernels(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("linear_kernels")
    add, peers = parser.add_argument, list(LINEAR_PEERS)
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: all)")
    add("--tokens", type=num_tokens, nargs="+", default=[1 << 15, 1 << 17], help=DEFAULT)
    add("--heads", type=int, default=16, help=DEFAULT)
    add("--head-dim", type=int, default=128, help=DEFAULT)
    add("--peers", nargs="*", choices=peers, default=peers, help="those not installed are left out (default: all)")
    add("--sweep", choices=["flat"], help="longspan alone, 1K to 1M tokens and 4 to 32 heads")
    add_device(parser)
    add("--seed", type=int, default=0, help="of the random inputs")
    add("--seconds", type=float, default=1.0, help=f"timed repetitions of one measurement, about {DEFAULT}")
    add("--prepare-seconds", type=float, default=200.0,
        help=f"limit of compiling all cases at once first; 0: do not {DEFAULT}")  # fmt: skip
    add("--step-seconds", type=float, default=200.0, help=f"limit of one measurement, autotuning included {DEFAULT}")
    add("--budget", type=float, default=540.0, help=f"seconds after which nothing more is started {DEFAULT}")
    arguments = read(parser, argv)
    require_positive(parser, arguments, "tokens", "heads", "head_dim", "seconds", "budget", "step_seconds")
    return arguments


def parse_ring_attention(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("ring_attention")
    add = parser.add_argument
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--lengths", type=num_tokens, nargs="+", default=[131072, 524288],
        help=f"global tokens of one sequence {DEFAULT}")  # fmt: skip
    add("--heads", type=int, default=16, help=DEFAULT)
    add("--kv-heads", type=int, default=0, help="0: as many as --heads")
    add("--head-dim", type=int, default=128, help=DEFAULT)
    add("--backends", default=ByDevice("fa4,cudnn,flash", "cpu"), help=f"those that cannot are skipped {DEFAULT}")
    add("--strategies", default="ring,grouped_ring,all_gather", help=DEFAULT)
    add("--key-blocks", type=int, nargs="+", default=[0],
        help="most thread blocks of NCCL for keys; 0: its own choice")  # fmt: skip
    add_device(parser)
    add("--check-length", type=num_tokens, default=4096, help=f"tokens of the gradient check {DEFAULT}")
    add("--case-seconds", type=float, default=6.0, help=f"timed repetitions of one case {DEFAULT}")
    add("--time-limit", type=float, default=420.0, help=f"seconds after which no case is started {DEFAULT}")
    arguments = read(parser, argv)
    require_positive(parser, arguments, "lengths", "heads", "head_dim", "check_length", "case_seconds", "time_limit")
    if arguments.kv_heads < 0 or arguments.heads % (arguments.kv_heads or 1):
        parser.error(f"--kv-heads {arguments.kv_heads} does not divide --heads {arguments.heads}")
    return arguments


def parse_linear_ranks(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("linear_ranks")
    add = parser.add_argument
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--families", nargs="+", choices=FAMILIES, help="(default: fixed scalar gated_delta; with --parity all)")
    add("--strategies", nargs="+", choices=PASSING, default=list(PASSING), help="(default: all)")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="(default: both)")
    add("--tokens", type=num_tokens, nargs="+", help="per GPU (default: 32K 128K 512K; with --layer 32K 128K)")
    add("--heads", type=int, default=16, help=DEFAULT)
    add("--head-dim", type=int, default=128, help=DEFAULT)
    add("--layer", action="store_true", help="time a whole decoder layer instead of the operator")
    add("--parity", action="store_true", help="compare errors instead of timing")
    add("--parity-tokens", type=num_tokens, default=1 << 13, help=f"in several documents {DEFAULT}")
    add("--drift-tokens", type=num_tokens, default=1 << 16, help=f"in one document {DEFAULT}")
    add("--seed", type=int, default=0, help="of the inputs of --parity")
    add("--repetitions", type=int, default=20, help=DEFAULT)
    add_device(parser)
    add("--budget", type=float, default=540.0, help=f"{BUDGET} {DEFAULT}")
    arguments = read(parser, argv)
    if arguments.layer and arguments.parity:
        parser.error("--layer and --parity exclude each other; give one of them")
    require_positive(parser, arguments, "tokens", "heads", "head_dim", "repetitions", "parity_tokens", "drift_tokens")
    if arguments.families is None:
        arguments.families = [*FAMILIES] if arguments.parity else ["fixed", "scalar", "gated_delta"]
    arguments.tokens = arguments.tokens or [1 << 15, 1 << 17] + ([] if arguments.layer else [1 << 19])
    return arguments


def parse_planner(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("planner")
    add = parser.add_argument
    add("--output", type=writable, help="JSON file, saved again after every row; without it only the table is printed")
    add("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES), help="document lengths (default: all)")
    add("--topologies", type=topology, nargs="+", default=[(2, 8), (8, 8), (16, 8)], metavar="NODESxRANKS",
        help="machines to plan for: nodes x ranks of a node (default: 2x8 8x8 16x8)")  # fmt: skip
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="of the planner (default: all)")
    add("--costs", nargs="+", choices=COSTS, default=list(COSTS),
        help="what plans balance: query-key pairs alone, or the default costs (default: both, a row each)")  # fmt: skip
    add("--batches", type=int, default=40, help=f"per row {DEFAULT}")
    add("--tokens-per-rank", type=num_tokens, default=4096, metavar="TOKENS",
        help=f"room of a rank; no document is longer than what all ranks have room for {DEFAULT}")  # fmt: skip
    add("--fill", type=float, default=0.97, help=f"tokens of a batch as a share of the room of all ranks {DEFAULT}")
    add("--token-cap", type=float, default=1.5, help=f"handed to the planner {DEFAULT}")
    add("--seed", type=int, default=0, help=f"of the batches {DEFAULT}")
    arguments = read(parser, argv)
    require_positive(parser, arguments, "batches", "tokens_per_rank")
    if not 0 < arguments.fill <= 1:
        parser.error(f"--fill {arguments.fill} must be above 0 and at most 1")
    if not 1 <= arguments.token_cap < float("inf"):
        parser.error(f"--token-cap {arguments.token_cap} must be at least 1")
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed} must be at least 0")
    return arguments


def topology(text: str) -> tuple[int, int]:
    """(nodes, ranks of a node), as the type of an argument."""
    try:
        nodes, ranks = map(int, text.split("x"))
        if min(nodes, ranks) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODESxRANKS with both at least 1, e.g. 2x8") from None
    return nodes, ranks


def parse_recall(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("recall")
    add = parser.add_argument
    add("--output", type=writable_folder, metavar="DIR", help="where results.json, recall.md and recall.svg go")
    add("--plot", metavar="RESULTS", nargs="+",
        help="only draw table and plot of a results.json again, beside it; several are joined into --output",
    )  # fmt: skip
    add("--models", nargs="+", default=MODELS, help=f"families, FAMILY-7:1 and the like (default: {' '.join(MODELS)})")
    add("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128], help=f"pairs per document {DEFAULT}")
    add("--tokens", type=int, default=2048, help=f"tokens per batch of each number of pairs {DEFAULT}")
    add("--num-keys", type=int, default=256, help=DEFAULT)
    add("--num-values", type=int, default=256, help=DEFAULT)
    add("--layers", type=int, default=8, help=DEFAULT)
    add("--hidden", type=int, default=128, help=f"width of the residual stream {DEFAULT}")
    add("--heads", type=int, default=4, help=f"of hidden / heads dimensions, in every layer {DEFAULT}")
    add("--conv-width", type=int, default=4,
        help=f"short convolution of linear layers; 0: none, -1: the family's {DEFAULT}")  # fmt: skip
    add("--steps", type=int, default=2000, help=DEFAULT)
    add("--learning-rates", type=float, nargs="+", default=[2e-3],
        help=f"of several, validation picks the model's {DEFAULT}")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], help="of weights and training batches")
    add("--evaluation-batches", type=int, default=8, help=DEFAULT)
    add_device(parser)
    add("--jobs", type=int, help="runs at a time (default: 1 on CPU, on a GPU one per CPU core)")
    add("--no-graphs", action="store_true", help="on a GPU, do without CUDA graphs")
    add("--time-limit", type=float, help="seconds after which what still runs is stopped")
    add("--quick", action="store_true", help=f"minutes on a CPU; other defaults: {QUICK}")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    arguments = read(parser, argv)
    if not arguments.output and len(arguments.plot or ()) != 1:
        parser.error("give --output DIR, or --plot RESULTS of one file, or both for several")
    require_positive(
        parser, arguments, "layers", "hidden", "heads", "steps", "evaluation_batches", "jobs", "num_keys", "num_values"
    )
    if arguments.jobs is None:
        arguments.jobs = (os.cpu_count() or 1) if arguments.device == "cuda" else 1
    from longspan.benchmarks.recall import make_runs

    try:
        make_runs(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def parse_attention_schemes(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("attention_schemes")
    add, mixes = parser.add_argument, [*MIXES, ONE]
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--mixes", nargs="+", choices=mixes, default=mixes, help="of document lengths (default: all)")
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="(default: all)")
    sizes = ByDevice([32 << 10, 128 << 10], [1 << 10])
    add("--tokens", type=num_tokens, nargs="+", default=sizes, help=f"per rank {DEFAULT}")
    add("--costs", help="file of calibrate.py for the plans; otherwise those measured first, as there")
    add("--nodes", type=int, default=0, help="emulate as many nodes on this machine")
    add("--ranks-per-node", type=int, default=2, help=f"of emulated nodes {DEFAULT}")
    add("--megabits", type=float, default=200.0, help=f"per second, of an emulated rank's link {DEFAULT}")
    add("--exposed", action="store_true",
        help="time each scheme without its transfers, and within a decoder layer, too")  # fmt: skip
    add("--seed", type=int, default=0, help="of the lengths")
    add("--repetitions", type=int, default=ByDevice(20, 5), help=DEFAULT)
    add("--budget", type=float, default=540.0, help=f"{BUDGET} {DEFAULT}")
    add_model_arguments(parser)
    parser.set_defaults(
        heads=ByDevice(32, 8), kv_heads=ByDevice(8, 4), head_dim=ByDevice(128, 32), megabytes=ByDevice(256, 1)
    )
    arguments = read(parser, argv)
    check_model_arguments(parser, arguments)
    require_positive(parser, arguments, "tokens", "ranks_per_node", "megabits", "repetitions", "budget")
    if arguments.nodes < 0:
        parser.error(f"--nodes {arguments.nodes} must be 0 (none are emulated) or more")
    if arguments.costs:
        from longspan.launcher.calibration import read_costs
        from longspan.launcher.errors import UserError

        try:
            read_costs(arguments.costs)
        except UserError as error:
            parser.error(str(error))
    return arguments


# By module of longspan.benchmarks.
PARSERS = {
    "calibrate": parse_calibrate,
    "linear_kernels": parse_linear_kernels,
    "ring_attention": parse_ring_attention,
    "linear_ranks": parse_linear_ranks,
    "planner": parse_planner,
    "recall": parse_recall,
    "attention_schemes": parse_attention_schemes,
}
