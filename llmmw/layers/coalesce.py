"""Coalescer: identical calls that are in flight together cost one upstream call.

A *flight* is a task of the engine that makes the call once for all who wait. Nobody's cancellation or deadline
reaches it: a caller waits on a future of its own, and only when the last one has gone is the flight cancelled.

Together with the cache outside (which sets `call.key` and `call.fill`): the flight looks into the cache once more
before it sends, and hands the upstream's answer to `fill` before it leaves the table and before anybody wakes. So
there is one store per flight, also when nobody waits any more, and no gap in which a newcomer finds neither the flight
nor the entry. The cache stores no reply whose source is "coalesced".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, cast

from llmmw.errors import AmbiguousOutcome, Closed
from llmmw.events import Coalesced
from llmmw.keys import Sharing, Uncacheable, key_of
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.flight import Flight, current_flight, discard, expire, own_outcome, reader_of
from llmmw.layers.samples import Samples
from llmmw.order import Role
from llmmw.settings import positive_seconds, settings, whole
from llmmw.stream import at_end
from llmmw.stream.tee import Tee

if TYPE_CHECKING:
    from llmmw.call import Call, Chunks, Handler, Reply
    from llmmw.env import Env
    from llmmw.layers.flight import Key, Landed
    from llmmw.stores.base import Match

_ELECTIONS = 2
"""How often a flight whose task somebody cancelled is made anew for those who still wait."""


@settings
class Coalescer(Positioned):
    """Joins identical calls in flight, where the cache's policy lets them share.

    Without a cache, or where the cache is switched off, only deterministic calls join (temperature 0 or a seed).
    Followers get their own copy of the reply with source "coalesced", or their own exception (same type, caused by
    the leader's). Followers of a stream get it from the beginning, whenever they join.

    Processes that share a cache directory each make the call once, unless there is a `lease`: then one makes it and the
    others wait for its entry (looking again up to every 0.2 s). A process that dies or stands still loses its lease
    when it ends; that costs a second call, and what it would store later is refused.

    Args:
        finish_orphans: finish a call that everybody stopped waiting for, so that the cache has it (`Timeout` ends it,
            no caller's deadline does); else it is cancelled, which frees the server.
        buffer_bytes: how much of a stream is kept per flight for slow or late readers. A reader that falls further
            behind gets StreamInterrupted; once a stream is longer, newcomers make their own call.
        lease: seconds (or text such as "10s") after which a process that stands still loses its place; at most half
            the lifetime of the cache's answers. Renewed while the call runs. Needs `TTLCache(directory=)`.
        merge_samples: calls that ask the same but may not share an answer (temperature above 0, and lanes or no cache)
            become one request with `n` where the endpoint takes that: those of one loop turn, none waits longer. The
            prompt is paid for once. Seeds, streams, n > 1 and calls through somebody else's SDK stay as they are.

    Raises:
        ConfigError: `buffer_bytes` is not a whole number of at least 1, `lease` no duration above zero.
    """

    role: ClassVar[Role] = Role.COALESCE
    finish_orphans: bool = False
    buffer_bytes: int = 8 * 1024 * 1024
    lease: float | str | None = None
    merge_samples: bool = False

    def __post_init__(self) -> None:
        whole("Coalescer(buffer_bytes=)", self.buffer_bytes)
        if self.lease is not None:
            object.__setattr__(self, "lease", positive_seconds("Coalescer(lease=)", self.lease))

    def bind(self, inner: Handler, env: Env) -> BoundCoalescer:
        """An empty table of flights."""
        return BoundCoalescer(inner, env, self)


class BoundCoalescer(Bound):
    """The table of flights of one engine."""

    def __init__(self, inner: Handler, env: Env, options: Coalescer) -> None:
        super().__init__(inner, env)
        self._options = options
        self._samples = Samples(inner, env) if options.merge_samples else None
        self._ask: Handler = self._samples or inner
        self._lease_s = cast("float | None", options.lease)
        self._table: dict[Key, Flight] = {}
        self._tasks: dict[asyncio.Task[None], Flight] = {}
        self._forsaken: list[dict[asyncio.Task[None], Flight]] = []
        self._sharing = Sharing()
        self._closed = False

    async def __call__(self, call: Call, /) -> Reply:
        """Lead a flight, join one, or pass on a call that may not share.

        Raises:
            DeadlineExceeded: this caller's deadline passed; others go on waiting.
            Closed: the engine was closed meanwhile.
            AmbiguousOutcome: the shared call was cancelled from inside again and again.
        """
        key = (call.key, call.stream) if call.key else self._own_key(call)
        if key is None:
            return await self._ask(call)
        if self._closed:
            raise _closed()
        origin, flight = current_flight(), self._table.get(key)
        if flight is not None and origin is not None and flight.reaches(origin):
            return await self.inner(call)  # waiting here would be waiting for ourselves
        if flight is None or not flight.joinable:
            flight = self._table[key] = Flight(key, call, self, outlives=self._options.finish_orphans)
        else:
            self.env.emit(Coalesced(call.context.agent))
            flight.urgency.join(call.context)
            if call.place is not None:
                call.place.settle()
        if flight.tee is not None and flight.reply is not None:
            landed: Landed = reader_of(flight.reply, flight.tee, call, self.env.clock, own=True)
        else:
            landed = await self._wait(flight, call, origin)
        if landed is None:
            return await self.inner(call)
        if isinstance(landed, BaseException):
            try:
                raise landed
            finally:
                del landed  # its traceback leads back to this frame
        if origin is not None and landed.chunks is not None:
            shared = flight
            origin.waits_on.append(shared)
            return at_end(landed, lambda _: origin.waits_on.remove(shared))
        return landed

    def invalidate(self, call: Call) -> int:
        """Newcomers start afresh; those who wait keep their flight. Nothing is stored here."""
        try:
            key = key_of(call, remote_content=True)
        except Uncacheable:
            return 0
        self._table = {found: flight for found, flight in self._table.items() if found[0] != key}
        return 0

    def discard(self, match: Match) -> int:
        """As `invalidate`, for every flight of a namespace or with a tag."""
        self._table = {key: flight for key, flight in self._table.items() if not match.concerns(flight.call)}
        return 0

    def rehome(self) -> None:
        """Forget every flight: its waiters belong to the dead loop or to the parent process.

        The tasks are kept from the garbage collector, which would run their `finally` blocks over sockets and
        futures that are no longer ours.
        """
        self._table.clear()
        if self._tasks:
            self._forsaken.append(self._tasks)
            self._tasks = {}
        if self._samples is not None:
            self._samples.rehome()

    async def aclose(self) -> None:
        """Cancel what flies and wait for it to end; who still waits for an answer gets Closed."""
        self._closed = True
        own = asyncio.current_task()
        tasks = {task: flight for task, flight in self._tasks.items() if task is not own}
        for task, flight in tasks.items():
            if not flight.over:
                self._land(flight, _closed())
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._samples is not None:
            await self._samples.aclose()

    def gauges(self) -> dict[str, object]:
        """Flights now, and calls waiting for one."""
        waiting = [len(flight.waiters) for flight in list(self._table.values())]
        return {"flights": len(waiting), "waiting": sum(waiting)}

    def _own_key(self, call: Call) -> Key | None:
        """Where no cache outside has set one."""
        try:
            key = self._sharing.draw(call).key
        except Uncacheable:
            return None
        return (key, call.stream) if key else None

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait(self, flight: Flight, call: Call, origin: Flight | None) -> Landed:
        """Wait for the flight under the caller's own deadline, whatever became of everybody else's."""
        waiter: asyncio.Future[Landed] = asyncio.get_running_loop().create_future()
        flight.waiters[waiter] = call
        if flight.leader is None:
            flight.leader = waiter
            self._launch(flight)
        if origin is not None:
            origin.waits_on.append(flight)
        timer = None
        if call.context.deadline is not None and not waiter.done():
            left = call.context.deadline - self.env.clock.monotonic()
            timer = waiter.get_loop().call_later(max(0.0, left), expire, waiter)
        try:
            landed = await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # answered and cancelled in one loop turn
                await discard(waiter.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if origin is not None:
                origin.waits_on.remove(flight)
            led = flight.leave(waiter)
            self._abandon(flight)
        if isinstance(landed, BaseException) and not led:
            landed.__traceback__ = None  # one that could not be copied must not gather everybody's
        return landed

    def _abandon(self, flight: Flight) -> bool:
        """Cancel a flight that nobody waits for; tells whether it did."""
        if flight.over or flight.awaited or self._options.finish_orphans:
            return False
        self._end(flight)
        if flight.task is not None:
            flight.task.cancel()
        return True

    # ── flying ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self, flight: Flight) -> None:
        task = asyncio.get_running_loop().create_task(self._fly(flight), context=flight.context())
        flight.task = task
        self._tasks[task] = flight
        task.add_done_callback(self._flown)

    async def _fly(self, flight: Flight) -> None:
        try:
            reply = await self._obtain(flight)
            if reply.chunks is None:
                self._land(flight, reply)
            else:
                await self._stream(flight, reply, reply.chunks)
        except (asyncio.CancelledError, GeneratorExit):
            raise  # for `_flown`, which also sees a task that was cancelled before it began
        except BaseException as error:
            if not isinstance(error, Exception) and not flight.alive():
                raise
            self._land(flight, error)

    async def _obtain(self, flight: Flight) -> Reply:
        call, fill = flight.call.replace(urgency=flight.urgency, fill=None), flight.call.fill
        if fill is None:
            return await self._ask(call)
        found = fill.look() or (None if self._lease_s is None else await fill.claim(self._lease_s))
        if found is not None:
            return found
        try:
            reply = await self._ask(call)
        except BaseException:
            fill.failed()
            raise
        return fill.answered(reply)

    async def _stream(self, flight: Flight, reply: Reply, chunks: Chunks) -> None:
        """Hand a reader to everybody who waits, then read for all of them."""
        tee = Tee(chunks, max_bytes=self._options.buffer_bytes, on_abandoned=lambda: self._abandon(flight))
        flight.reply, flight.tee = reply, tee
        for waiter in flight.alive():
            own = waiter is not flight.leader
            waiter.set_result(reader_of(reply, tee, flight.waiters[waiter], self.env.clock, own=own))
        await tee.pump()
        self._end(flight)

    def _flown(self, task: asyncio.Task[None]) -> None:
        """The task is over; if somebody cancelled it while others wait, it is made anew for them."""
        flight = self._tasks.pop(task, None)
        if flight is not None:
            flight.task = None  # task and flight hold each other: without this every miss would wait for the collector
        if not task.cancelled():
            task.exception()  # retrieved: whoever waits has it already
        if flight is None or flight.over:
            return
        alive = flight.alive()
        if not alive:
            self._end(flight)
        elif flight.elections == _ELECTIONS:
            text = f"the shared call was cancelled {_ELECTIONS + 1} times"
            self._land(flight, AmbiguousOutcome(text, endpoint=flight.call.target))
        else:
            flight.elections += 1
            if flight.leader not in alive:
                flight.leader = alive[0]
                elected = flight.waiters[alive[0]]
                flight.call = elected.replace(fill=elected.fill or flight.call.fill)
            self._launch(flight)

    def _land(self, flight: Flight, outcome: Reply | BaseException) -> None:
        """End the flight: out of the table first, then everybody is woken with an outcome of their own."""
        self._end(flight)
        if flight.tee is not None and isinstance(outcome, BaseException):
            flight.tee.fail(outcome)
        for waiter in flight.alive():
            waiter.set_result(outcome if waiter is flight.leader else own_outcome(outcome))

    def _end(self, flight: Flight) -> None:
        flight.over = True
        if self._table.get(flight.key) is flight:
            del self._table[flight.key]


def _closed() -> Closed:
    return Closed("closed while the call was in flight")
