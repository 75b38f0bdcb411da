"""The table of peers: llmmw's adapters work, and what is shown is what was found. How fast it is, no test asks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # starts a dozen processes; on a busy machine each takes seconds
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def command():
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from peers.__main__ import main

        yield main


@pytest.fixture(scope="module")
def found(command, tmp_path_factory):
    """In this interpreter's own environment: nothing is installed, nothing outside is reached."""
    target = tmp_path_factory.mktemp("peers") / "deep" / "found.json"
    rows = "memory,uncached,stampede,size"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command([
            "--in-place", "--quick", "--only", "llmmw,httpx", "--rows", rows, "--levels", "2", "--calls", "4",
            "--json", str(target),
        ]) == 0  # fmt: skip
    return json.loads(target.read_text()) | {"printed": printed.getvalue()}


def rows_of(found, section):
    return {row["name"]: row for row in found["rows"] if row["section"] == section}


def test_every_way_has_a_figure_or_a_reason_in_every_section(found):
    ways = set(found["configured"])
    assert ways == {"llmmw decorator", "llmmw Client", "httpx"}
    for section in {row["section"] for row in found["rows"]}:
        here = rows_of(found, section)
        assert here.keys() == ways
        assert all((row["median"] is None) == bool(row["skipped"]) for row in here.values())


def test_llmmw_answers_from_memory_and_upstream(found):
    for section in ("memory hit, CPU", "uncached, 2 at once, CPU"):
        here = rows_of(found, section)
        assert here["llmmw decorator"]["median"] > 0, here["llmmw decorator"]["skipped"]
        assert here["llmmw Client"]["median"] > 0, here["llmmw Client"]["skipped"]
    assert rows_of(found, "memory hit, CPU")["httpx"]["skipped"] == "no cache"


def test_a_stampede_is_counted_where_it_arrives(found):
    here = rows_of(found, "stampede of 1000, upstream")
    medians = {name: row["median"] for name, row in here.items()}
    assert medians == {"llmmw decorator": 1, "llmmw Client": 1, "httpx": 100}
    assert [here[name]["status"] for name in ("llmmw decorator", "llmmw Client")] == ["ok", "ok"]


def test_the_table_has_a_line_for_each_way_and_says_why_a_cell_is_empty(found):
    assert all(f"| {way} " in found["printed"] for way in found["configured"])
    assert "- httpx: memory hit: no cache" in found["printed"]
    assert "no environment of its own" in found["printed"]


def test_an_earlier_run_is_joined_and_judged_anew(found, command, tmp_path, capsys):
    earlier = tmp_path / "earlier.json"
    written = {name: value for name, value in found.items() if name != "printed"}
    for row in written["rows"]:
        if row["name"] == "httpx" and row["section"].startswith("memory"):
            row |= {"repeats": [0.5], "skipped": None}
    earlier.write_text(json.dumps(written))
    assert command(["--in-place", "--only", "llmmw", "--join", str(earlier)]) == 0
    assert "memory hit, CPU: httpx (a floor) 0.50; llmmw" in capsys.readouterr().out


def test_a_name_that_is_no_peer_and_one_that_is_no_row_are_refused(command):
    with pytest.raises(SystemExit, match=r"unknown: nobody \(peers: llmmw,"):
        command(["--only", "nobody"])
    with pytest.raises(SystemExit, match=r"unknown: nothing \(rows: memory,"):
        command(["--rows", "nothing"])


def test_wrong_hits_are_told_from_right_ones_and_from_fields_that_are_not_sent(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import asyncio

    from client_cpu import aiohttp_client
    from peers.probes import FIELDS, probe

    class Way:
        """A cache that ignores the seed and everything else in the body but its messages, and drops `stop`."""

        def __init__(self):
            self.loop, self.stored, self.exits = asyncio.Runner(), {}, contextlib.AsyncExitStack()

        def job(self, purpose, url):
            return {"purpose": purpose, "url": url}

        def do(self, what, **fields):
            return getattr(self, what)(**fields)

        def open(self, purpose, url):
            self.post = self.loop.run(self.exits.enter_async_context(aiohttp_client(url)))

        def ask(self, prompt, changes):
            changes.pop("stop", None)
            kept = {name: changes[name] for name in ("base_url", "api_key", "messages") if name in changes}
            key = json.dumps([prompt, kept])
            if key not in self.stored:
                self.stored[key] = self.loop.run(self.post(prompt, **changes))

    way = Way()
    with way.loop:
        verdicts = probe(way)
        way.loop.run(way.exits.aclose())
    assert verdicts.keys() == set(FIELDS)
    right = {"base_url": "ok", "api_key": "ok", "system message": "ok", "earlier turns": "ok", "stop": "not sent"}
    assert {field: verdict for field, verdict in verdicts.items() if field in right} == right
    assert verdicts["seed"] == verdicts["tools"] == "WRONG"


def test_a_process_of_a_peer_reaches_nothing_outside(monkeypatch):
    code = (
        "import socket; from peers.guard import OUTSIDE, stay_inside; stay_inside()\n"
        "socket.getaddrinfo('localhost', 80)\n"
        "for reach in (lambda: socket.getaddrinfo('example.invalid', 80),"
        " lambda: socket.create_connection(('192.0.2.1', 80), 1)):\n"
        "    try: reach()\n"
        "    except OSError as error: assert 'outside' in str(error), error\n"
        "print(sorted(OUTSIDE))"
    )
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "['192.0.2.1', 'example.invalid']", done.stderr
