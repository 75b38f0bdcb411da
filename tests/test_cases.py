"""Every case of the specification has its test, and every test that carries a case's id carries one that exists."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "cases.py"
_spec = importlib.util.spec_from_file_location("cases", SCRIPT)
listing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(listing)


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )


def test_the_sections_are_numbered_without_a_gap():
    numbers = {}
    for case, text in listing.cases().items():
        section, number = case.split("-")
        numbers.setdefault(section, []).append(int(number))
        assert text
    assert tuple(numbers) == listing.SECTIONS
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())


def test_a_test_that_carries_an_id_carries_that_of_a_case():
    unknown = {
        (name, path.name) for name, path in listing.tests_in_files() if listing.case_of(name) not in listing.cases()
    }
    assert unknown == set()


def test_every_case_has_a_test():
    proved = {listing.case_of(name) for name, _ in listing.tests_in_files()}
    assert {case: text for case, text in listing.cases().items() if case not in proved} == {}


def test_names_are_read():
    assert listing.case_of("test_cache_03_unknown_fields_count") == "cache-3"
    assert listing.case_of("test_limit_11_x") == "limit-11"
    assert listing.case_of("test_limit_of_something") is None
    assert listing.case_of("test_vllm_03_x") is None


def test_the_list_tells_what_ran_and_how_it_ended(tmp_path):
    done = run("order-3", "--json", tmp_path / "deep" / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = json.loads((tmp_path / "deep" / "found.json").read_text()).values()
    assert case["state"] == "passed"
    assert set(case["tests"].values()) == {"passed"}
    assert "order-3      passed   cache inside retry" in done.stdout
    assert all(name in done.stdout for name in case["tests"])


def test_the_list_without_running(tmp_path):
    done = run("order-3", "--list", "--short")
    assert "order-3      not run  cache inside retry" in done.stdout
    assert "test_order" not in done.stdout
    assert done.returncode == 0


def test_an_unknown_id_is_refused():
    done = run("order-99")
    assert done.returncode == 2
    assert "no case 'order-99'" in done.stderr
