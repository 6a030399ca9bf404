"""Which tests `make test` leaves out: tests/slow.txt, written anew from the times of a run of all tests.

    pytest -q -n 2 --dist loadfile --no-loadscope-reorder --junitxml=times.xml
    python tests/common/slow_tests.py times.xml

A case that takes longer than CASE seconds is left out, but of a function all of whose cases do the quickest stays where
it takes at most ALONE. Over two ranks all run (conftest.py), and of a function that has them none over three or four.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

CASE, ALONE = 1.0, 8.0
LIST = Path(__file__).parent.parent / "slow.txt"


def listed() -> frozenset[str]:
    return frozenset(LIST.read_text().split("\n")) - {""}


def name_of(nodeid: str) -> str:
    """As a report of a run has it: tests.kernels.test_fold.test_sums[3]."""
    function, bracket, case = nodeid.partition("[")
    return function.replace(".py::", ".").replace("::", ".").replace("/", ".") + bracket + case


def slow(seconds: dict[str, float]) -> list[str]:
    """The names, in order, of those of these tests to leave out."""
    functions = defaultdict(list)
    for name in seconds:
        functions[name.partition("[")[0]].append(name)
    left_out = []
    for cases in functions.values():
        cases.sort(key=seconds.get)
        stays = seconds[cases[0]] <= ALONE  # one at least
        left_out += [name for name in cases[stays:] if seconds[name] > CASE]
    return sorted(left_out)


def main(report: str) -> None:
    cases = ElementTree.parse(report).getroot().iter("testcase")
    ran = [case for case in cases if case.find("skipped") is None]
    seconds = {f"{case.get('classname')}.{case.get('name')}": float(case.get("time")) for case in ran}
    names = slow(seconds)
    LIST.write_text("".join(name + "\n" for name in names))
    left = sum(seconds.values()) - sum(seconds[name] for name in names)
    print(f"{len(names)} of {len(seconds)} tests are slow; the others take {left:.0f} of {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
