"""Builds an environment for each Mesa-LLM that is supported, and runs the tests there: `make test-integrations`.

For each, side by side: this project's tests, then Mesa-LLM's own suite (from its source distribution) with `install()`
in force; every test that passes without it must pass with it. `--cover` measures this project's tests instead: the
branches of llmmw_mesa that no Mesa-LLM's run takes (programs in processes of their own are not measured).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
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
    """The exit status: 0 when everything that could run passed, and something could."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[pair.mesa_llm for pair in PAIRS], help="one Mesa-LLM only")
    parser.add_argument("--skip-upstream", action="store_true", help="not Mesa-LLM's own suite")
    parser.add_argument("--cover", action="store_true", help="branch coverage of this project's tests, all together")
    options = parser.parse_args()
    found = {pair: interpreter_of(pair.python) for pair in PAIRS if options.only in {None, pair.mesa_llm}}
    for pair, python in found.items():
        if python is None:
            say(pair, f"SKIPPED: no Python {pair.python} here (looked for python{pair.python}, also in pyenv)")
        else:
            prepare(pair, python)
    ready = [pair for pair, python in found.items() if python is not None]
    if not ready:
        print("nothing was tested: none of the interpreters is here", file=sys.stderr)
        return 1
    upstream = not (options.skip_upstream or options.cover)
    with ThreadPoolExecutor(len(ready)) as side_by_side:
        passed = all(list(side_by_side.map(lambda pair: passes(pair, upstream=upstream, cover=options.cover), ready)))
    if options.cover:
        report_of_coverage(ready)
    return int(not passed)


def say(pair: Pair, text: str) -> None:
    """A line, or several at once: the pairs are tested side by side."""
    sys.stdout.write("".join(f"mesa-llm {pair.mesa_llm}: {line}\n" for line in text.splitlines()))
    sys.stdout.flush()


def interpreter_of(version: str) -> str | None:
    """A Python of that version that starts."""
    candidates = [
        f"python{version}",
        sys.executable,
        *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
    ]
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
    say(pair, f"installing on Python {pair.python} ...")
    uv = str(Path(sys.executable).parent / "uv")
    run([uv, "venv", "-q", "--clear", "-p", python, str(pair.home)])
    into = ["--python", str(pair.interpreter)]
    run([uv, "pip", "install", "-q", "--compile-bytecode", *into, "--require-hashes", "-r", str(pair.requirements)])
    run([uv, "pip", "install", "-q", *into, "--no-deps", "--no-build-isolation", "-e", str(ROOT), "-e", str(HERE)])
    ready.write_text(wanted, encoding="utf-8")


def run(command: list[str]) -> None:
    """A step that must work."""
    subprocess.run(command, check=True)


def passes(pair: Pair, *, upstream: bool, cover: bool) -> bool:
    """Whether its tests pass: this project's, and Mesa-LLM's own."""
    source = sources(pair)  # this project's tests run its example models
    say(pair, f"this project's tests, on Python {pair.python} ...")
    measured = ("coverage", "run", "--branch", "--source=llmmw_mesa", f"--data-file={data_of(pair)}", "-m")
    told = pytest(pair, HERE, "-q", within=measured if cover else ())
    summary = re.findall(r"^(?:=+ )?\d+ passed.* in [\d.]+s.*$", told.stdout, re.MULTILINE)
    say(pair, told.stdout if told.returncode or not summary else summary[-1])
    passed = told.returncode == 0
    if upstream and source is None:
        say(pair, "SKIPPED its own suite: no source distribution can be had")
    elif upstream and source is not None:
        passed &= upstream_passes(pair, source)
    return passed


def data_of(pair: Pair) -> Path:
    """Where coverage keeps what it has seen."""
    return ENVIRONMENTS / f"coverage.{pair.mesa_llm}"


def report_of_coverage(pairs: list[Pair]) -> None:
    """What no Mesa-LLM's run has reached."""
    coverage = [str(pairs[-1].interpreter), "-m", "coverage"]
    data = f"--data-file={ENVIRONMENTS / 'coverage'}"
    run([*coverage, "combine", "-q", "--keep", data, *(str(data_of(pair)) for pair in pairs)])
    run([*coverage, "report", data, "--show-missing", "--skip-covered"])


def pytest(pair: Pair, place: Path, *options: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """How a run of tests ended."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": str(HERE / "tests")}
    command = [str(pair.interpreter), "-m", *within, "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def upstream_passes(pair: Pair, source: Path) -> bool:
    """Whether every test of Mesa-LLM's own that passes bare passes with `install()` too."""
    say(pair, "its own suite, with install() ...")
    own = ("-o", "addopts=", "-v", "-r", "fE", "--timeout", "120")
    told = pytest(pair, source, *own, "-p", "installed", "tests")
    passed, failed = outcomes(told.stdout)
    if not passed:
        say(pair, told.stdout)
        return False
    lost: set[str] = set()
    if failed:  # the others need not run bare: nothing can be lost
        lost = failed & outcomes(pytest(pair, source, *own, "tests").stdout)[0]
    say(pair, f"its own suite: {len(passed)} pass with install(), {len(failed) - len(lost)} fail bare as well")
    for name in sorted(lost):
        say(pair, f"LOST {name}")
    if lost:
        say(pair, told.stdout)
    return not lost


def outcomes(told: str) -> tuple[set[str], set[str]]:
    """Names of the tests that passed, and of those that did not."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR)", told, re.MULTILINE)
    failed = {name for name, outcome in found if outcome != "PASSED"}
    return {name for name, _ in found} - failed, failed


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


if __name__ == "__main__":
    sys.exit(main())
