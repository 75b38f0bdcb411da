"""`install()`: every ModuleLLM of the process, whoever made it, goes through llmmw. `uninstall()` undoes it.

Mesa-LLM's class gets other methods; its objects, its constructor, subclasses and what is imported stay as they are.
Importing this package patches nothing.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any, Literal

import mesa_llm.llm_agent
import mesa_llm.module_llm as upstream

from llmmw import ConfigError
from llmmw_mesa import acting
from llmmw_mesa.asking import Installed
from llmmw_mesa.module import METHODS
from llmmw_mesa.options import Options
from llmmw_mesa.parallel import Patch, disable_automatic_parallel_stepping, enable_automatic_parallel_stepping

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from llmmw import Stack

_KNOWN = ("self", "prompt", "tool_schema", "tool_choice", "response_format", "system_prompt")
_lock = threading.RLock()


class _Installation:
    """What is installed, and how often that was asked for."""

    def __init__(self) -> None:
        self.depth = 0
        self.patches: list[Patch] = []
        self.before: list[tuple[Options, bool]] = []

    def put(self, options: Options, parallel: str, max_concurrency: int) -> None:
        self.before.append((Installed.options, parallel != "off"))
        Installed.options = options
        self.depth += 1
        if self.depth == 1:
            self.patches = _patches()
            for patch in self.patches:
                patch.put()
        if parallel != "off":
            enable_automatic_parallel_stepping(mode=parallel, max_concurrent=max_concurrency, always=True)

    def take_back(self) -> None:
        if not self.depth:
            return
        self.depth -= 1
        Installed.options, was_parallel = self.before.pop()
        if was_parallel:
            disable_automatic_parallel_stepping()
        if not self.depth:
            for patch in reversed(self.patches):
                patch.take_back()
            self.patches = []


_installation = _Installation()


class Handle:
    """What `install()` returns: leave its `with` block, or call `uninstall()`."""

    def __init__(self) -> None:
        self._over = False

    def undo(self) -> None:
        """Undo this installation. Idempotent."""
        with _lock:
            if not self._over:
                self._over = True
                _installation.take_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def install(
    stack: Stack | None = None,
    *,
    parallel: Literal["off", "overlap", "snapshot"] = "off",
    max_concurrency: int = 64,
    **options: Any,
) -> Handle:
    """Send the questions of every LLMAgent and memory in the process through one stack.

    Also of agents that were made before. Blocks nest; the innermost options hold. A ModuleLLM of this package keeps
    its own options.

    Args:
        stack: layers of your own; by default those that follow from `options`.
        parallel: how `shuffle_do("step")` steps agents: one by one as ever, overlapping, or on a snapshot.
        max_concurrency: calls (and steps) under way at once.
        options: further fields of `Options`: enable_caching=True, cache_dir=..., rpm=...

    Returns:
        A context manager that has begun already; `uninstall()` ends the innermost.

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
    _check_signatures()
    with _lock:
        _installation.put(made, parallel, max_concurrency)
    return Handle()


def uninstall() -> None:
    """Undo every `install()` that is in force. Idempotent."""
    with _lock:
        while _installation.depth:
            _installation.take_back()


def is_installed() -> bool:
    """Whether an installation is in force."""
    return bool(_installation.depth)


def _check_signatures() -> None:
    """A Mesa-LLM that takes more than we pass on would lose it silently."""
    for name in ("generate", "agenerate"):
        method = getattr(upstream.ModuleLLM, name, None)
        if method is None:
            raise ConfigError(f"install(): this Mesa-LLM's ModuleLLM has no {name}(); llmmw-mesa knows 0.2 and 0.3")
        names = tuple(inspect.signature(method).parameters)
        if names != _KNOWN[: len(names)] or len(names) < len(_KNOWN) - 1:
            raise ConfigError(
                f"install(): this Mesa-LLM's ModuleLLM.{name}{names} is not the one that llmmw-mesa knows "
                f"({', '.join(_KNOWN[1:])}); please use Mesa-LLM 0.2 or 0.3, or a newer llmmw-mesa"
            )


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
