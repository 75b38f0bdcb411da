"""`python -m llmmw_mesa`: what would go wrong with Mesa-LLM on this machine, each with its cure."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from llmmw_mesa.checks import check


def main(arguments: list[str] | None = None) -> int:
    """Print the findings.

    Returns:
        0: no errors (warnings may have been printed); 1: errors, or with --strict warnings.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llmmw_mesa",
        description="Says what would break or slow a Mesa-LLM simulation on this machine, each with its cure. Asks no "
        "model and changes nothing. Ends with status 0 where there is no error, else with 1.",
    )
    parser.add_argument("--model", metavar="PROVIDER/NAME", help="the language model, to look for its API key")
    parser.add_argument("--api-base", metavar="URL", help="where it is asked")
    parser.add_argument("--strict", action="store_true", help="status 1 for warnings too")
    options = parser.parse_args(arguments)
    packages = ", ".join(f"{name} {version(name)}" for name in ("mesa-llm", "mesa", "litellm", "llmmw-mesa"))
    print(f"{packages}, Python {sys.version.partition(' ')[0]}")  # noqa: T201 — a command
    findings = check(llm_model=options.model, api_base=options.api_base)
    print(findings)  # noqa: T201 — as above
    return int(not findings.ok or (options.strict and bool(findings)))


if __name__ == "__main__":
    sys.exit(main())
