"""The benchmark of replicas runs anywhere and says what it found in one shape; how fast anything is, no test asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "replicas.py"


def test_every_way_is_measured_against_round_robin(tmp_path):
    target = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARK), "--servers", "2", "--callers", "3", "--turns", "1", "--repeats", "1"]
    command += ["--only", "agents"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "LLMMW"))}
    done = subprocess.run(
        [*command, "--json", str(target)], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert [row["way"] for row in found["rows"]] == ["round robin", "random", "two choices", "agent's own"]
    for row in found["rows"]:
        assert row["p99_ms"] >= row["p50_ms"] > 0
        assert row["way"] != "round robin" or row["x_p50_ms"] == row["x_p99_ms"] == row["x_wall_s"] == 1
        assert row["way"] in done.stdout
