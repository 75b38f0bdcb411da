"""What is measured, row by row: each takes the ways (every one in a process of its own) and gives `Row`s.

A section of rows is a column of the table. Ways take turns within each repeat, so a slow minute hits all alike.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fast_server
import msgspec
from import_cost import import_cost
from line_process import LineProcess
from measure import Row, in_turn
from storms import LATENCY_S, STORMS

from llmmw.testing.server import ServerConfig, server_process
from peers.environments import variables
from peers.probes import probe
from peers.protocol import CannotError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from measure import Progress

    from peers.environments import Environments
    from peers.protocol import Peer

DICT = "a dict by hand"
BARE = "aiohttp"
MEMORY, DISK = "memory hit, CPU", "disk hit, CPU"
IMPORT_S, IMPORT_MB = "import, CPU", "import, memory"
READY_S, READY_MB = "first answer, CPU", "first answer, memory"
SIZE, PACKAGES = "installed", "packages"
STAMPEDE, WRONG = "stampede of 1000, upstream", "wrong hits"
LIMIT_S = 180.0
"""The longest that one answer of a way may take."""
MOST_STORED = 128
"""Calls per repeat where each must have been stored on disk before: some peers wait for the disk at every write."""
_FAILED = "failed: "
_INSIDE = "from peers.guard import stay_inside\nstay_inside()\n"


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    repeats: int
    storm_repeats: int
    calls: int
    levels: Sequence[int]
    crowd: int = 1000


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    peer: Peer
    way: str


class Way:
    """The process of one way."""

    def __init__(self, entry: Entry, python: str, scratch: Path) -> None:
        self.entry = entry
        self.ended = False
        self.scratch = Path(tempfile.mkdtemp(dir=scratch))
        command = [python, "-W", "ignore", "-m", "peers.worker", entry.peer.name, entry.way]
        self._process = LineProcess(command, variables(str(self.scratch)), limit_s=LIMIT_S)

    def do(self, what: str, **fields: Any) -> dict[str, Any]:
        """Have the worker do something.

        Raises:
            CannotError: the peer has nothing for it.
            RuntimeError: it failed.
        """
        try:
            answer = self._process.ask(json.dumps({"do": what, **fields}))
        except RuntimeError:
            self.ended = True
            raise
        found: dict[str, Any] = json.loads(answer)
        if "cannot" in found:
            raise CannotError(found["cannot"])
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def job(self, purpose: str, url: str, **more: Any) -> dict[str, Any]:
        """The fields of a job in a fresh folder."""
        return {"purpose": purpose, "url": url, "directory": tempfile.mkdtemp(dir=self.scratch), **more}

    def close(self) -> None:
        """End the process."""
        self._process.close()


class Lab:
    """Measures; keeps what the peers' processes tried to reach outside this machine."""

    def __init__(
        self, entries: Sequence[Entry], environments: Environments, scale: Scale, progress: Progress, scratch: Path
    ) -> None:
        self.entries = entries
        self.environments = environments
        self.scale = scale
        self.progress = progress
        self.outside: dict[str, list[str]] = {}
        self.probes: dict[str, dict[str, str]] = {}
        self.begun: list[Row] = []
        """All rows, also those of a measurement that was interrupted."""
        self._scratch = scratch
        self._ways: dict[str, Way] = {}

    def way(self, entry: Entry) -> Way:
        """The process of a way: one for the whole run, unless it ended by itself or was ended for taking too long."""
        found = self._ways.get(entry.way)
        if found is None or found.ended:
            found = self._ways[entry.way] = Way(entry, self.environments.python(entry.peer), self._scratch)
        return found

    def close(self) -> None:
        """End all processes, having asked what they tried to reach outside this machine."""
        for way in self._ways.values():
            if not way.ended:
                with contextlib.suppress(RuntimeError):
                    tried = way.do("usage")["outside"]
                    if tried:
                        self.outside[way.entry.way] = tried
            way.close()

    def rows(self, section: str, unit: Any, floor: str = "") -> dict[str, Row]:
        """An empty row for each way."""
        made = {
            entry.way: Row(section, entry.way, unit, floor="" if entry.way == floor else floor, ours=entry.peer.ours)
            for entry in self.entries
        }
        self.begun += made.values()
        return made

    # ── costs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def hits(self, purpose: str, section: str) -> list[Row]:
        """CPU of a call that is answered from the cache."""
        rows = self.rows(section, "µs", DICT)
        calls = min(self.scale.calls, MOST_STORED) if purpose == "disk" else self.scale.calls
        walls: dict[str, list[float]] = {name: [] for name in rows}
        with server_process(ServerConfig(any_model=True)) as server:
            for repeat in range(self.scale.repeats):
                self.progress(f"{section}: repeat {repeat + 1} of {self.scale.repeats}")
                for entry in in_turn(self.entries, repeat):
                    row = rows[entry.way]
                    if _hopeless(row):
                        continue
                    with _telling([row]):
                        server.reset()
                        way = self.way(entry)
                        job = way.job(purpose, server.base_url)
                        found = way.do("hits", calls=calls, **job)
                        asked, stored = server.stats(0)["received"], _stored(purpose, calls)
                        if asked > stored:
                            raise CannotError(f"not from its cache: {asked} requests where {stored} are enough")
                        row.values.append(found["cpu_us"])
                        walls[row.name].append(found["p50_us"])
        for name, clocked in walls.items():
            if clocked:
                rows[name].p50 = statistics.median(clocked)
        return list(rows.values())

    def loads(self, purpose: str) -> list[Row]:
        """CPU of a call that goes upstream, at each number of concurrent calls.

        One after the other they get their answers at once, so that the loop's own waking up is not what is measured.
        """
        rows = {level: self.rows(f"{purpose}, {level} at once, CPU", "µs", BARE) for level in self.scale.levels}
        for delay_s, levels in ((0.0, [n for n in rows if n == 1]), (LATENCY_S, [n for n in rows if n > 1])):
            with fast_server.running(delay_s) as url:
                ready = self._opened(purpose, url, [rows[level] for level in levels])
                for repeat in range(self.scale.repeats if levels else 0):
                    for level in levels:
                        self.progress(f"{purpose}: repeat {repeat + 1} of {self.scale.repeats}, {level} at once")
                        calls = max(level, self.scale.calls)
                        for entry in in_turn(ready, repeat):
                            row = rows[level][entry.way]
                            if _hopeless(row):
                                continue
                            with _telling([row]):
                                found = self.way(entry).do("load", concurrency=level, calls=calls)
                                row.values.append(found["cpu_s"] * 1e6)
        return [row for level in self.scale.levels for row in rows[level].values()]

    def _opened(self, purpose: str, url: str, sections: Sequence[dict[str, Row]]) -> list[Entry]:
        """Those whose ways are open now."""
        ready = list[Entry]()
        for entry in self.entries if sections else ():
            # A cache that never hits has the bare client as its floor, which is measured beside it without one.
            of = "uncached" if entry.way == BARE else purpose
            with _telling([rows[entry.way] for rows in sections]):
                way = self.way(entry)
                way.do("open", **way.job(of, url, at_once=max(self.scale.levels)))
                ready.append(entry)
        return ready

    # ── behaviour ───────────────────────────────────────────────────────────────────────────────────────────────

    def stampede(self) -> list[Row]:
        """Requests that reach the server when all ask the same at once."""
        rows = self.rows(STAMPEDE, "")
        config = ServerConfig(any_model=True, latency="fixed", latency_s=LATENCY_S)
        with server_process(config) as server:
            for entry in self.entries:
                self.progress(f"stampede: {entry.way}")
                row = rows[entry.way]
                with _telling([row]):
                    server.reset()
                    way = self.way(entry)
                    way.do("open", **way.job("stampede", server.base_url, at_once=self.scale.crowd))
                    found = way.do("crowd", calls=self.scale.crowd, identical=True)
                    if found["failed"] == self.scale.crowd:
                        raise CannotError(f"every call failed: {found['why']}")
                    row.values.append(float(server.stats(0)["received"]))
        return list(rows.values())

    def storm(self, name: str, purpose: str, title: str) -> list[Row]:
        """Failures, requests per success and wall time over the ideal at a server that refuses."""
        storm = next(one for one in STORMS if one.name == name)
        calls = min(storm.calls, self.scale.crowd)
        failed, asked = self.rows(f"{title}: failed", ""), self.rows(f"{title}: upstream per success", "")
        wall = self.rows(f"{title}: x ideal", "")
        limit = storm.limit or 0
        config = msgspec.structs.replace(storm.server(), any_model=True)
        told = {"rate": limit / storm.window_s, "burst": limit}
        ideal_s = max(0, calls - limit) * storm.window_s / limit + LATENCY_S
        with server_process(config) as server:
            for repeat in range(self.scale.storm_repeats):
                for entry in in_turn(self.entries, repeat):
                    own = [rows[entry.way] for rows in (failed, asked, wall)]
                    if _hopeless(own[0]):
                        continue
                    with _telling(own):
                        server.reset()
                        way = self.way(entry)
                        way.do("open", **way.job(purpose, server.base_url, **told))
                        found = way.do("crowd", calls=calls, identical=False)
                        succeeded = calls - found["failed"]
                        own[0].values.append(found["failed"])
                        if succeeded:
                            own[1].values.append(server.stats(0)["received"] / succeeded)
                        own[2].values.append(found["wall_s"] / ideal_s)
                        if found["failed"]:
                            own[2].skipped = "calls failed"
                        self.progress(f"{title}: {entry.way}: {_last(own)} {found['why']}")
        for row in wall.values():
            if row.skipped == "calls failed":  # whoever gives up is soon done
                row.values.clear()
        return [*failed.values(), *asked.values(), *wall.values()]

    def wrong_hits(self) -> list[Row]:
        """Questions answered with the answer to another one."""
        rows = self.rows(WRONG, "")
        for entry in self.entries:
            self.progress(f"probes: {entry.way}")
            with _telling([rows[entry.way]]):
                found = self.probes[entry.way] = probe(self.way(entry))
                rows[entry.way].values.append(float(sum(verdict == "WRONG" for verdict in found.values())))
        return list(rows.values())

    # ── weight ──────────────────────────────────────────────────────────────────────────────────────────────────

    def imports(self) -> list[Row]:
        """CPU and memory of a fresh interpreter after the import, less those of one without it."""
        cpu, memory = self.rows(IMPORT_S, "s"), self.rows(IMPORT_MB, "MB")
        environment = variables(str(self._scratch))
        # Once for each package: the first of its ways stands for it.
        firsts = {entry.peer.name: entry for entry in reversed(self.entries)}
        for entry in self.entries:
            if firsts[entry.peer.name] is not entry or not entry.peer.statement:
                cpu[entry.way].skipped = memory[entry.way].skipped = "as above"
        for repeat in range(-1, self.scale.repeats):  # the first time fills the page cache
            self.progress(f"imports: repeat {max(0, repeat) + 1} of {self.scale.repeats}")
            bare_s, bare_mb = import_cost(_INSIDE, sys.executable, environment)
            for entry in in_turn(self.entries, repeat):
                own = [cpu[entry.way], memory[entry.way]]
                if _hopeless(own[0]):
                    continue
                with _telling(own):
                    took_s, megabytes = import_cost(
                        _INSIDE + entry.peer.statement, self.environments.python(entry.peer), environment
                    )
                    if repeat >= 0:
                        own[0].values.append(took_s - bare_s)
                        own[1].values.append(megabytes - bare_mb)
        return [*cpu.values(), *memory.values()]

    def first_answers(self) -> list[Row]:
        """CPU and memory of a process when it has its first answer, less those of one that has asked nothing."""
        cpu, memory = self.rows(READY_S, "s"), self.rows(READY_MB, "MB")
        with fast_server.running() as url:
            for repeat in range(self.scale.repeats):
                self.progress(f"first answers: repeat {repeat + 1} of {self.scale.repeats}")
                for entry in in_turn(self.entries, repeat):
                    own = [cpu[entry.way], memory[entry.way]]
                    if _hopeless(own[0]):
                        continue
                    way = Way(entry, self.environments.python(entry.peer), self._scratch)  # a fresh one
                    with _telling(own), contextlib.closing(way):
                        before = way.do("usage")
                        try:
                            way.do("open", **way.job("uncached", url))
                        except CannotError:
                            way.do("open", **way.job("miss", url))
                        way.do("ask", prompt="hello", changes={})
                        after = way.do("usage")
                        own[0].values.append(after["cpu_s"] - before["cpu_s"])
                        own[1].values.append(after["rss_mb"] - before["rss_mb"])
        return [*cpu.values(), *memory.values()]

    def sizes(self, measured: dict[str, dict[str, float]]) -> list[Row]:
        """Megabytes and packages of a fresh environment."""
        size, packages = self.rows(SIZE, "MB"), self.rows(PACKAGES, "")
        for entry in self.entries:
            if not measured.get(entry.peer.name):
                size[entry.way].skipped = packages[entry.way].skipped = "no environment of its own"
            elif entry.peer.statement:
                size[entry.way].values.append(measured[entry.peer.name]["mb"])
                packages[entry.way].values.append(measured[entry.peer.name]["packages"])
            else:
                size[entry.way].skipped = packages[entry.way].skipped = "as above"
        return [*size.values(), *packages.values()]

    def versions(self) -> dict[str, str]:
        """Of every peer's packages."""
        firsts = {entry.peer.name: entry for entry in reversed(self.entries)}
        found = dict[str, str]()
        for entry in firsts.values():
            found |= self.way(entry).do("versions")
        return dict(sorted(found.items()))


@contextlib.contextmanager
def _telling(rows: Sequence[Row]) -> Generator[None]:
    """Whatever keeps a measurement from working is said in its rows."""
    try:
        yield
    except CannotError as error:
        for row in rows:
            row.skipped = str(error)
    except RuntimeError as error:
        for row in rows:
            row.skipped = f"{_FAILED}{' '.join(str(error).split())}"[:120]


def _hopeless(row: Row) -> bool:
    """Whether another repeat would find nothing either; what failed may have met a busy machine."""
    return bool(row.skipped) and not row.skipped.startswith(_FAILED)


def _stored(purpose: str, calls: int) -> int:
    """Requests that a cache needs to have every answer that `hits` asks for."""
    return 52 + 2 * calls if purpose == "disk" else 1


def _last(rows: Sequence[Row]) -> str:
    found = [f"{row.section.rpartition(': ')[2]} {row.values[-1]:.2f}" for row in rows if row.values]
    return ", ".join(found) or rows[0].skipped
