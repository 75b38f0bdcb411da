"""The conformance scenarios once more on openai 2, the last one on httpx, which `make install` lays beside the venv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / ".venv-openai2"


@pytest.mark.skipif(openai.__version__.startswith("2."), reason="this is that run")
@pytest.mark.skipif(not OVERLAY.is_dir(), reason="openai 2 is not installed beside the venv: make install")
@pytest.mark.timeout(900)
def test_openai_2_behaves_as_without_llmmw():
    scenarios = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(scenarios), "-p", "no:cacheprovider", "-k", "openai-"]
    environment = {**os.environ, "PYTHONPATH": str(OVERLAY)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "openai 2." in done.stdout
