"""What an import costs: CPU seconds and memory of a fresh interpreter, less those of one that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

IMPORTS = {
    "import llmmw": "import llmmw",
    "from llmmw import Client": "from llmmw import Client",
    "llmmw Client and aiohttp, which its first call loads": "from llmmw import Client\nimport aiohttp",
    "llmmw, every public name": "import llmmw\nfor name in llmmw.__all__: getattr(llmmw, name, None)",
    "import aiohttp": "import aiohttp",
    "import httpx": "import httpx",
    "import openai": "import openai",
}
BARE = "bare interpreter"

_REPORT = """
import sys, time
cpu = time.process_time()
try:
    with open("/proc/self/status") as status:
        kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
except OSError:
    import resource
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print(cpu, kilobytes / 1024)
"""


def import_cost(
    statement: str = "", python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> tuple[float, float]:
    """CPU seconds and MB of a fresh interpreter after running the statement.

    Args:
        statement: Python source.
        python: the interpreter.
        environment: all its variables; None: those of this process.

    Raises:
        RuntimeError: the statement failed; the message is the last line of the traceback.
    """
    command = [python, "-W", "ignore", "-c", f"{statement}\n{_REPORT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    cpu_s, megabytes = done.stdout.split()
    return float(cpu_s), float(megabytes)
