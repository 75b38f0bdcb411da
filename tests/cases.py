"""The cases of the specification, the tests that prove them, and how they end: `make cases`, or `--help`.

A test proves a case by its name: cache-3 is proved by `test_cache_03_...`. What each case says is in data/cases.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TESTS = Path(__file__).parent
SECTIONS = ("cache", "disk", "coalesce", "limit", "pool", "batch", "route", "order", "async", "security")
_NAME = re.compile(rf"test_({'|'.join(SECTIONS)})_(\d+)_\w")
_WORST_FIRST = ("failed", "no test", "not run", "skipped", "xfailed", "passed")


def cases() -> dict[str, str]:
    """What each case says, by its id, in the order of the specification."""
    lines = (TESTS / "data" / "cases.txt").read_text(encoding="utf-8").splitlines()
    return {name: text.strip() for name, _, text in (line.partition(" ") for line in lines)}


def case_of(test: str) -> str | None:
    """The id of the case that a test of this name proves."""
    found = _NAME.match(test)
    return None if found is None else f"{found[1]}-{int(found[2])}"


def tests_in_files() -> Iterator[tuple[str, Path]]:
    """Name and file of every test function that carries a case's id, from the source."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if case_of(name) is not None:
                yield name, path


class Chosen:
    """A pytest plugin: keeps the tests of the wanted cases, and what became of each."""

    def __init__(self, wanted: Mapping[str, str], *, run: bool) -> None:
        self.found: dict[str, dict[str, str]] = {name: {} for name in wanted}
        self._names: dict[str, tuple[str, str]] = {}
        self._run = run

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the others."""
        kept: list[pytest.Item] = []
        for item in items:
            name: str = getattr(item, "originalname", None) or item.name
            case = case_of(name)
            if case in self.found:
                kept.append(item)
                self._names[item.nodeid] = case, name
                self.found[case].setdefault(name, "not run")
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept if self._run else []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails once, with whatever parameters, has failed."""
        case, name = self._names[report.nodeid]
        told = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or told != "passed":
            self.found[case][name] = _worst([told, self.found[case][name]], but="not run")


def _worst(states: Iterable[str], but: str = "") -> str:
    found = {state for state in states if state != but}
    return next((state for state in _WORST_FIRST if state in found), "no test")


def _report(found: Mapping[str, Mapping[str, str]], texts: Mapping[str, str], *, short: bool) -> Counter[str]:
    """Print it, case by case; how many cases are in which state."""
    states: Counter[str] = Counter()
    for case, tests in found.items():
        state = _worst(tests.values())
        states[state] += 1
        print(f"{case:<12} {state:<8} {texts[case]}")
        for name, each in [] if short else tests.items():
            print(f"{'':21} {'' if each == state else each + ': '}{name}")
    print(f"{sum(states.values())} cases: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    return states


def main(argv: list[str] | None = None) -> int:
    """Run the tests of the cases and print the list; 0 where every case has a test and none fails."""
    parser = argparse.ArgumentParser(prog="make cases", description=__doc__)
    parser.add_argument("cases", nargs="*", help="ids (limit-11) or sections (limit); all by default")
    parser.add_argument("--list", action="store_true", help="which test proves what, without running them")
    parser.add_argument("--short", action="store_true", help="a line per case, without the tests' names")
    parser.add_argument("--json", type=Path, help="write {case: {text, state, tests: {name: state}}} there")
    options = parser.parse_args(argv)
    texts = cases()
    known = {*texts, *SECTIONS}
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"no case {unknown[0]!r}; ids are like limit-11, sections are {', '.join(SECTIONS)}")
    wanted = {
        name: text
        for name, text in texts.items()
        if not options.cases or name in options.cases or name.partition("-")[0] in options.cases
    }
    chosen = Chosen(wanted, run=not options.list)
    files = sorted({str(path) for name, path in tests_in_files() if case_of(name) in wanted})
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    ended = (
        pytest.main([*quiet, *(["--collect-only", "-qq"] if options.list else []), *files], [chosen]) if files else 0
    )
    states = _report(chosen.found, texts, short=options.short)
    if options.json is not None:
        content = {
            case: {"text": texts[case], "state": _worst(tests.values()), "tests": tests}
            for case, tests in chosen.found.items()
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    broken = ended not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    return int(broken or bool(states["failed"] + states["no test"]))


if __name__ == "__main__":
    os.chdir(TESTS.parent)
    sys.exit(main())
