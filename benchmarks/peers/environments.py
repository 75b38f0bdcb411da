"""Each peer's own environment, below `.peers/`: made from pinned requirements, measured when it is fresh."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peers.protocol import Peer

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
REQUIREMENTS = Path(__file__).parent / "requirements"
HOME = ROOT / ".peers"
_OURS = {"llmmw": (), "llmmw_sdk": ("--extra", "httpx2", str(REQUIREMENTS / "llmmw_sdk.in"))}
"""Environments whose requirements come from pyproject.toml, with what is added."""


class NotInstalledError(Exception):
    """A peer that does not install; the message says why."""


@dataclass(frozen=True)
class Environments:
    """Where the peers live.

    Attributes:
        source: the folder that holds the llmmw to measure; copied, so that it may change meanwhile.
        in_place: use this interpreter for every peer, make nothing: what it has installed can be measured.
    """

    source: Path = ROOT
    in_place: bool = False

    def python(self, peer: Peer) -> str:
        """The peer's interpreter."""
        return sys.executable if self.in_place else str(_folder(peer) / "bin" / "python")

    def prepare(self, peer: Peer) -> dict[str, float]:
        """Make the environment unless it is there; the size of a fresh one: "mb" and "packages" (in place: nothing).

        Raises:
            NotInstalledError: it cannot be made.
        """
        if self.in_place:
            return {}
        target, wanted = _folder(peer), _fingerprint(peer)
        ready = target / "ready.json"
        known: dict[str, Any] = json.loads(ready.read_text()) if ready.is_file() else {}
        if known.get("requirements") != wanted:
            shutil.rmtree(target, ignore_errors=True)
            _uv("venv", "-q", "--python", sys.executable, str(target))
            self._install(peer, peer.environment or peer.name)
            known = {"requirements": wanted, "size": _size(_packages(peer))}
            if peer.beside:
                self._install(peer, peer.beside)
            ready.write_text(json.dumps(known))
        size: dict[str, float] = known["size"]
        return self._with_llmmw(peer, size) if peer.ours else size

    def _install(self, peer: Peer, name: str) -> None:
        listed = str(REQUIREMENTS / f"{name}.txt")
        _uv("pip", "install", "-q", "--python", self.python(peer), "--compile-bytecode", "-r", listed)

    def _with_llmmw(self, peer: Peer, size: dict[str, float]) -> dict[str, float]:
        copy, package = _packages(peer) / "llmmw", self.source / "llmmw"
        if _texts(copy) != _texts(package):  # else another run may be using it
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
            compiled = [self.python(peer), "-m", "compileall", "-q", str(copy)]
            subprocess.run(compiled, check=True, capture_output=True)
        return {"mb": size["mb"] + _size(copy)["mb"], "packages": size["packages"] + 1}


def variables(scratch: str) -> dict[str, str]:
    """All variables of a peer's process: telemetry off, no proxies, no keys, files below `scratch`."""
    return {
        "PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch, "PYTHONPATH": str(BENCHMARKS),
        "DO_NOT_TRACK": "1", "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false", "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",  # GPTCache installs what it misses
        "LC_ALL": "C.UTF-8",
    }  # fmt: skip


def _folder(peer: Peer) -> Path:
    return HOME / (peer.environment or peer.name)


def _packages(peer: Peer) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return _folder(peer) / "lib" / version / "site-packages"


def _size(place: Path) -> dict[str, float]:
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    own = list(place.glob("*.dist-info"))
    return {"mb": sum(path.stat().st_size for path in files) / 1e6, "packages": len(own)}


def _texts(package: Path) -> dict[str, bytes]:
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def _fingerprint(peer: Peer) -> str:
    names = [peer.environment or peer.name, peer.beside]
    texts = [(REQUIREMENTS / f"{name}.txt").read_text() for name in names if name]
    return hashlib.sha256("\0".join([sys.version, *texts]).encode()).hexdigest()


def _uv(*arguments: str) -> None:
    command = [str(Path(sys.executable).parent / "uv"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotInstalledError(f"does not install: {lines[-1].strip()}")


def pin(peers: Sequence[Peer]) -> None:
    """Compile each peer's `.in` (llmmw's: pyproject.toml) into pinned versions.

    Raises:
        NotInstalledError: a peer cannot be resolved.
    """
    for peer in peers:
        if peer.environment:
            continue
        given = [str(REQUIREMENTS / f"{peer.name}.in")]
        if peer.name in _OURS:
            given = [str(ROOT / "pyproject.toml"), *_OURS[peer.name]]
        options = ["-q", "--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--upgrade"]
        _uv("pip", "compile", *options, "-o", str(REQUIREMENTS / f"{peer.name}.txt"), *given)
