"""One activation of some agents: each steps once, many at a time, and what becomes of it is written down."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from llmmw_mesa import acting, guards
from llmmw_mesa.activation import Ways
from llmmw_mesa.dice import Streams, keyed
from llmmw_mesa.halves import undo_half_steps
from llmmw_mesa.jobs import Job, StepTimeoutError
from llmmw_mesa.report import StepReport
from llmmw_mesa.turns import Turns
from llmmw_mesa.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw_mesa.settings import Settings
    from llmmw_mesa.workers import Worker

_RETRIES = 2
"""So often a step that has done nothing yet is tried again with `on_error="retry"`."""
GRACE_S = 1.0
"""So long a step that is cancelled may take to end; then nobody waits for it any more."""


class Run:
    """Create and await `everybody()` on the same loop, once."""

    def __init__(self, agents: Sequence[Any], settings: Settings) -> None:
        self._settings = settings
        self._turns = Turns(len(agents)) if settings.mode == "snapshot" else None
        ways = Ways(agents, snapshot=self._turns is not None)
        self._jobs: list[Job] = []
        for number, agent in enumerate(agents):
            step, on_loop = ways.of(agent)
            self._jobs.append(Job(number, agent, step, on_loop=on_loop))
        self._tries = 1 + (_RETRIES if settings.on_error == "retry" else 0)
        self._lock = threading.Lock()
        self._queue = deque(self._jobs)
        self._free = settings.max_concurrency or max(1, len(agents))
        self._left = len(agents)
        self._under_way: set[Job] = set()
        self._most = 0
        self._tally = acting.Tally()
        self._stopping = False
        self._fatal: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # the caller's: not that of whose end makes room for the next
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._workers = Workers(self._loop, self._on_worker)

    async def everybody(self) -> StepReport:
        """The report, when all have ended."""
        models = {id(model): model for job in self._jobs if (model := job.part.model) is not None}
        with keyed(list(models.values())) as base:
            for job in self._jobs:
                job.part.tally = self._tally
                job.part.streams = Streams((base, job.number))
            try:
                await self._until_ended()
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                self._workers.close()
        return StepReport(
            [job.result for job in self._jobs if not job.removed],
            most_at_once=self._most,
            calls=self._tally.calls,
            most_calls_at_once=self._tally.most,
            removed=[job.agent for job in self._jobs if job.removed],
        )

    async def _until_ended(self) -> None:
        if not self._jobs:
            return
        self._start_more()
        if self._settings.timeout is not None:
            self._watch()
        try:
            await self._ended
        except asyncio.CancelledError:
            await self._stop()
            raise
        if self._fatal is not None:
            await self._stop()
            raise self._fatal

    # ── each step ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _start_more(self) -> None:
        """As many as there are places for, in order; on the loop."""
        on_loop: list[Job] = []
        on_threads: list[Job] = []
        with self._lock:
            while self._queue and self._free > 0 and not self._stopping:
                job = self._queue.popleft()
                self._free -= 1
                (on_loop if job.on_loop else on_threads).append(job)
        if on_threads:
            self._workers.hand(on_threads)
        for job in on_loop:
            job.cancel = self._loop.create_task(self._on_loop(job), context=self._context.copy()).cancel

    async def _on_loop(self, job: Job) -> None:
        acting.enter(job.part)
        again = self._begins(job)
        while again:
            try:
                answer = job.start()
                if answer is not None:
                    await answer
            except BaseException as error:  # noqa: BLE001 — every failure is in the report
                again = self._settled(job, error)
            else:
                again = self._settled(job, None)
        self._ends(job)

    def _on_worker(self, job: Job, worker: Worker) -> Job | None:
        return self._context.copy().run(self._in_context, job, worker)

    def _in_context(self, job: Job, worker: Worker) -> Job | None:
        """The step on a thread; gives the next one that fits there."""
        job.worker = worker
        acting.enter(job.part)
        again = self._begins(job)
        while again:
            try:
                answer = job.start()
                if answer is not None:
                    worker.wait_for(job.awaited(answer))
            except BaseException as error:  # noqa: BLE001 — every failure is in the report
                again = self._settled(job, error)
            else:
                again = self._settled(job, None)
        return self._ends(job)

    def _begins(self, job: Job) -> bool:
        """Whether it steps at all."""
        if job.has_left():
            job.removed = True
            return False
        if self._turns is not None:
            job.part.turn = functools.partial(self._wait_for_turn, job, self._turns)
        job.began = time.monotonic()
        with self._lock:
            if self._stopping:
                return False
            self._under_way.add(job)
            self._most = max(self._most, len(self._under_way))
        if self._turns is not None or guards.needs_guard(job.agent):
            guards.guard(job.agent)
            job.guarded = True
        return True

    def _settled(self, job: Job, error: BaseException | None) -> bool:
        """Write down how an attempt ended; whether there is to be another."""
        if error is not None and not job.over:
            undo_half_steps(job.agent)
        with self._lock:
            if job.over:
                return False  # it was given up, and that is written down
            if job.expired is not None:
                error = self._too_late()
            job.result.error = error
            job.result.timed_out = job.expired is not None
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                self._fatal = error
            again = isinstance(error, Exception) and job.result.attempts < self._tries
            if again and not self._stopping and not job.part.committed and not job.part.over:
                return True
        if self._fatal is not None:
            self._tell(job, self._finish)
        return False

    def _ends(self, job: Job) -> Job | None:
        """The step is over; gives the next one for the same thread."""
        if job.guarded:
            guards.release(job.agent)
        with self._lock:
            if job.over:
                return None
            self._leaves(job)
            follows = None
            waiting = bool(self._queue) and self._free > 0 and not self._stopping
            if waiting and job.worker is not None and not self._queue[0].on_loop:
                follows = self._queue.popleft()
                self._free -= 1
                waiting = False
        self._has_left(job, waiting=waiting)
        return follows

    def _leaves(self, job: Job) -> None:
        """With the lock held."""
        job.over = True
        self._under_way.discard(job)
        self._left -= 1
        self._free += job.placed

    def _has_left(self, job: Job, *, waiting: bool) -> None:
        if self._turns is not None:
            self._turns.done(job.number)
        if not self._left or (self._stopping and not self._under_way):
            self._tell(job, self._finish)
        elif waiting:
            self._tell(job, self._start_more)

    def _finish(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _tell(self, job: Job, what: Callable[[], None]) -> None:
        """Have it done on the loop."""
        if job.worker is None:
            what()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(what)

    def _wait_for_turn(self, job: Job, turns: Turns) -> None:
        """Places are for thinking: who has thought waits without one."""
        if turns.holds(job.number):
            return
        with self._lock:
            if not job.waiting:  # steps inside this one wait for its turn too
                job.away = time.monotonic()
            job.waiting += 1
            self._free += job.placed
            job.placed = False
        self._tell(job, self._start_more)
        try:
            turns.wait(job.number)
        finally:
            with self._lock:
                job.waiting -= 1
                if job.away is not None and not job.waiting:
                    job.began += time.monotonic() - job.away
                    job.away = None
        if self._settings.timeout is not None:
            self._tell(job, self._watch)
        if job.has_left():
            job.removed = True
            job.part.give_up()

    # ── what takes too long ─────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """Give up what is over its time; again when the next one may be. On the loop."""
        if self._timer is not None:
            self._timer.cancel()
        timeout, now = self._settings.timeout or math.inf, time.monotonic()
        with self._lock:
            running = [job for job in self._under_way if job.away is None]
        wait = timeout
        for job in running:
            left = job.began + timeout - now if job.expired is None else job.expired + GRACE_S - now
            if left <= 0:
                self._expire(job, now)
                left = GRACE_S
            wait = min(wait, left)
        if self._left:
            self._timer = self._loop.call_later(max(wait, 0.001), self._watch)

    def _expire(self, job: Job, now: float) -> None:
        if job.expired is None:
            job.expired = now
            job.part.give_up()
            if job.is_told_to_end():
                return
        self._abandon(job)

    def _abandon(self, job: Job) -> None:
        """Nobody waits for it any more; what it does from now on is refused."""
        job.part.give_up()
        with self._lock:
            if job.over:
                return
            job.result.error, job.result.timed_out = self._too_late(), job.expired is not None
            if job.worker is not None:
                job.worker.lost = True
            self._leaves(job)
            job.worker = None
        undo_half_steps(job.agent)
        self._has_left(job, waiting=True)

    def _too_late(self) -> BaseException:
        if self._settings.timeout is None:
            return asyncio.CancelledError()
        return StepTimeoutError(f"the step took longer than {self._settings.timeout:g} s")

    async def _stop(self) -> None:
        """End every step under way, as far as it can be."""
        with self._lock:
            self._stopping = True
            self._queue.clear()
            running = list(self._under_way)
        for job in running:
            job.part.give_up()
            if self._turns is not None:
                self._turns.done(job.number)
        self._ended = self._loop.create_future()
        try:
            if sum(job.is_told_to_end() for job in running):
                await asyncio.wait({self._ended}, timeout=GRACE_S)
        finally:
            for job in running:
                self._abandon(job)
