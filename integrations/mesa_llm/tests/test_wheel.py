"""What users install: this package, typed, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).parents[1]


def test_the_wheel_holds_this_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("llmmw_mesa-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    own = {
        str(path.relative_to(HERE / "src")) for path in (HERE / "src").rglob("*") if path.suffix in {".py", ".typed"}
    }
    assert {name for name in names if ".dist-info/" not in name} == own
    assert "llmmw_mesa/py.typed" in own
    requires = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert {name for name in requires if "extra" not in name} == {"llmmw", "mesa-llm>=0.2", "tenacity"}
    assert "file:" not in metadata
