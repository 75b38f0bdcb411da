"""`VLLMEngine` with the real package, which lives in an environment of its own: one child process runs all cases."""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".vllm"
CHILD = Path(__file__).with_name("engine_child.py")
CASES = [*re.findall(r"^(?:async )?def (case_\w+)", CHILD.read_text(), re.MULTILINE),
         *re.findall(r'^    check\("(case_\w+)"', CHILD.read_text(), re.MULTILINE)]  # fmt: skip
LIMIT_S = 1500

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(LIMIT_S + 60)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each case; the engine starts twice, 20 to 150 s each."""
    ours = sysconfig.get_paths()["purelib"]
    cache = STATE / "cache"
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    }
    log = tmp_path_factory.mktemp("vllm") / "engine.log"
    with log.open("w") as errors:
        ended = subprocess.run(
            [STATE / "venv/bin/python", "-W", "ignore", CHILD, STATE / "model", ours],
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"case"')]
    tail = f"the child ended with {ended.returncode}\n{ended.stdout[-3000:]}\n{log.read_text()[-6000:]}"
    return {line["case"]: line["problem"] for line in lines}, tail


@pytest.mark.parametrize("case", CASES)
def test_in_process(case, found):
    problems, tail = found
    assert case in problems, tail
    assert problems[case] is None, problems[case]
