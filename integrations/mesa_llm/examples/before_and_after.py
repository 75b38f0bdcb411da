"""The town on Mesa-LLM as it is, and on llmmw, both against the embedded model server (no key, no network).

python examples/before_and_after.py --residents 10 --steps 3
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM fetches it from the internet otherwise
os.environ["OPENAI_API_KEY"] = "sk-any"  # the embedded server takes any

import town
from llmmw_mesa import check, close_all, global_stats, install

from llmmw.testing.server import ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.testing.server import ServerProcess


def before(residents: int, steps: int) -> None:
    """Mesa-LLM as it is."""
    model = town.Town(residents)
    for _ in range(steps):
        model.step()


def after(residents: int, steps: int) -> None:
    """The same, with one line around it."""
    with install(parallel="overlap"):
        before(residents, steps)


def measured(server: ServerProcess, run: Callable[[int, int], None], residents: int, steps: int) -> float:
    """Run it, print a line, and return the seconds."""
    server.reset()
    began = time.perf_counter()
    run(residents, steps)
    took = time.perf_counter() - began
    told = server.stats(0)
    print(f"{run.__name__:8}{took:8.1f} s{told['received']:10} requests{told['peak_in_flight']:6} at once")
    return took


def main() -> None:
    """Run both and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residents", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds the server takes, on average")
    options = parser.parse_args()
    # A space in what an agent intends makes this server call a tool: it understands nothing of the words.
    config = ServerConfig(
        any_model=True, tool_marker=" ", latency="fixed", latency_s=options.latency, latency_spread=0.6
    )
    with server_process(config) as server:
        os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_API_BASE"] = server.base_url
        print(check(town.Town(options.residents)))
        first, second = (measured(server, run, options.residents, options.steps) for run in (before, after))
        print(f"{first / second:.1f} x faster")
        print(global_stats().to_frame()[["request_count", "upstream_requests", "errors", "tokens_in"]])
        close_all()


if __name__ == "__main__":
    main()
