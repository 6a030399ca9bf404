"""How the time of profiled steps divides over components, so that the parts add up to the whole.

Every instant goes to what the device does then: to the components that compute (in equal parts where several do, on
several streams), else to communication, which is then exposed, else to what the host is at, else to nobody.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# What is not a layer's: names that `longspan plan` shares, where it has them.
EXPOSED, OPTIMIZER, DATA, OUTSIDE = "communication, exposed", "optimizer", "data", "validation and saving"
IDLE, OTHER = "idle", "other"
FORWARD, BACKWARD, AGAIN, WHOLE = "forward", "backward", "recomputed", ""  # phases; WHOLE: of what has none
PHASES = (FORWARD, BACKWARD, AGAIN)


@dataclass(frozen=True)
class Work:
    """Computation from `start` to `end` (seconds) for a component in a phase, or communication of some kind."""

    start: float
    end: float
    component: str = OTHER
    phase: str = WHOLE
    communication: str = ""


@dataclass
class Breakdown:
    """Seconds within the window: by (component, phase), which add up to it; in which communication ran at all; and of
    every kind of it, summed over its kernels, which may overlap."""

    window: float
    seconds: Counter = field(default_factory=Counter)
    communication: float = 0.0
    kinds: Counter = field(default_factory=Counter)

    def as_dict(self, steps: int) -> dict:
        """For JSON: seconds of one of so many steps. What is beside training (OUTSIDE) is not part of `step_s`."""
        components = {}
        for (component, phase), seconds in self.seconds.items():
            of_component = components.setdefault(component, {"total": 0.0})
            of_component["total"] += seconds / steps
            if phase:
                of_component[phase] = seconds / steps
        return {
            "step_s": (self.window - self.seconds[OUTSIDE, WHOLE]) / steps,
            "components": components,
            "communication_s": self.communication / steps,
            "communication_kinds_s": {kind: seconds / steps for kind, seconds in self.kinds.items()},
        }


def break_down(work: Iterable[Work], window: tuple[float, float], host: Iterable[Work] = ()) -> Breakdown:
    """Divides the window, (start, end) in seconds. host: what the host waits for or does itself; where several of these
    overlap, the one that began last counts."""
    result = Breakdown(window[1] - window[0])
    computing, communicating, waiting = [], [], []  # what is under way at the instant
    changes = []
    for items, choose in (
        (work, lambda item: communicating if item.communication else computing),
        (host, lambda _: waiting),
    ):
        for item in items:
            start, end = max(item.start, window[0]), min(item.end, window[1])
            if start < end:
                changes += [(start, list.append, choose(item), item), (end, list.remove, choose(item), item)]
                if item.communication:
                    result.kinds[item.communication] += end - start
    now = window[0]
    for time, change, under_way, item in sorted(changes, key=lambda change: change[0]):
        _book(result, time - now, computing, communicating, waiting)
        change(under_way, item)
        now = time
    _book(result, window[1] - now, computing, communicating, waiting)
    return result


def _book(result, seconds, computing, communicating, waiting) -> None:
    if seconds <= 0:
        return
    if communicating:
        result.communication += seconds
    for item in computing:
        result.seconds[item.component, item.phase] += seconds / len(computing)
    if not computing:
        names = [EXPOSED] if communicating else [item.component for item in waiting[-1:]] or [IDLE]
        result.seconds[names[0], WHOLE] += seconds
