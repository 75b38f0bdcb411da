"""Real Mesa-LLM agents: one by one, stock's parallel modes, and llmmw_mesa, side by side.

    make bench-mesa                                              # everything but vLLM (about 12 minutes)
    python integrations/mesa_llm/benchmarks/run.py --quick       # small sizes (about 2 minutes)
    make bench-mesa-vllm                                         # ReAct agents against a real vLLM on this CPU

    steps     a step of 3 to 100 ReAct agents, calls of 200-800 ms and of 50 ms (about 6 minutes)
    rate      20 agents where 30 requests a minute are admitted; a minute is 6 s unless --full
    sockets   descriptors over 100 steps
    sleeps    what pull request #264 of Mesa-LLM times
    examples  Mesa-LLM's own models, as they are
    trivial   what stepping costs when a step does nothing

The server is the embedded one in its own process; every way of stepping has a process too, in the environment that
`make test-integrations` makes, and ways take turns. The exit status is 1 when something that must hold does not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab import Lab, environments  # first: it says where the other modules are

# isort: split
import sections
import steps
import trivial
from measure import concluded
from run_tests import PAIRS

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTIONS = {
    "steps": steps.measure,
    "rate": sections.rate,
    "sockets": sections.sockets,
    "sleeps": sections.sleeps,
    "examples": sections.examples,
    "trivial": trivial.measure,
}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections only")
    parser.add_argument("--mesa-llm", choices=[pair.mesa_llm for pair in PAIRS], help="this Mesa-LLM only")
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps")
    parser.add_argument("--full", action="store_true", help="rate: real minutes (about 6 minutes more)")
    parser.add_argument("--vllm", action="store_true", help="only steps against the vLLM that LLMMW_VLLM_URL names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the steps (needs matplotlib)")
    return parser.parse_args(arguments)


def draw(lab: Lab, path: Path) -> None:
    """Seconds per step over the number of agents, one panel per profile of the newest Mesa-LLM."""
    import matplotlib as mpl  # noqa: PLC0415 — only for this

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 — as above

    rows = [row for row in lab.results if row["section"] == "steps" and row["version"] == lab.pairs[0].mesa_llm]
    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    figure, axes = plt.subplots(1, max(1, len(profiles)), figsize=(6 * max(1, len(profiles)), 4.5), squeeze=False)
    for axis, profile in zip(axes[0], profiles, strict=False):
        here = [row for row in rows if row["profile"] == profile]
        for way in dict.fromkeys(row["way"] for row in here):
            points = [(row["agents"], row["wall_s"]) for row in here if row["way"] == way]
            ours = way in {"overlap", "snapshot"}
            label = f"llmmw {way}" if ours else way
            axis.plot(*zip(*points, strict=True), "o-", label=label, linewidth=2.5 if ours else 1.2)
        axis.set(xscale="log", yscale="log", xlabel="agents", ylabel="seconds per step", title=f"calls: {profile}")
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _options(arguments)
    lab = Lab(environments(options.mesa_llm), quick=options.quick, full=options.full)
    if not lab.pairs:
        print("nothing to measure: no Mesa-LLM can be had here")
        return 0
    if options.vllm:
        steps.against_vllm(lab, os.environ["LLMMW_VLLM_URL"], os.environ["LLMMW_VLLM_MODEL"])
    else:
        for name in options.only:
            SECTIONS[name](lab)
    if options.chart is not None and any(row["section"] == "steps" for row in lab.results):
        draw(lab, options.chart)
    for text in lab.broken:
        print(f"BROKEN {text}")
    return concluded(lab.results, lab.broken, lab.progress, options.json)


if __name__ == "__main__":
    sys.exit(main())
