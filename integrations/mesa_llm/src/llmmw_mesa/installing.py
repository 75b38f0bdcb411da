"""`install()`: every ModuleLLM of the process, whoever made it, goes through llmmw. `uninstall()` undoes it.

Mesa-LLM's class gets other methods; its objects, its constructor, subclasses and what is imported stay as they are.
Importing this package patches nothing.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mesa_llm.llm_agent
import mesa_llm.module_llm as upstream

from llmmw import ConfigError
from llmmw_mesa import acting
from llmmw_mesa.asking import Installed
from llmmw_mesa.module import METHODS
from llmmw_mesa.options import Options
from llmmw_mesa.parallel import Patch, enable_automatic_parallel_stepping, remembered

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from llmmw import Stack

Parallel = Literal["off", "overlap", "snapshot"]

_KNOWN = {
    "__init__": (("self", "llm_model", "api_base", "system_prompt"), ("max_retries",)),
    "generate": (
        ("self", "prompt", "tool_schema", "tool_choice", "response_format"),
        ("system_prompt", "suppress_thinking"),
    ),
}
_KNOWN["agenerate"] = _KNOWN["generate"]
"""Parameters of ModuleLLM's methods in this order: those of 0.2, and those that came later."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """One call of `install()`."""

    options: Options
    parallel: Parallel
    max_concurrency: int | None


class _Installation:
    """What is in force: the latest entry's options, and the latest way of stepping that was asked for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entries: list[_Entry] = []
        self._patches: list[Patch] = []
        self._steps: _Entry | None = None
        self._steps_as_before: Callable[[], None] = remembered()

    def put(self, entry: _Entry) -> None:
        with self.lock:
            if not self.entries:
                self._patches = _patches()
                for patch in self._patches:
                    patch.put()
            self.entries.append(entry)
            self._settle()

    def take_back(self, entry: _Entry) -> None:
        """In whatever order: blocks of several threads overlap."""
        with self.lock:
            if entry not in self.entries:
                return
            self.entries.remove(entry)
            self._settle()
            patches, self._patches = (self._patches, []) if not self.entries else ([], self._patches)
            left = [str(patch) for patch in reversed(patches) if not patch.take_back()]
        if left:
            warnings.warn(
                f"uninstall(): {', '.join(left)} was replaced by somebody else after install(); it stays theirs",
                RuntimeWarning,
                stacklevel=4,
            )

    def _settle(self) -> None:
        Installed.options = self.entries[-1].options if self.entries else Options()
        steps = next((entry for entry in reversed(self.entries) if entry.parallel != "off"), None)
        if steps is self._steps:
            return
        if self._steps is None:
            self._steps_as_before = remembered()
        self._steps = steps
        if steps is None:
            self._steps_as_before()
        else:
            enable_automatic_parallel_stepping(steps.parallel, steps.max_concurrency, always=True)


_installation = _Installation()


class Handle:
    """What `install()` returns: leave its `with` block, or call `undo()`."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry

    def undo(self) -> None:
        """Undo this installation, and no other. Idempotent."""
        _installation.take_back(self._entry)

    def __enter__(self) -> Self:
        if self._entry not in _installation.entries:
            raise ConfigError("with install(...): this installation is over; call install() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def install(
    stack: Stack | None = None,
    *,
    parallel: Parallel = "off",
    max_concurrency: int | str = 64,
    **options: Any,
) -> Handle:
    """Send the questions of every LLMAgent and memory in the process through one stack.

    Also of agents that were made before. Several may be in force, from several threads too: the latest one's options
    hold for everybody until it ends, in whatever order they end. A ModuleLLM of this package keeps its own options.
    Engines, with their caches and rate limits, stay for the next installation of the same options; `close_all()`
    closes them.

    Args:
        stack: layers of your own; by default those that follow from `options`.
        parallel: how `shuffle_do("step")` steps agents: "overlap", or "snapshot" (see `step_agents`); "off" leaves
            it as it is.
        max_concurrency: calls (and steps) under way at once.
        options: further fields of `Options`: enable_caching=True, cache_dir=..., rpm=...

    Returns:
        A context manager that has begun already; `uninstall()` ends all.

    Raises:
        ConfigError: an unknown option or a value that cannot work, or a Mesa-LLM whose methods this does not know.
    """
    if parallel not in {"off", "overlap", "snapshot"}:
        raise ConfigError(f'install(parallel={parallel!r}): must be "off", "overlap" or "snapshot"')
    known = set(Options.__dataclass_fields__)
    if unknown := set(options) - known:
        raise ConfigError(
            f"install(): unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    made = Options(stack=stack, max_concurrency=max_concurrency, **options)
    if (problem := unknown_signature()) is not None:
        raise ConfigError(f"install(): {problem}; please use Mesa-LLM 0.2 or 0.3, or a newer llmmw-mesa")
    entry = _Entry(made, parallel, max_concurrency if isinstance(max_concurrency, int) else None)
    _installation.put(entry)
    return Handle(entry)


def uninstall() -> None:
    """Undo every `install()` that is in force. Idempotent."""
    for entry in list(_installation.entries):
        _installation.take_back(entry)


def is_installed() -> bool:
    """Whether an installation is in force."""
    return bool(_installation.entries)


def unknown_signature() -> str | None:
    """What is new about this Mesa-LLM, if anything: what it takes and we do not pass on would be lost silently."""
    for name, (first, later) in _KNOWN.items():
        method = getattr(upstream.ModuleLLM, name, None)
        if method is None:
            return f"this Mesa-LLM's ModuleLLM has no {name}()"
        names = tuple(inspect.signature(method).parameters)
        if names != (*first, *(one for one in later if one in names)):
            known = ", ".join((*first[1:], *later))
            return f"this Mesa-LLM's ModuleLLM.{name}({', '.join(names[1:])}) is not the one that we know ({known})"
    return None


def _patches() -> list[Patch]:
    found = [Patch(upstream.ModuleLLM, name, method) for name, method in METHODS.items()]
    agent: Any = mesa_llm.llm_agent.LLMAgent
    hooks = [(name, _after(acting.begin, hook)) for name, hook in _hooks(agent, "pre_step", "apre_step")]
    hooks += [(name, _before(acting.end, hook)) for name, hook in _hooks(agent, "post_step", "apost_step")]
    return found + [Patch(agent, name, hook) for name, hook in hooks]


def _hooks(agent: Any, *names: str) -> list[tuple[str, Any]]:
    """Those that this Mesa-LLM has; 0.2 has no async ones."""
    return [(name, getattr(agent, name)) for name in names if hasattr(agent, name)]


def _after(note: Callable[[Any], object], hook: Any) -> Any:
    """The hook of a step's begin, plain or async: the agent is noted first."""
    if inspect.iscoroutinefunction(hook):

        async def abegins(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(self)
            return await hook(self, *args, **kwargs)

        return functools.wraps(hook)(abegins)

    def begins(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(self)
        return hook(self, *args, **kwargs)

    return functools.wraps(hook)(begins)


def _before(note: Callable[[], object], hook: Any) -> Any:
    """The hook of a step's end: afterwards nobody acts."""
    if inspect.iscoroutinefunction(hook):

        async def aends(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return await hook(self, *args, **kwargs)
            finally:
                note()

        return functools.wraps(hook)(aends)

    def ends(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        finally:
            note()

    return functools.wraps(hook)(ends)
