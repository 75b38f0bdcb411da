"""`check()`: what would go wrong in this process, found before the first step, each with its cure."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import mesa
import mesa_llm
from mesa_llm import parallel_stepping

from llmmw.env import disabled
from llmmw.pool.guard import is_loopback
from llmmw.settings import seconds
from llmmw_mesa.asking import Installed
from llmmw_mesa.installing import is_installed, unknown_signature
from llmmw_mesa.parallel import is_enabled
from llmmw_mesa.surveys import Survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DESCRIPTORS_WANTED = 1024
_COST_MAP = "litellm.litellm_core_utils.get_model_cost_map"
_CROWD = 20
"""From so many agents that see all others on, each prompt carries kilobytes about them (91 kB for 40 agents)."""
_CALLS_PER_STEP = 2
"""Of each agent: what to do, and with which tool."""


@dataclass(frozen=True)
class Finding:
    """Something to see to."""

    id: str
    severity: Literal["error", "warning"]
    """An error ends the simulation; with a warning it runs, but slowly, blindly or not as meant."""
    problem: str
    cure: str

    @property
    def message(self) -> str:
        """What is wrong, and what to do."""
        return f"{self.problem}. Cure: {self.cure}"

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.id}]"


class Findings(tuple[Finding, ...]):
    """All of them, errors first; printing it prints one a line."""

    __slots__ = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be there."""
        return not any(finding.severity == "error" for finding in self)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "llmmw-mesa: nothing to see to"


def check(model: Any = None, *, llm_model: str | None = None, api_base: str | None = None) -> Findings:
    """Look for what breaks or slows simulations with LLM agents here. Asks nobody and changes nothing.

    Call it where the simulation is about to run, inside `install()` if that is used.

    Args:
        model: a Mesa model: its agents, their language models and its `parallel_stepping` are looked at too.
        llm_model: a language model, as "provider/name", that is going to be used.
        api_base: where.

    Returns:
        The findings, empty when all is well.
    """
    survey = Survey(model, llm_model, api_base)
    found = [finding for look in _LOOKS for finding in look(survey)]
    return Findings(sorted(found, key=lambda finding: finding.severity))


def _signatures(_: Survey) -> Iterator[Finding]:
    if (problem := unknown_signature()) is not None:
        yield Finding("signatures", "error", problem, "use Mesa-LLM 0.2 or 0.3, or a newer llmmw-mesa")


def _tools(_: Survey) -> Iterator[Finding]:
    if importlib.util.find_spec("mcp") is None:
        yield Finding(
            "mcp",
            "error",
            "the package `mcp` is missing: LiteLLM imports it for every call with tools, and all of Mesa-LLM's "
            "reasonings make such; Mesa-LLM repeats such a call for ever",
            'pip install mcp, or pip install "llmmw-mesa[tools]"',
        )


def _names(survey: Survey) -> Iterator[Finding]:
    for name in survey.llm_models:
        provider, slash, _ = name.partition("/")
        if not slash:
            yield Finding(
                "model-name",
                "error",
                f"the language model {name!r} names no provider, so Mesa-LLM cannot tell whose API key it needs",
                f'write "provider/{name}", e.g. "openai/{name}" for anything that speaks OpenAI\'s API',
            )
        elif provider.upper() not in {"OLLAMA", "OLLAMA_CHAT"} and not os.environ.get(f"{provider.upper()}_API_KEY"):
            variable = f"{provider.upper()}_API_KEY"
            yield Finding(
                "api-key",
                "error",
                f"{variable} is not set, and Mesa-LLM makes no agent for {name!r} without it",
                f"export {variable}=..., or put it into a file named .env; a server that wants no key takes any text",
            )


def _bases(survey: Survey) -> Iterator[Finding]:
    for base in survey.api_bases:
        url = urlsplit(base)
        if url.scheme not in {"http", "https"} or not url.hostname:
            yield Finding(
                "api-base",
                "error",
                f"api_base={base!r} is no address",
                'write it as "http://127.0.0.1:8000/v1"',
            )
        elif is_loopback(url.hostname) and url.scheme in getproxies() and not proxy_bypass(url.hostname):
            yield Finding(
                "proxy",
                "warning",
                f"{base} is on this machine, but {url.scheme}_proxy is set: calls may go through the proxy, which "
                "does not know this machine's ports",
                f"export NO_PROXY=127.0.0.1,localhost,{url.hostname}",
            )


def _not_installed(survey: Survey) -> Iterator[Finding]:
    if is_installed() or not survey.stock_modules:
        return
    yield Finding(
        "not-installed",
        "warning",
        f"{survey.stock_modules} ModuleLLMs of this model are Mesa-LLM's own: a 429 that stays is asked again for "
        "ever, a 500 ends the run, a call may hang for 6000 s, and every step opens sockets that nobody closes",
        "run it inside `with llmmw_mesa.install():`",
    )
    if not survey.async_base and any(base != "http://localhost:11434" for base in survey.stock_bases):
        yield Finding(
            "api-base-ignored",
            "error",
            f"Mesa-LLM {mesa_llm.__version__}'s agenerate() ignores api_base: parallel steps would ask the "
            f"provider's own servers, not {', '.join(survey.stock_bases)}",
            "run it inside `with llmmw_mesa.install():`, which passes it on",
        )


def _switched_off(_: Survey) -> Iterator[Finding]:
    if disabled():
        yield Finding(
            "disabled",
            "warning",
            f"LLMMW_DISABLE={os.environ.get('LLMMW_DISABLE')!r} is set: no cache, no limit, no repetition",
            "unset LLMMW_DISABLE",
        )


def _parallel(survey: Survey) -> Iterator[Finding]:
    """Where parallel stepping was asked for and does not happen."""
    if not survey.wants_parallel or is_enabled():
        return
    cure = (
        'run it inside `with llmmw_mesa.install(parallel="overlap"):`, or step with '
        "llmmw_mesa.step_agents(model.agents)"
    )
    if not survey.stock_parallel:
        yield Finding(
            "parallel",
            "warning",
            f"parallel_stepping is set, but Mesa {mesa.__version__} keeps agents in a {survey.agent_set}, whose "
            "shuffle_do Mesa-LLM does not replace: steps run one after another, and nobody says so",
            cure,
        )
    elif _stock_mode() == "threading":
        usual = min(32, (os.cpu_count() or 1) + 4)
        if survey.count > usual:
            yield Finding(
                "threads",
                "warning",
                f"Mesa-LLM's threading mode steps at most {usual} agents at once here (processors + 4) of "
                f"{survey.count}",
                cure,
            )
    elif survey.sync_only:
        kinds = ", ".join(sorted({type(agent).__name__ for agent in survey.sync_only}))
        yield Finding(
            "sync-steps",
            "warning",
            f"parallel_stepping is set, but {len(survey.sync_only)} agents ({kinds}) have no astep() of their own: in "
            "Mesa-LLM's asyncio mode their steps run one after another and hold up everybody else's",
            f"{cure}, which give such agents threads",
        )


def _stock_mode() -> str:
    return str(getattr(parallel_stepping, "_PARALLEL_STEPPING_MODE", ""))


def _deadline(survey: Survey) -> Iterator[Finding]:
    options = Installed.options
    if not is_installed() or options.rpm is None or options.stack is not None:
        return
    needed = 60 * _CALLS_PER_STEP * survey.llm_agents / options.rpm
    deadline = seconds("deadline", options.deadline)
    if needed > deadline:
        yield Finding(
            "deadline",
            "warning",
            f"{survey.llm_agents} agents make about {_CALLS_PER_STEP * survey.llm_agents} calls per step, which "
            f"rpm={options.rpm} lets pass in {needed:.0f} s: where all step at once, the last run into "
            f"deadline={deadline:.0f} s",
            f"install(rpm={options.rpm}, deadline={2 * needed:.0f}), or step fewer at once",
        )


def _crowds(survey: Survey) -> Iterator[Finding]:
    if survey.all_seeing >= _CROWD:
        yield Finding(
            "vision",
            "warning",
            f"{survey.all_seeing} agents have vision=-1: every prompt describes every other agent, so the tokens of a "
            "step grow with the square of their number",
            "give them a radius, e.g. vision=5",
        )
    if survey.episodic:
        yield Finding(
            "episodic",
            "warning",
            f"{survey.episodic} agents have an EpisodicMemory: it asks the language model once for every event, "
            "messages received included (10 agents that tell 10: 90 calls more)",
            "use ShortTermMemory or STLTMemory, or install(enable_caching=True, max_concurrency=...)",
        )


def _descriptors(_: Survey) -> Iterator[Finding]:
    try:
        import resource  # noqa: PLC0415 — not on Windows
    except ImportError:
        return
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _DESCRIPTORS_WANTED and soft != resource.RLIM_INFINITY:
        yield Finding(
            "descriptors",
            "warning",
            f"this process may open {soft} files and sockets; Mesa-LLM alone opens one per agent and parallel step and "
            "closes none, and install() one per call under way",
            f"ulimit -n {_DESCRIPTORS_WANTED}, and install(max_concurrency={max(1, soft // 4)}) or less",
        )


def _prices(_: Survey) -> Iterator[Finding]:
    told = getattr(sys.modules.get(_COST_MAP), "get_model_cost_map_source_info", None)  # not in every LiteLLM
    if told is not None and (reason := told().get("fallback_reason")):
        yield Finding(
            "cost-map",
            "warning",
            f"LiteLLM fetches its table of models and prices from the internet when it is imported, which failed and "
            f"cost seconds ({str(reason)[:200]})",
            "export LITELLM_LOCAL_MODEL_COST_MAP=True before Python starts",
        )


def _stopped(survey: Survey) -> Iterator[Finding]:
    if survey.stopped:
        yield Finding(
            "stopped",
            "error",
            f"a step of this model has raised, and Mesa {mesa.__version__} never steps such a model again: step() "
            "returns at once and says nothing",
            'make a new model; let steps not raise: step_agents(..., on_error="skip"), or catch StepError inside '
            "the model's step()",
        )


_LOOKS: tuple[Callable[[Survey], Iterator[Finding]], ...] = (
    _signatures, _tools, _names, _bases, _stopped, _not_installed, _switched_off, _parallel, _deadline, _crowds,
    _descriptors, _prices,
)  # fmt: skip
