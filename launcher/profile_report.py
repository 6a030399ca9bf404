"""The table of a profile: what a step took by component, beside what `longspan plan` says of it."""

import json
from pathlib import Path

from longspan.attention.ranges import CONVOLUTION, LINEAR, SOFTMAX, SPARSE
from longspan.launcher.breakdown import DATA, EXPOSED, IDLE, OPTIMIZER, OTHER, OUTSIDE, PHASES
from longspan.launcher.errors import UserError
from longspan.launcher.timeline import LAYERS, LOSS, MIXER, MLP, NORMS, SHARDING

# Row -> components that it is the sum of. The rows that begin with a space are parts of the one above.
ROWS = {
    SOFTMAX: [SOFTMAX], LINEAR: [LINEAR], SPARSE: [SPARSE], CONVOLUTION: [CONVOLUTION],
    LAYERS: [LAYERS, MIXER, MLP], f"  {MIXER}": [MIXER], f"  {MLP}": [MLP],
    NORMS: [NORMS], "loss": [LOSS], SHARDING: [SHARDING], OPTIMIZER: [OPTIMIZER], EXPOSED: [EXPOSED],
    DATA: [DATA], OTHER: [OTHER], IDLE: [IDLE],
}  # fmt: skip
PLANNED = {IDLE: "waiting for the host"}  # names of `longspan plan`, where they are others


def lines(record: dict) -> list[str]:
    """record: what profile.json holds. Numbers of several ranks are means, beside the least and the most."""
    ranks, (first, last), planned = record["ranks"], record["steps"], record["planned_s"]
    step = _mean([rank["step_s"] for rank in ranks])
    named = ", ".join(str(rank["rank"]) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    rows = [
        f"profile of steps {first} to {last}, {'ranks' if len(ranks) > 1 else 'rank'} {named}:"
        f" {1000 * step:,.1f} ms a step",
        f"{'ms':<26}{'forward':>11}{'backward':>11}{'recomputed':>11}{'total':>11}  share"
        + (f"{'ranks':>21}" if len(ranks) > 1 else "")
        + (f"{'planned':>11}" if planned else ""),
    ]
    for name, components in ROWS.items():
        totals = [_seconds(rank, components, "total") for rank in ranks]
        plan = (planned or {}).get(PLANNED.get(name, name))
        if not any(totals) and not plan:
            continue
        phases = [_mean([_seconds(rank, components, phase) for rank in ranks]) for phase in PHASES]
        total = _mean(totals)
        rows.append(
            f"{name:<26}"
            + "".join(_ms(seconds) for seconds in phases)
            + f"{1000 * total:>11,.1f}{total / step:>7.1%}"
            + (f"{f'{1000 * min(totals):,.1f} to {1000 * max(totals):,.1f}':>21}" if len(ranks) > 1 else "")
            + (_ms(plan or 0) if planned else "")
        )
    if planned:
        rows.append(f"planned (longspan plan): {1000 * sum(planned.values()):,.1f} ms a step")
    rows += _communication(ranks)
    if beside := _mean([_seconds(rank, [OUTSIDE], "total") for rank in ranks]):
        rows.append(f"{OUTSIDE}, not in the step: {1000 * beside:,.1f} ms for each")
    return rows + ([f"no plan beside it: {record['note']}"] if record["note"] else [])


def _communication(ranks: list[dict]) -> list[str]:
    ran = _mean([rank["communication_s"] for rank in ranks])
    if not ran:
        return []
    hidden = 1 - _mean([_seconds(rank, [EXPOSED], "total") for rank in ranks]) / ran
    kinds = {kind for rank in ranks for kind in rank["communication_kinds_s"]}
    means = {kind: _mean([rank["communication_kinds_s"].get(kind, 0.0) for rank in ranks]) for kind in kinds}
    shown = ", ".join(f"{kind} {1000 * means[kind]:,.1f}" for kind in sorted(means, key=means.get, reverse=True))
    return [f"communication runs for {1000 * ran:,.1f} ms, {hidden:.0%} of it beside computation: {shown}"]


def _seconds(rank: dict, components: list[str], key: str) -> float:
    return sum(rank["components"].get(component, {}).get(key, 0.0) for component in components)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:>11,.1f}" if seconds else " " * 11


def show(run_dir: Path) -> None:
    """Prints the table of the newest profile of a run directory. UserError if there is none."""
    found = sorted(run_dir.glob("profile/step-*/profile.json"))
    if not found:
        raise UserError(f"{run_dir} is no run directory with a profile: train with profile.start=N to write one")
    print("\n".join(lines(json.loads(found[-1].read_text()))))
