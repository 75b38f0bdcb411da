"""Threads for steps of one activation: as many as are needed, used again, gone when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_LOOK_S = 0.0005
"""So often it is looked whether the threads keep up: short steps need one thread, a new one costs as much as many."""
_GRACE_S = 1.0
"""So long the threads may take to end after the last step."""


class Workers:
    """Threads that take jobs.

    Args:
        loop: on which it is looked after.
        work: does a job; gives the next one if there is one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Callable[[Any, Worker], Any]) -> None:
        self._loop = loop
        self._work = work
        self._jobs: deque[Any] = deque()
        self._news = threading.Condition()
        self._threads: list[Worker] = []
        self._taken = self._seen = 0
        self._closed = False
        self._looking = False

    def hand(self, jobs: list[Any]) -> None:
        """More to do; called on the loop."""
        with self._news:
            self._jobs.extend(jobs)
            self._news.notify(len(jobs))
        if not self._looking:
            self._look()

    def take(self) -> Any:
        """A job, or None when there will be none; for the threads."""
        with self._news:
            while not self._jobs:
                if self._closed:
                    return None
                self._news.wait()
            self._taken += 1
            return self._jobs.popleft()

    def _look(self) -> None:
        """Twice as many, unless they have just done well."""
        with self._news:
            waiting, alive = len(self._jobs), len(self._threads)
            slow = self._taken - self._seen < max(1, alive)
            self._seen = self._taken
            self._looking = bool(waiting) and not self._closed
        if slow or not alive:
            for _ in range(min(waiting, max(1, alive))):
                self._threads.append(Worker(self, self._work))
        if self._looking:
            self._loop.call_later(_LOOK_S, self._look)

    def close(self) -> None:
        """No more jobs. Waits for the threads, but for those that hang in a step that was given up."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify_all()
        ends = time.monotonic() + _GRACE_S
        for worker in self._threads:
            if not worker.lost:
                worker.join(max(0.0, ends - time.monotonic()))


class Worker(threading.Thread):
    """One thread; with a loop when a step needs one."""

    def __init__(self, workers: Workers, work: Callable[[Any, Worker], Any]) -> None:
        super().__init__(name="mesa-step", daemon=True)
        self._workers, self._work = workers, work
        self._runner: asyncio.Runner | None = None
        self.lost = False
        """It hangs, or hung, in a step that was given up; nobody waits for it."""
        self.start()

    def run(self) -> None:
        """Jobs, one after another."""
        try:
            while not self.lost and (job := self._workers.take()) is not None:
                while job is not None and not self.lost:
                    job = self._work(job, self)
        finally:
            if self._runner is not None:
                with contextlib.suppress(RuntimeError):  # what a step has left on it
                    self._runner.close()

    def wait_for(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it to its end on this thread's loop, in the context that is here now."""
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        return self._runner.run(work, context=contextvars.copy_context())
