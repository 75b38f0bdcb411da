"""Many processes on one cache directory, and processes that are killed: SPEC 2."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from llmmw.stores.rows import Rows

ZYGOTE = Path(__file__).parent / "diskzygote.py"
KILLS = 50
MAX_BYTES = 2**20 * 4


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


class Zygote:
    """Starts workers quickly."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(ZYGOTE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, place, do, **options):
        job = {"place": str(place), "do": do, "max_bytes": MAX_BYTES} | options
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def heard(self, wanted):
        """The next report that is wanted."""
        while True:
            line = self._process.stdout.readline()
            assert line, "the zygote ended"
            report = json.loads(line)
            if wanted(report):
                return report

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(120) == 0


@pytest.fixture
def zygote():
    made = Zygote()
    yield made
    made.close()


def is_pids(report):
    return isinstance(report, list)


def is_end(report):
    return isinstance(report, dict) and "ended" in report


def checked(place):
    """The database is whole, and holds no page that nobody uses."""
    connection = sqlite3.connect(place / "cache.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    connection.close()


def only_right_rows(place):
    """Every row is whole, and is what was written under its key. Returns how many there are."""
    rows = Rows(place, MAX_BYTES)
    found = {key: rows._read(key, value) for _, key, value in rows._table.rows()}
    rows.close()
    for one in found.values():
        assert one is not None
        assert one.data[:32] * (len(one.data) // 32) == one.data
    return len(found)


def test_disk_07_fifty_kills_in_the_middle_of_writes_break_nothing(place, zygote):
    rng = random.Random(7)
    for kill in range(KILLS):
        zygote.start(place, "write", seed=kill)
        (writer,) = zygote.heard(is_pids)
        for _ in range(rng.randrange(6)):
            zygote.heard(lambda report: report == "wrote")
        os.kill(writer, signal.SIGKILL)
        assert zygote.heard(is_end)["ended"] == [-signal.SIGKILL]
        if kill % 5 == 0 and (place / "cache.db").exists():  # else the next writer recovers by itself
            checked(place)
    assert only_right_rows(place) > 50
    checked(place)
    assert [path.name for path in place.iterdir()] == ["cache.db"]
    assert (place / "cache.db").stat().st_size < 1.25 * MAX_BYTES


def test_disk_07_a_kill_while_the_database_is_made_leaves_one_that_can_be_completed(place, zygote):
    for kill in range(20):
        fresh = place.parent / f"cache{kill}"
        zygote.start(fresh, "write")
        (writer,) = zygote.heard(is_pids)
        if kill % 2:
            while not (fresh / "cache.db").exists():
                pass
        os.kill(writer, signal.SIGKILL)
        assert zygote.heard(is_end)["ended"] == [-signal.SIGKILL]
        zygote.start(fresh, "mix", steps=10)
        told = zygote.heard(lambda report: isinstance(report, dict) and "told" in report)["told"]
        assert set(told) <= {"busy"}
        assert zygote.heard(is_end)["ended"] == [0]


def test_eight_processes_read_write_cull_and_prune_one_directory(place, zygote):
    zygote.start(place, "mix", processes=8, steps=400)
    reports = []
    end = zygote.heard(lambda report: is_end(report) or reports.append(report))
    assert end["ended"] == [0] * 8
    found = [report for report in reports if "wrong" in report]
    assert [report["wrong"] for report in found] == [[]] * 8
    assert sum(report["hits"] for report in found) > 100
    told = {kind for report in reports if "told" in report for kind in report["told"]}
    assert told <= {"busy"}
    checked(place)
    assert only_right_rows(place) > 0
    assert (place / "cache.db").stat().st_size < 1.25 * MAX_BYTES
    assert not list(place.glob("*corrupt*"))
