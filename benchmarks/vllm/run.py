"""N questions in every shape against a real vLLM on this machine's CPU: `python benchmarks/vllm/run.py --help`.

The measuring is `llmmw bench`'s. What is added here: the servers (plain, and with the padded step: GPU-like step times,
figures *emulated*), and the in-process engine beside them as one more shape. All of it runs in vLLM's environment, so
that the engine is asked in turn with the server. Against another server, a GPU's for example, use `llmmw bench` itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "vllm_cpu"))

import server as vllm_cpu  # noqa: E402 — found by the line above

MODES = {"plain": "vLLM {}, tiny model on CPU", "padded": "vLLM {}, padded step (emulated)"}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODES), default=list(MODES), help="these servers only")
    parser.add_argument("--n", default="1,4,16,64,256", help="numbers of calls (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="waves of each kind (default %(default)s)")
    parser.add_argument("--shapes", default="all", help="as llmmw bench has them, and engine (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for vllm-plain.json, .png, ...")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a promise is broken")
    return parser.parse_args(arguments)


def measure(mode: str, options: argparse.Namespace) -> int:
    """One server, and a process in vLLM's environment that asks it; that process's exit status."""
    os.environ["STEP_PAD"] = "1" if mode == "padded" else "0"
    settings = vllm_cpu.Settings()
    with vllm_cpu.server(settings) as running:
        told = {
            "site-packages": sysconfig.get_paths()["purelib"],
            "base-url": running.url,
            "model-path": settings.model,
            "label": MODES[mode],
            "out": options.out / f"vllm-{mode}",
            "n": options.n,
            "shapes": options.shapes,
            "repeats": options.repeats,
            "max-tokens": options.max_tokens,
        }
        command = [settings.venv / "bin/python", "-W", "ignore", HERE / "child.py"]
        command += [f"--{name}={value}" for name, value in told.items()]
        environment = (
            os.environ | vllm_cpu.engine_environment() | {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "COLUMNS": "120"}
        )
        with running.log.with_name(f"bench-{mode}.log").open("w") as log:
            status = subprocess.run(command, env=environment, stderr=log, check=False).returncode
        if status > 1:
            vllm_cpu.say(vllm_cpu.tail(Path(log.name)))
        return status


def main(arguments: list[str] | None = None) -> int:
    """Every server in turn; the worst exit status."""
    options = options_of(arguments)
    vllm_cpu.SIGNALS.install()
    worst = 0
    try:
        for mode in options.only:
            status = measure(mode, options)
            worst = max(worst, status if options.check or status > 1 else 0)
    except vllm_cpu.ServerError as error:
        vllm_cpu.say(f"error: {error}")
        return 1
    except vllm_cpu.Stopped as stopped:
        return 128 + stopped.signum
    return worst


if __name__ == "__main__":
    sys.exit(main())
