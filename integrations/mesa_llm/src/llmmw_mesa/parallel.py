"""`model.agents.shuffle_do("step")` and `do("step")` in parallel, on every kind of agent set this Mesa has.

Off unless asked for. What Mesa-LLM itself puts in the place of `shuffle_do` gives way meanwhile.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesa_llm import parallel_stepping as upstream

from llmmw import ConfigError
from llmmw_mesa.activation import waits
from llmmw_mesa.report import StepError
from llmmw_mesa.settings import check_settings
from llmmw_mesa.stepping import astep_agents, step_agents

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from llmmw_mesa.report import StepReport

_MISSING: Any = object()
_SIDE_BY_SIDE = 2
"""From so many under way at once something is parallel."""
_MODES = {"asyncio": "overlap", "threading": "overlap", "overlap": "overlap", "snapshot": "snapshot"}


class Patch:
    """An attribute of a class or module, replaced until it is taken back."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        self._before: Any = _MISSING

    def put(self) -> None:
        """Replace it."""
        self._before = self._owner.__dict__.get(self._name, _MISSING)
        setattr(self._owner, self._name, self._value)

    def take_back(self) -> bool:
        """Restore it, unless somebody else has replaced it since; whether it was."""
        if self._owner.__dict__.get(self._name) is not self._value:
            return False
        if self._before is _MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)
        return True

    def __str__(self) -> str:
        return f"{self._owner.__name__}.{self._name}"


@dataclass(frozen=True)
class _Wanted:
    """How sets of agents are to be stepped."""

    mode: Any
    max_concurrent: int | None
    request_timeout: float | None
    on_error: Any
    always: bool


class _State:
    """What is in force."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wanted: _Wanted | None = None
        self.patches: list[Patch] = []
        self.last: StepReport | None = None
        self.warned = False

    def set(self, wanted: _Wanted | None) -> None:
        """Put the patches when the first is wanted, take them back when none is."""
        with self.lock:
            if wanted is not None and not self.patches:
                self.patches = _patches()
                for patch in self.patches:
                    patch.put()
            self.wanted = wanted
            self.warned = False
            if wanted is None:
                for patch in reversed(self.patches):
                    patch.take_back()
                self.patches = []


_state = _State()


def agent_set_classes() -> list[type]:
    """Every class of this Mesa that has a `shuffle_do` of its own."""
    places = [importlib.import_module("mesa.agent")]
    if importlib.util.find_spec("mesa.agentset") is not None:  # since Mesa 3.4
        places.append(importlib.import_module("mesa.agentset"))
    found: dict[type, None] = {}
    for place in places:
        for value in vars(place).values():
            own = value.__dict__.get("shuffle_do") if isinstance(value, type) else None
            if own is not None and not getattr(own, "__isabstractmethod__", False):
                found[value] = None
    return list(found)


def enable_automatic_parallel_stepping(
    mode: str = "asyncio",
    max_concurrent: int | None = 10,
    request_timeout: float | None = None,
    *,
    on_error: str = "raise",
    always: bool = False,
) -> None:
    """From now on `shuffle_do("step")` and `do("step")` step agents side by side, where their model asks for it.

    It does with `parallel_stepping = True`. `await agents.do_async("astep")` is then the same for async code. Called
    again, the new values hold.

    Args:
        mode: "asyncio", "threading" or "overlap" (the same: agents with an `astep` overlap on a loop, others on
            threads), or "snapshot".
        max_concurrent: steps under way at once; None: all.
        request_timeout: seconds per agent's step, waiting for a rate limit included; None: as long as it takes.
        on_error: as for `step_agents`.
        always: also for models that did not ask for it, where agents have something to wait for.

    Raises:
        ConfigError: a value that cannot work.
    """
    if mode not in _MODES:
        raise ConfigError(f"mode={mode!r}: must be one of {', '.join(_MODES)}")
    wanted = _Wanted(_MODES[mode], max_concurrent, request_timeout, on_error, always)
    check_settings(wanted.mode, "shuffle", wanted.on_error, request_timeout, max_concurrent)
    _state.set(wanted)


def disable_automatic_parallel_stepping() -> None:
    """Restore what was there before. Idempotent."""
    _state.set(None)


def remembered() -> Callable[[], None]:
    """What steps agents again as they are stepped now."""
    before = _state.wanted
    return lambda: _state.set(before)


def is_enabled() -> bool:
    """Whether agents are stepped in parallel, where that is asked for."""
    return _state.wanted is not None


def last_report() -> StepReport | None:
    """Of the latest `shuffle_do("step")` or `do("step")` that ran in parallel, also where it raised a StepError."""
    return _state.last


def _patches() -> list[Patch]:
    found: list[Patch] = []
    for owner in agent_set_classes():
        mesas = upstream._original_shuffle_do if owner is upstream.AgentSet else owner.__dict__["shuffle_do"]  # noqa: SLF001 — Mesa-LLM has no public name for it
        shuffled = _plain(mesas, "shuffle")
        found.append(Patch(owner, "shuffle_do", shuffled))
        if "do" in owner.__dict__:
            found.append(Patch(owner, "do", _plain(owner.__dict__["do"], "given")))
        found.append(Patch(owner, "do_async", _awaited(getattr(owner, "do_async", upstream._agentset_do_async))))  # noqa: SLF001 — as below
        if owner is upstream.AgentSet:
            # What Mesa-LLM puts there when its own stepping is switched on or off meanwhile, as example models do.
            found += [Patch(upstream, name, shuffled) for name in ("_enhanced_shuffle_do", "_original_shuffle_do")]
    return found


def _plain(before: Any, order: Any) -> Any:
    def stepped(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of each agent; steps may overlap (llmmw_mesa)."""
        wanted = _wanted_by(self, method, "step", args, kwargs)
        if wanted is None:
            before(self, method, *args, **kwargs)
        else:
            with _Noted(self, wanted) as noted:
                noted.report = step_agents(
                    self, wanted.mode, order, wanted.on_error, wanted.request_timeout, wanted.max_concurrent
                )
        return self

    return stepped


def _awaited(before: Any) -> Any:
    def do_async(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Await a method of each agent; steps are looked after (llmmw_mesa)."""
        wanted = _wanted_by(self, method, "astep", args, kwargs)
        return before(self, method, *args, **kwargs) if wanted is None else _stepped(self, wanted)

    return do_async


async def _stepped(agents: Any, wanted: _Wanted) -> list[None]:
    with _Noted(agents, wanted) as noted:
        noted.report = await astep_agents(
            agents, wanted.mode, "given", wanted.on_error, wanted.request_timeout, wanted.max_concurrent
        )
    return [None] * len(noted.report)


def _wanted_by(agents: Any, method: Any, name: str, args: Any, kwargs: Any) -> _Wanted | None:
    """How these are to be stepped, if they are."""
    wanted = _state.wanted
    if wanted is None or method != name or args or kwargs:
        return None
    if wanted.always:
        return wanted if any(waits(agent) for agent in agents) else None
    first = next(iter(agents), None)
    return wanted if getattr(getattr(first, "model", None), "parallel_stepping", False) else None


class _Noted:
    """Remembers the report, and says so, once, when nothing was parallel about the step."""

    def __init__(self, agents: Any, wanted: _Wanted) -> None:
        self._agents = agents
        self._wanted = wanted
        self.report: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        report: StepReport | None = error.report if isinstance(error, StepError) else self.report
        if report is None:
            return
        _state.last = report
        if _state.warned or self._wanted.max_concurrent == 1 or len(report) < _SIDE_BY_SIDE:
            return
        if report.most_at_once < _SIDE_BY_SIDE and any(waits(result.agent) for result in report):
            what = "no two steps were ever under way at once: do the steps wait for anything?"
        elif report.calls > 1 and report.most_calls_at_once < _SIDE_BY_SIDE < len(report):
            what = "no two calls were ever under way at once: does something make the agents wait for each other?"
        else:
            return
        _state.warned = True
        warnings.warn(f"parallel stepping was asked for, but {what}", RuntimeWarning, stacklevel=4)
