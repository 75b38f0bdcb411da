"""Builds an environment for each Mesa-LLM that is supported, and runs the tests there: `make test-integrations`.

For each: our own tests, then Mesa-LLM's own suite (from its source distribution) with `install()` in force; every
test that passes without it must pass with it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".mesa"


@dataclass(frozen=True)
class Pair:
    """A Mesa-LLM and the Python that it is tested on."""

    mesa_llm: str
    python: str

    @property
    def home(self) -> Path:
        """Its virtual environment."""
        return ENVIRONMENTS / f"mesa-llm-{self.mesa_llm}"

    @property
    def interpreter(self) -> Path:
        """The environment's Python."""
        return self.home / "bin" / "python"

    @property
    def requirements(self) -> Path:
        """Pinned packages."""
        return HERE / "requirements" / f"mesa-llm-{self.mesa_llm.rpartition('.')[0]}.txt"


PAIRS = (Pair("0.2.0", "3.11"), Pair("0.3.2", "3.12"))


def main() -> int:
    """The exit status: 0 when everything that could run passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[pair.mesa_llm for pair in PAIRS], help="one Mesa-LLM only")
    parser.add_argument("--skip-upstream", action="store_true", help="not Mesa-LLM's own suite")
    options = parser.parse_args()
    failed = False
    for pair in PAIRS:
        if options.only not in {None, pair.mesa_llm}:
            continue
        python = interpreter_of(pair.python)
        if python is None:
            print(f"SKIPPED mesa-llm {pair.mesa_llm}: no Python {pair.python} here (looked for python{pair.python})")
            continue
        prepare(pair, python)
        failed |= own_tests(pair) != 0
        if not options.skip_upstream:
            failed |= not upstream_passes(pair)
    return int(failed)


def interpreter_of(version: str) -> str | None:
    """A Python of that version that starts."""
    candidates = [f"python{version}", *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is None:
            continue
        asked = subprocess.run([found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
                               capture_output=True, text=True, check=False)  # fmt: skip
        if asked.stdout.strip() == version:
            return found
    return None


def prepare(pair: Pair, python: str) -> None:
    """Make the environment, unless it is there and its requirements have not changed."""
    ready = pair.home / ".ready"
    wanted = pair.requirements.read_text(encoding="utf-8")
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing mesa-llm {pair.mesa_llm} on Python {pair.python} ...", flush=True)
    uv = str(Path(sys.executable).parent / "uv")
    run([uv, "venv", "-q", "--clear", "-p", python, str(pair.home)])
    into = ["--python", str(pair.interpreter)]
    run([uv, "pip", "install", "-q", *into, "--require-hashes", "-r", str(pair.requirements)])
    run([uv, "pip", "install", "-q", *into, "--no-deps", "--no-build-isolation", "-e", str(ROOT), "-e", str(HERE)])
    ready.write_text(wanted, encoding="utf-8")


def run(command: list[str]) -> None:
    """A step that must work."""
    subprocess.run(command, check=True)


def own_tests(pair: Pair) -> int:
    """The exit status of this project's tests."""
    print(f"llmmw-mesa with mesa-llm {pair.mesa_llm} on Python {pair.python}", flush=True)
    return subprocess.run([str(pair.interpreter), "-m", "pytest", "-q"], cwd=HERE, check=False).returncode


def upstream_passes(pair: Pair) -> bool:
    """Whether every test of Mesa-LLM's own that passes bare passes with `install()` too."""
    source = sources(pair)
    if source is None:
        print(f"SKIPPED Mesa-LLM's own suite: no source distribution of {pair.mesa_llm} can be had")
        return True
    bare, installed = (passed(pair, source, plugin) for plugin in ([], ["-p", "installed"]))
    lost = sorted(bare - installed)
    print(f"Mesa-LLM {pair.mesa_llm}'s own suite: {len(bare)} pass bare, {len(bare & installed)} of them installed")
    for name in lost:
        print(f"  LOST {name}")
    return bool(bare) and not lost


def sources(pair: Pair) -> Path | None:
    """The unpacked source distribution, which carries the tests."""
    place = ENVIRONMENTS / "sources"
    found = place / f"mesa_llm-{pair.mesa_llm}"
    if not found.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run([str(pair.interpreter), "-m", "pip", "--version"], capture_output=True, check=False)
        if fetched.returncode:
            run([str(pair.interpreter), "-m", "ensurepip"])
        options = ["-q", "--no-deps", "--no-binary", "mesa-llm", "--no-build-isolation", "-d", str(place)]
        command = [str(pair.interpreter), "-m", "pip", "download", *options, f"mesa-llm=={pair.mesa_llm}"]
        if subprocess.run(command, check=False).returncode:
            return None
        with tarfile.open(place / f"mesa_llm-{pair.mesa_llm}.tar.gz") as archive:
            archive.extractall(place, filter="data")
    return found if (found / "tests").is_dir() else None


def passed(pair: Pair, source: Path, plugin: list[str]) -> set[str]:
    """Names of Mesa-LLM's tests that pass."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": str(HERE / "tests")}
    command = [
        str(pair.interpreter),
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-v",
        "-p",
        "no:cacheprovider",
        *plugin,
        "tests",
    ]
    told = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    return set(re.findall(r"^(\S+::.+?) PASSED", told.stdout, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())
