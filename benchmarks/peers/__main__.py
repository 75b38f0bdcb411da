"""llmmw beside its peers, in one run: `make bench-peers`, or `PYTHONPATH=benchmarks python -m peers --help`.

Every peer gets an environment of its own below .peers/ (made on the first run from pinned requirements; that needs the
package registry) and every way of using it a process of its own, which can reach nothing but this machine. Figures are
medians of interleaved repeats; CPU is that of the process, per call; ratios are to bare aiohttp, hits to a dict by
hand. Less is better in every column.

rows: memory, disk (hits) · uncached, miss (CPU per call at 1, 64, 256 and 1024 at once; without a cache, and with one
that never hits) · stampede · storm, small, defaults, told (a server that refuses; retries as patient as can be, the
retries that come with the peer, the rate told) · probes (wrong hits) · import, first (until the first answer), size
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Progress, Row, as_json, write_json
from overhead import draw

from peers import report
from peers import rows as at
from peers.environments import ROOT, Environments, NotInstalledError, pin
from peers.roster import PEERS
from peers.rows import Entry, Lab, Scale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peers.protocol import Peer

ROWS: dict[str, Callable[[Lab], list[Row]]] = {
    "memory": lambda lab: lab.hits("memory", at.MEMORY),
    "disk": lambda lab: lab.hits("disk", at.DISK),
    "uncached": lambda lab: lab.loads("uncached"),
    "miss": lambda lab: lab.loads("miss"),
    "stampede": lambda lab: lab.stampede(),
    "storm": lambda lab: lab.storm("large", "storm", report.STORM),
    "small": lambda lab: lab.storm("small", "storm", report.SMALL),
    "defaults": lambda lab: lab.storm("large", "defaults", report.DEFAULTS),
    "told": lambda lab: lab.storm("large", "told", report.TOLD),
    "probes": lambda lab: lab.wrong_hits(),
    "import": lambda lab: lab.imports(),
    "first": lambda lab: lab.first_answers(),
}
SIZE = "size"
FULL = Scale(repeats=3, storm_repeats=1, calls=512, levels=(1, 64, 256, 1024))
QUICK = Scale(repeats=1, storm_repeats=1, calls=64, levels=(1, 16), crowd=100)


def chosen(words: str | None) -> list[Peer]:
    """The peers that are named.

    Raises:
        SystemExit: a name is unknown.
    """
    if words is None:
        return list(PEERS)
    names = [word.strip() for word in words.split(",")]
    unknown = set(names) - {peer.name for peer in PEERS}
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))} (peers: {', '.join(peer.name for peer in PEERS)})")
    return [peer for peer in PEERS if peer.name in names]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PEER,...", help=f"of: {', '.join(peer.name for peer in PEERS)}")
    parser.add_argument("--rows", metavar="ROW,...", help=f"of: {', '.join([*ROWS, SIZE])}")
    parser.add_argument("--quick", action="store_true", help="one repeat, few calls: whether it works, not how fast")
    parser.add_argument("--repeats", type=int, help="of costs (3); medians are shown")
    parser.add_argument("--storm-repeats", type=int, help="of storms (1); medians are shown")
    parser.add_argument("--calls", type=int, help="per repeat of costs (512)")
    parser.add_argument("--levels", metavar="N,...", help="calls at once in uncached and miss (1,64,256,1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument(
        "--join", type=Path, metavar="FILE", action="append", help="begin with the rows of an earlier --json"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the figures (needs matplotlib)")
    parser.add_argument("--source", type=Path, default=ROOT, help="folder that holds the llmmw to measure")
    parser.add_argument("--in-place", action="store_true", help="no environments: what this interpreter has installed")
    parser.add_argument("--prepare", action="store_true", help="make the environments and end")
    parser.add_argument("--pin", action="store_true", help="compile the requirements anew and end")
    return parser.parse_args(arguments)


def _scale(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else FULL
    changes: dict[str, Any] = {
        "repeats": options.repeats,
        "storm_repeats": options.storm_repeats,
        "calls": options.calls,
    }
    if options.levels:
        changes["levels"] = tuple(map(int, options.levels.split(",")))
    return dataclasses.replace(scale, **{name: value for name, value in changes.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _options(arguments)
    peers = chosen(options.only)
    if options.pin:
        pin(peers)
        return 0
    wanted = options.rows.split(",") if options.rows else [] if options.join else [*ROWS, SIZE]
    unknown = set(wanted) - {*ROWS, SIZE}
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))} (rows: {', '.join([*ROWS, SIZE])})")
    progress = Progress()
    environments = Environments(options.source.resolve(), options.in_place)
    sizes, absent = dict[str, dict[str, float]](), dict[str, str]()
    for peer in peers:
        progress(f"environment: {peer.name}")
        try:
            sizes[peer.name] = environments.prepare(peer)
        except NotInstalledError as error:
            absent[peer.name] = str(error)
    if options.prepare:
        return 1 if absent else 0
    entries = [Entry(peer, way) for peer in peers if peer.name in sizes for way in peer.ways]
    found = Found(absent=absent, configured={way: _configured(peer, way) for peer in peers for way in peer.ways})
    for path in options.join or ():
        found.join(json.loads(path.read_text()))
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as scratch:
        lab = Lab(entries, environments, _scale(options), progress, Path(scratch))
        found.settings = {**dataclasses.asdict(lab.scale), "rows": wanted}
        try:
            if wanted:
                found.versions |= lab.versions()
            for name in wanted:
                found.add(lab.sizes(sizes) if name == SIZE else ROWS[name](lab))
                found.probes |= lab.probes
                found.write(options.json, progress)
        except KeyboardInterrupt:
            progress("interrupted: what there is")
            found.add([row for row in lab.begun if row.measured])
        finally:
            lab.close()
    found.outside |= lab.outside
    found.write(options.json, progress)
    print(found.text())
    if options.chart is not None:
        draw([row for row in found.rows if report.is_drawn(row)], options.chart)
    progress("done")
    return 0


@dataclasses.dataclass
class Found:
    """Everything that a run found, and earlier ones that were joined to it."""

    rows: list[Row] = dataclasses.field(default_factory=list[Row])
    probes: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict[str, dict[str, str]])
    versions: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    outside: dict[str, list[str]] = dataclasses.field(default_factory=dict[str, list[str]])
    absent: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    configured: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    settings: dict[str, object] = dataclasses.field(default_factory=dict[str, object])

    def add(self, rows: Sequence[Row]) -> None:
        """Rows of a section replace earlier ones of the same way; the table's order stays that of the peers."""
        fresh = {(row.section, row.name): row for row in rows}
        kept = [row for row in self.rows if (row.section, row.name) not in fresh]
        places = {way: place for place, way in enumerate(self.configured)}
        sections = list(dict.fromkeys(row.section for row in [*self.rows, *rows]))
        self.rows = sorted(
            [*kept, *rows], key=lambda row: (sections.index(row.section), places.get(row.name, len(places)))
        )
        report.set_goals(self.rows)

    def join(self, earlier: dict[str, Any]) -> None:
        """Add what an earlier run wrote."""
        for name in ("probes", "versions", "outside", "absent", "configured"):
            setattr(self, name, earlier[name] | getattr(self, name))
        self.add([report.row_from(row) for row in earlier["rows"]])

    def write(self, path: Path | None, progress: Progress) -> None:
        """As JSON; after each row, so that a run that is ended leaves what it has."""
        if path is not None:
            about = {name: value for name, value in vars(self).items() if name not in {"rows", "settings"}}
            write_json(path, as_json(self.rows, self.settings, progress.took_s) | about)

    def text(self) -> str:
        """The tables and what they come to."""
        told = {
            "Not installed": [f"{name}: {why}" for name, why in self.absent.items()],
            "Wrong hits": _probed(self.probes, "WRONG"),
            "Fields that are not passed on": _probed(self.probes, "not sent"),
            "Goals missed": report.missed(self.rows),
            "Where a peer is ahead": report.behind(self.rows),
            "Tried to reach another machine": [f"{way}: {', '.join(hosts)}" for way, hosts in self.outside.items()],
            "Versions": [", ".join(f"{name} {version}" for name, version in self.versions.items())],
        }
        parts = [f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in told.items() if lines]
        return "\n\n".join([report.tables(self.rows), *parts])


def _probed(probes: dict[str, dict[str, str]], verdict: str) -> list[str]:
    found = {way: [field for field, of in fields.items() if of == verdict] for way, fields in probes.items()}
    return [f"{way}: {', '.join(fields)}" for way, fields in found.items() if fields]


def _configured(peer: Peer, way: str) -> str:
    return " ".join((peer.ways[way].__doc__ or "").split())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # also where it was started in the background
    sys.exit(main())
