"""One daemon thread for one disk: reads at once, writes when no read waits, busy writes again later."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[], None]
    Write = Callable[[], bool]

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.2
FLUSH_S = 2.0
"""How long a stopping thread goes on trying what finds the database busy."""


class IOThread:
    """Runs jobs in order, reads before writes. Jobs must not raise.

    Args:
        name: of the thread.
        on_stop: runs on the thread at its end.
    """

    def __init__(self, name: str, on_stop: Callable[[], None]) -> None:
        self._jobs: queue.SimpleQueue[tuple[Read | None, Write | None]] = queue.SimpleQueue()
        self._at_end = [on_stop]
        self._thread = threading.Thread(target=_Worker(self._jobs, self._at_end).main, name=name, daemon=True)
        self._thread.start()

    def read(self, job: Read) -> None:
        """Run as soon as the thread is free."""
        self._jobs.put((job, None))

    def write(self, job: Write) -> None:
        """Run when no read waits; a job that returns False is tried again after a pause, before later writes."""
        self._jobs.put((None, job))

    def stop(self, then: Callable[[], None] | None = None) -> None:
        """Finish what is queued and end; does not wait. `then` runs on the thread as its last act."""
        if then is not None:
            self._at_end.append(then)
        self._jobs.put((None, None))

    def join(self) -> None:
        """Wait for the end, at most about as long as the flush may take."""
        self._thread.join(2 * FLUSH_S)


class _Worker:
    """The thread's side: it holds no reference to whoever uses the thread."""

    def __init__(
        self, jobs: queue.SimpleQueue[tuple[Read | None, Write | None]], at_end: list[Callable[[], None]]
    ) -> None:
        self._jobs = jobs
        self._at_end = at_end
        self._writes: deque[Write] = deque()
        self._pause_s = 0.0
        self._flush_left_s = float("inf")

    def main(self) -> None:
        """Work until told to stop and nothing is left, or what is left finds the database busy for too long."""
        while self._writes or self._flush_left_s > FLUSH_S:
            with contextlib.suppress(queue.Empty):
                self._take(*self._wait())
                continue
            self._write()
            if self._flush_left_s <= 0:
                break
        for act in self._at_end:
            act()

    def _wait(self) -> tuple[Read | None, Write | None]:
        if not self._writes:
            return self._jobs.get()
        if not self._pause_s:
            return self._jobs.get_nowait()
        if self._flush_left_s <= FLUSH_S:
            self._flush_left_s -= self._pause_s
        return self._jobs.get(timeout=self._pause_s)

    def _take(self, read: Read | None, write: Write | None) -> None:
        if read is not None:
            read()
        elif write is not None:
            self._writes.append(write)
        else:
            self._flush_left_s = FLUSH_S

    def _write(self) -> None:
        if self._writes[0]():
            self._writes.popleft()
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
