"""`model.agents.shuffle_do("step")` in parallel, on every kind of agent set this Mesa has; off unless asked for."""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from typing import TYPE_CHECKING, Any

from llmmw import ConfigError
from llmmw_mesa.stepping import step_agents

if TYPE_CHECKING:
    from llmmw_mesa.report import StepReport

_MISSING: Any = object()
_MODES = {"asyncio": "overlap", "threading": "overlap", "overlap": "overlap", "snapshot": "snapshot"}
_lock = threading.RLock()


class Patch:
    """An attribute of a class, replaced until it is taken back."""

    def __init__(self, owner: type, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        self._before: Any = _MISSING

    def put(self) -> None:
        """Replace it."""
        self._before = self._owner.__dict__.get(self._name, _MISSING)
        setattr(self._owner, self._name, self._value)

    def take_back(self) -> None:
        """Restore it, unless somebody else has replaced it since."""
        if self._owner.__dict__.get(self._name) is not self._value:
            return
        if self._before is _MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)


class _Stepping:
    """How sets of agents are stepped now."""

    def __init__(self) -> None:
        self.mode = "overlap"
        self.max_concurrent: int | None = None
        self.request_timeout: float | None = None
        self.on_error = "raise"
        self.always = False
        self.patches: list[Patch] = []
        self.depth = 0
        self.last: StepReport | None = None
        self.warned = False


_stepping = _Stepping()


def agent_set_classes() -> list[type]:
    """Every class of this Mesa that has a `shuffle_do` of its own."""
    places = [importlib.import_module("mesa.agent")]
    if importlib.util.find_spec("mesa.agentset") is not None:  # since Mesa 3.4
        places.append(importlib.import_module("mesa.agentset"))
    found: list[type] = []
    for place in places:
        for value in vars(place).values():
            concrete = isinstance(value, type) and "shuffle_do" in value.__dict__
            if (
                concrete
                and not getattr(value.__dict__["shuffle_do"], "__isabstractmethod__", False)
                and value not in found
            ):
                found.append(value)
    return found


def enable_automatic_parallel_stepping(
    mode: str = "asyncio",
    max_concurrent: int | None = 10,
    request_timeout: float | None = None,
    *,
    on_error: str = "raise",
    always: bool = False,
) -> None:
    """From now on `shuffle_do("step")` steps the agents of models with `parallel_stepping = True` side by side.

    Args:
        mode: "asyncio", "threading" or "overlap" (the same: agents with an `astep` overlap on a loop, others on
            threads), or "snapshot".
        max_concurrent: steps under way at once; None: all.
        request_timeout: seconds per agent's step.
        on_error: as for `step_agents`.
        always: also for models that did not ask for it.

    Raises:
        ConfigError: a mode that there is not.
    """
    if mode not in _MODES:
        raise ConfigError(f"mode={mode!r}: must be one of {', '.join(_MODES)}")
    with _lock:
        _stepping.mode, _stepping.max_concurrent = _MODES[mode], max_concurrent
        _stepping.request_timeout, _stepping.on_error, _stepping.always = request_timeout, on_error, always
        _stepping.depth += 1
        if _stepping.depth == 1:
            _stepping.patches = [
                Patch(owner, "shuffle_do", _parallel(owner.__dict__["shuffle_do"])) for owner in agent_set_classes()
            ]
            for patch in _stepping.patches:
                patch.put()


def disable_automatic_parallel_stepping() -> None:
    """Restore `shuffle_do`. Idempotent."""
    with _lock:
        if not _stepping.depth:
            return
        _stepping.depth = 0
        _stepping.always = False
        for patch in reversed(_stepping.patches):
            patch.take_back()
        _stepping.patches = []


def last_report() -> StepReport | None:
    """Of the latest `shuffle_do("step")` that ran in parallel."""
    return _stepping.last


def _parallel(before: Any) -> Any:
    def shuffle_do(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Shuffle the agents and call a method of each; steps may overlap (llmmw_mesa)."""
        if method != "step" or args or kwargs or not len(self) or not _is_wanted(self):
            return before(self, method, *args, **kwargs)
        report = step_agents(
            self,
            mode=_stepping.mode,  # type: ignore[arg-type]  # — checked when it was set
            on_error=_stepping.on_error,  # type: ignore[arg-type]  # — as above
            timeout=_stepping.request_timeout,
            max_concurrency=_stepping.max_concurrent,
        )
        _stepping.last = report
        if len(report) > 1 >= report.most_at_once and _stepping.max_concurrent != 1 and not _stepping.warned:
            _stepping.warned = True
            warnings.warn(
                "parallel stepping was asked for, but no two steps were ever under way at once: "
                "do the steps wait for anything?",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    return shuffle_do


def _is_wanted(agents: Any) -> bool:
    first = next(iter(agents))
    return _stepping.always or bool(getattr(getattr(first, "model", None), "parallel_stepping", False))
