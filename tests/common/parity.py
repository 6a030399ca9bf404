"""Run an attention function on this rank's share of seeded global inputs; compare assembled shares with an oracle."""

import sys
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from cases import LENGTHS, layouts

# fp64 and fp32 are the limits of the design; errors are relative to the norm of what is expected.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# Gradients vanish where terms of size 1 cancel (1-token documents, strong decay): errors are relative to this at least.
FLOOR = 1e-2
WORLD_SIZES = [1, 2, 3, 4, 8]
LAYOUTS = ["contiguous", "zigzag", "balanced", "random", "holes"]
SMALL = ["two", "ones", "few", "single_token"]


def run_share(attention, inputs, grad_out, layout, rank, **kwargs):
    """{"out", "d<name>", ...}: `attention` and its gradients on the rows of global `inputs` that `rank` holds."""
    indices = torch.from_numpy(layout.global_indices(rank))
    leaves = {name: x[indices].clone().requires_grad_() for name, x in inputs.items()}
    out = attention(**leaves, layout=layout, **kwargs)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out[indices].to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def assemble(shares, layout):
    """The global tensors from every rank's share; tokens nobody returned stay NaN."""
    whole = {}
    for rank, share in enumerate(shares):
        indices = torch.from_numpy(layout.global_indices(rank))
        for name, x in share.items():
            full = whole.setdefault(name, torch.full((layout.num_tokens, *x.shape[1:]), float("nan"), dtype=x.dtype))
            full[indices] = x
    return whole


def relative_error(actual, expected):
    """Norm of the difference over the norm of `expected` (or over FLOOR per element, if larger); NaN stays NaN."""
    expected = expected.double()
    floor = FLOOR * expected.numel() ** 0.5
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=floor)).item()


def disagreements(case, shares, layout, expected, dtype, tolerance=None):
    """One line per output or gradient that has another shape or value than expected; NaN always counts.

    Autograd itself holds gradients to the dtype of their input; the output has the dtype of q.
    """
    lines = []
    whole = assemble(shares, layout)
    if whole["out"].dtype != dtype:
        lines.append(f"{case}: the output is {whole['out'].dtype}")
    for name, wanted in expected.items():
        if whole[name].shape != wanted.shape:
            lines.append(f"{case}: {name} has shape {list(whole[name].shape)}, expected {list(wanted.shape)}")
            continue
        error = relative_error(whole[name], wanted)
        limit = TOLERANCE[dtype] if tolerance is None else tolerance[name]
        if not error <= limit:
            lines.append(f"{case}: {name} is off by {error:.1e} (limit {limit:.1e})")
    return lines


@dataclass(frozen=True)
class Case:
    """`variant` names a decay family or a mask and head counts; `lengths` and `layout` are names in cases.py."""

    variant: str
    lengths: str
    layout: str
    strategy: str
    dtype: torch.dtype = torch.float64

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.variant}-{self.lengths}-{self.layout}-{self.strategy}-{dtype}"


def taking_turns(strategies, world_size, double_only=()):
    """Cases of every variant with every strategy, of {variant: strategies}; everything else takes turns, over world
    sizes too: in WORLD_SIZES together every variant and strategy meet in every layout, on one long document and on
    mixed lengths. double_only: variants that fp32 does not hold to its limit."""
    for i, (variant, names) in enumerate(strategies.items()):
        for turn, strategy in enumerate(names, i + WORLD_SIZES.index(world_size)):
            layout = LAYOUTS[turn % len(LAYOUTS)]
            yield Case(variant, ["one", "mixed"][turn % 2], layout, strategy)
            if turn % 3 == 0:
                yield Case(variant, SMALL[turn % 4], layout, strategy)
            if turn % 4 == 0 and variant not in double_only:
                yield Case(variant, "mixed", layout, strategy, torch.float32)


def run_cases(rank, world_size, cases, attention, make_inputs):
    """{case: (this rank's share, error)}; every tenth case runs twice and must repeat bit by bit.

    A case that raises does so on all ranks (an error on one alone is an error of its own: its traceback is printed and
    the time limit ends the run), so the next case goes on.

    make_inputs(variant, lengths, dtype) gives the global differentiable inputs, the gradient of the output and the
    keyword arguments of `attention`, the same on every rank.
    """
    results = {}
    for number, case in enumerate(cases):
        lengths = LENGTHS[case.lengths]
        inputs, grad_out, kwargs = make_inputs(case.variant, lengths, case.dtype)
        layout = layouts(lengths, world_size)[case.layout]

        def call():
            return run_share(
                attention, inputs, grad_out, layout, rank, group=dist.group.WORLD, strategy=case.strategy, **kwargs
            )

        try:
            share = call()
            if number % 10 == 0:
                for name, x in call().items():
                    assert torch.equal(x, share[name]), f"{name} differs from run to run"
            results[case] = share, None
        except Exception:
            error = f"{case}: rank {rank} raised\n{traceback.format_exc()}"
            print(error, file=sys.stderr, flush=True)
            results[case] = None, error
    return results


def check_cases(ranks, world_size, cases, expected):
    """Fails with every case in which the assembled results of run_cases differ from `expected(case)`."""
    problems = []
    for case in cases:
        if errors := [results[case][1] for results in ranks if results[case][1]]:
            problems.append(errors[0])
            continue
        shares = [results[case][0] for results in ranks]
        layout = layouts(LENGTHS[case.lengths], world_size)[case.layout]
        problems += disagreements(case, shares, layout, expected(case), case.dtype)
    assert not problems, f"{len(problems)} problems in {len(cases)} cases\n" + "\n".join(problems)
