"""Who is asking and how urgently: `Context`, the block `using()` that sets it, and `Urgency`, which shared work has.

Also who asks together: `Party`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import msgspec

from llmmw.env import ambient_clock
from llmmw.settings import accepting, seconds, text, texts, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable


class Context(msgspec.Struct, frozen=True):
    """Who is asking and how urgently; set by `using()`, read by the layers, never sent upstream."""

    agent: str | None = None
    step: int | None = None
    """Simulation step; calls of one step may be batched behind a barrier."""
    sample: int | None = None
    """Which independent draw of the same request is wanted (lane index, from 0)."""
    priority: int = 0
    """Smaller runs earlier, as in vLLM."""
    deadline: float | None = None
    """Absolute, on the env clock's monotonic scale, in seconds."""
    tenant: str | None = None
    """Answers are shared within one tenant only."""
    tags: tuple[str, ...] = ()


_LOWEST = -(2**31)
"""A server's queue (vLLM's) takes priorities that fit into 32 bits."""
NO_CONTEXT = Context()
_context: ContextVar[Context] = ContextVar("llmmw_context", default=NO_CONTEXT)


def current_context() -> Context:
    """The context that `using()` set around the running code."""
    return _context.get()


@accepting
@contextmanager
def using(
    *,
    agent: str | None = None,
    step: int | None = None,
    sample: int | None = None,
    priority: int | None = None,
    deadline: float | str | None = None,
    tenant: str | None = None,
    tags: str | Iterable[str] = (),
) -> Generator[Context]:
    """Tell llmmw who makes the calls inside this block. Blocks nest: what is not given is inherited.

    Args:
        agent: name under which statistics and lanes are kept.
        step: simulation step.
        sample: index of the independent draw that is wanted (0, 1, ...).
        priority: smaller runs earlier.
        deadline: seconds from now (or text such as "20s"); an inner block cannot extend an outer one. Every engine
            keeps it, whatever its layers; those that wait also refuse early what cannot be done in time.
        tenant: answers are not shared between tenants. Those who share one can tell by the time an answer takes
            whether somebody else has asked the same: give a tenant of their own to whom that must not be told.
        tags: added to the outer tags; cached answers can be invalidated by tag.

    Raises:
        ConfigError: a value is not usable (negative sample, deadline that is not a duration).
    """
    _check(agent, step, sample, priority, tenant)
    outer = _context.get()
    until = outer.deadline
    if deadline is not None:
        mine = ambient_clock().monotonic() + seconds("using(deadline=)", deadline)
        until = mine if until is None else min(until, mine)
    added = texts("using(tags=)", (tags,) if isinstance(tags, str) else tags)
    context = Context(
        agent=outer.agent if agent is None else agent,
        step=outer.step if step is None else step,
        sample=outer.sample if sample is None else sample,
        priority=outer.priority if priority is None else priority,
        deadline=until,
        tenant=outer.tenant if tenant is None else tenant,
        tags=outer.tags + tuple(tag for tag in added if tag not in outer.tags),
    )
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)


def _check(agent: str | None, step: int | None, sample: int | None, priority: int | None, tenant: str | None) -> None:
    if agent is not None:
        text("using(agent=)", agent)
    if tenant is not None:
        text("using(tenant=)", tenant)
    if step is not None:
        whole("using(step=)", step, low=0)
    if sample is not None:
        whole("using(sample=)", sample, low=0)
    if priority is not None:
        whole("using(priority=)", priority, low=_LOWEST)


class Urgency:
    """How urgent shared work is now: the smallest priority and the latest deadline of all who wait for it.

    The coalescer puts one on the call of each flight and raises it when somebody more urgent joins; it never sinks.
    Layers read `call.priority` and `call.deadline`, which look here first; whoever keeps the call in a queue
    subscribes, to move it up.
    """

    __slots__ = ("_listeners", "_watchers", "deadline", "priority")

    def __init__(self, priority: int = 0, deadline: float | None = None) -> None:
        self.priority = priority
        self.deadline = deadline
        self._listeners: list[Callable[[], object]] = []
        self._watchers: list[Callable[[], object]] = []

    def join(self, context: Context) -> None:
        """Somebody with this context waits too; listeners are told if that changes anything."""
        for watcher in list(self._watchers):
            watcher()
        priority = min(self.priority, context.priority)
        deadline = self.deadline
        if deadline is not None:
            deadline = None if context.deadline is None else max(deadline, context.deadline)
        if (priority, deadline) == (self.priority, self.deadline):
            return
        self.priority, self.deadline = priority, deadline
        for listener in list(self._listeners):
            listener()

    def subscribe(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener` after every change, on the home loop; the result ends that and may be called twice."""
        return _added(self._listeners, listener)

    def watch(self, watcher: Callable[[], object]) -> Callable[[], None]:
        """Call `watcher` whenever somebody joins, in the context of who does; else as `subscribe`."""
        return _added(self._watchers, watcher)

    def __repr__(self) -> str:
        return f"Urgency(priority={self.priority}, deadline={self.deadline})"


class Party:
    """Calls that are made together, as by `generate_batch`: who gathers them sees whether more are on their way.

    On its way is a call that has joined and was not settled. Lives on the home loop.

    Args:
        size: how many there will be in all, where that is known.
    """

    __slots__ = ("_watchers", "coming", "is_whole", "size")

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        self.coming = 0
        self.is_whole = False
        """Nobody joins any more."""
        self._watchers: dict[Callable[[], object], None] = {}

    def join(self) -> Place:
        """One more call is on its way."""
        self.coming += 1
        return Place(self)

    def close(self) -> None:
        """Nobody joins any more."""
        self.is_whole = True
        self._tell()

    def settled(self) -> None:
        """One call less is on its way."""
        self.coming -= 1
        self._tell()

    def watch(self, watcher: Callable[[], object]) -> None:
        """Call `watcher` whenever nobody is on the way any more; twice the same is once."""
        self._watchers[watcher] = None

    def _tell(self) -> None:
        if not self.coming:
            for watcher in list(self._watchers):
                watcher()


class Place:
    """A call's place in its party."""

    __slots__ = ("_party", "among")

    def __init__(self, party: Party) -> None:
        self._party: Party | None = party
        self.among = party.size
        """How many are in the party, where that is known."""

    def settle(self) -> Party | None:
        """The call was gathered, waits for somebody else or has ended: nobody need wait for it.

        Returns:
            The party, the first time.
        """
        party, self._party = self._party, None
        if party is not None:
            party.settled()
        return party


def _added(told: list[Callable[[], object]], one: Callable[[], object]) -> Callable[[], None]:
    told.append(one)

    def remove() -> None:
        if one in told:
            told.remove(one)

    return remove
