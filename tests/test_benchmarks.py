"""The benchmark of overhead runs anywhere and says what it found in one shape; how fast anything is, no test asks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

KEYS = {
    "section", "name", "unit", "median", "best", "repeats", "p50", "floor", "ratio", "budget", "budget_why", "status",
    "skipped",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    target = tmp_path_factory.mktemp("overhead") / "deep" / "found.json"
    only = [
        "json + sha256",
        "memory hit",
        "disk hit, 64",
        "uncached",
        "bare",
        "aiohttp",
        "llmmw Client",
        "import llmmw",
    ]
    command = [sys.executable, str(BENCHMARKS / "overhead.py"), "--json", str(target), "--repeats", "1"]
    command += ["--calls", "20", "--levels", "2", "--delay", "0", "--only", *only]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "LLMMW"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()) | {"printed": done.stdout}


def rows_of(found, part):
    return {row["name"]: row for row in found["rows"] if part in row["section"]}


def test_every_row_has_the_same_keys_and_a_figure_or_a_reason(found):
    for row in found["rows"]:
        assert set(row) == KEYS
        assert (row["median"] is None) == (row["status"] == "skipped") == bool(row["skipped"])
        assert row["status"] in {"", "ok", "over", "skipped"}
        assert row["median"] is None or math.isfinite(row["median"])
        assert (row["budget"] is None) or row["status"] != ""


def test_llmmw_and_its_floors_are_measured(found):
    inside, http = rows_of(found, "in process"), rows_of(found, "HTTP client")
    measured = {name for name, row in (inside | http).items() if row["median"] is not None}
    assert measured >= {
        "dict + json + sha256", "memory hit, async function", "memory hit, sync function", "disk hit, 64 at once",
        "bare function", "uncached call, added by cache stack", "bare asyncio protocol", "aiohttp", "llmmw Client",
    }  # fmt: skip
    assert inside["memory hit, async function"]["ratio"] > 0
    assert inside["memory hit, async function"]["budget"] == 6
    assert http["llmmw Client"]["ratio"] > 0


def test_imports_are_measured_in_seconds_and_in_megabytes(found):
    units = {row["unit"]: row for row in found["rows"] if row["name"] == "import llmmw"}
    assert units.keys() == {"s", "MB"}
    assert (units["s"]["budget"], units["MB"]["budget"]) == (0.15, 35)


def test_the_settings_and_the_machine_are_part_of_the_result(found):
    assert found["settings"]["levels"] == [2]
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["took_s"] > 0


def test_the_table_names_every_row(found):
    assert all(row["name"] in found["printed"] for row in found["rows"])
    assert "budgets kept" in found["printed"]


def test_a_row_is_judged_by_its_median_and_shown_with_its_ratio(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import Budget, Row, as_json, table

    rows = [
        Row("s", "floor", "µs", [2.0, 1.0, 9.0]),
        Row("s", "kept", "µs", [4.0, 99.0, 3.0], floor="floor", budget=Budget(4.0, "≤ 4 µs")),
        Row("s", "broken", "µs", [5.0], floor="floor", budget=Budget(4.0, "≤ 4 µs")),
        Row("s", "absent", "µs", floor="floor", budget=Budget(4.0, "≤ 4 µs"), skipped="not installed"),
    ]
    shown = {row["name"]: row for row in as_json(rows, {}, 1.0)["rows"]}
    assert [row.status for row in rows] == ["", "ok", "over", "skipped"]
    assert shown["kept"]["ratio"] == 2.0
    assert shown["kept"]["best"] == 3.0
    assert shown["absent"]["median"] is None
    assert "OVER" in table(rows)
    assert "not installed" in table(rows)


def test_storms_are_counted_where_they_arrive(tmp_path):
    target = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "storms.py"), "--json", str(target), "--calls", "20"]
    command += ["--only", "stampede", "large-told"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in {0, 1}, done.stderr
    found = {(row["storm"], row["client"]): row for row in json.loads(target.read_text())["results"]}
    assert found.keys() == {("stampede", "llmmw"), ("stampede", "openai SDK"), ("large-told", "llmmw")}
    assert [row["failed"] for row in found.values()] == [0, 0, 0]
    assert found["stampede", "llmmw"]["upstream"] == 1
    assert found["stampede", "openai SDK"]["upstream"] == 20
    assert found["large-told", "llmmw"]["upstream"] >= 20
    assert "budgets broken" in done.stdout


def test_outages_are_counted_and_judged(tmp_path):
    target = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "outage.py"), "--json", str(target), "--calls", "200"]
    command += ["--only", "refused", "healthy", "--clients", "recommended", "retries"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in {0, 1}, done.stderr
    found = {(row["outage"], row["client"]): row for row in json.loads(target.read_text())["results"]}
    assert len(found) == 4
    assert found["healthy", "recommended"]["load"] == found["healthy", "retries"]["success"] == 1
    assert found["refused", "recommended"]["success"] == 0
    assert found["refused", "recommended"]["load"] < 1 < found["refused", "retries"]["load"] < 2
    assert "budgets broken" in done.stdout


def test_growth_is_measured_for_each_size_and_judged(tmp_path):
    target = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "growth.py"), "--json", str(target), "--repeats", "1"]
    command += ["--largest", "1000", "--calls", "200", "--only", "memory hit", "disk", "waiter left"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in {0, 1}, done.stderr
    found = json.loads(target.read_text())
    assert [row["name"] for row in found["results"]] == ["memory hit", "memory hit, on any", "disk hit", "waiter left"]
    sizes = [["1000"]] * 3 + [["1", "1000"]]
    assert [list(row["us"]) for row in found["results"]] == sizes
    assert all(row["growth"] is None and row["ok"] and row["in_all"] > 0 for row in found["results"])
    assert len(found["memory_mb"]) == 10
    assert "1.00x  ok" in done.stdout


def test_growth_is_judged_between_two_sizes_and_shown_over_all(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from growth import CASES, judged, table

    case = CASES[0]
    kept = judged(case, "memory hit", {1_000: 5.0, 100_000: 6.4, 1_000_000: 9.0})
    over = judged(case, "memory miss, stored", {1_000: 5.0, 100_000: 6.6})
    known = judged(case, "memory hit, on any", {1_000: 5.0, 100_000: 50.0})
    assert [row["ok"] for row in (kept, over, known)] == [True, False, True]
    assert (kept["growth"], kept["in_all"]) == (1.28, 1.8)
    assert "OVER 1.3" in table([kept, over, known])


def test_the_steps_of_a_hit_add_up_to_it(tmp_path):
    target = tmp_path / "profile.json"
    command = [sys.executable, str(BENCHMARKS / "overhead.py"), "--profile", "--repeats", "1", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    profiles = json.loads(target.read_text())["profiles"]
    assert len(profiles) == 3
    for steps in profiles:
        assert math.fsum(step["own"] for step in steps) == pytest.approx(steps[0]["total"])
        assert [step["depth"] for step in steps].count(0) == 1
        assert all(step["step"] in done.stdout for step in steps)
