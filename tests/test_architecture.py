"""The house's floors hold: nothing imports upward, and `import llmmw` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "llmmw"

FLOORS = (
    {"answer", "call", "context", "errors", "env", "events", "order", "settings"},
    {"algo", "codec", "fault", "interrupt", "keys", "stats", "stream", "wire"},
    {"pool", "stores"},
    {"endpoints", "layers"},
    {"engine", "stack"},
    {"edges", "offline", "sim"},
    {"testing", "demo", "bench"},
    {"cli", "__init__", "__main__"},
)
"""Bottom to top; a module may import from its own floor and from those below."""

EXCEPTIONS = {
    # `Stack.wrap` is how the function edge is offered; the import waits until it is called.
    ("stack", "edges"),
}


def floor_of(name: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if name in rooms:
            return level
    raise AssertionError(f"llmmw/{name} stands on no floor: add it to FLOORS in {__file__}")


def imported_rooms(path: Path) -> set[str]:
    """The first part below `llmmw.` of everything a module imports, wherever in the file."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llmmw.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "llmmw":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmmw."):
            rooms.add((node.module or "").split(".")[1])
    return rooms


def test_nothing_imports_upward():
    upward = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for room in imported_rooms(path):
            if room.startswith("_"):
                continue
            if floor_of(room) > floor_of(own) and (own, room) not in EXCEPTIONS:
                upward.append(f"{path.relative_to(ROOT.parent)} imports llmmw.{room}")
    assert upward == []


def test_no_module_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {str(path): count for path, count in lengths.items() if count > 320} == {}


def test_importing_llmmw_loads_no_http_library():
    heavy = ("aiohttp", "httpx", "httpx2", "diskcache", "anyio", "rich")
    code = f"import sys, llmmw; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
