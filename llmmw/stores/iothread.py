"""One daemon thread for one disk: reads before writes, but no write waits for ever; busy writes again later.

Around a fork every such thread closes its database and stands still. SQLite keeps locks in memory, so a child that
inherits an open connection can never write, or reads what is being overwritten; one forked in the middle of a
statement may inherit a mutex that nobody frees (sqlite.org/howtocorrupt.html, section 2.6).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from llmmw.env import SYSTEM_CLOCK
from llmmw.stores.inbox import inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.stores.inbox import Inbox

    Read = Callable[[], object]
    Write = Callable[[], bool]

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.2
FLUSH_S = 2.0
"""How long a stopping thread goes on trying what finds the database busy."""


_BATCH = 64
"""Reads after which their results are handed over although more wait."""
_PATIENCE = 32
"""Reads that go before a waiting write; then it is its turn, or steady reading would keep all writes waiting."""
_FORK_S = 0.5
"""How long a fork waits for a thread to stand still; a child of less patience must do without the disk."""


class Sleeper(Protocol):
    """Whoever waits for results of reads."""

    def wake(self) -> None:
        """There are some."""
        ...


_now = SYSTEM_CLOCK.monotonic

_Job = tuple["Read | None", "Write | None", Sleeper | None]


class IOThread:
    """Runs jobs in order, reads before writes. Jobs must not raise.

    Args:
        name: of the thread.
        on_stop: runs on the thread at its end.
        on_fork: runs on the thread before the process forks: closes what will be opened again when it is needed.

    Raises:
        RuntimeError: too many threads.
    """

    def __init__(self, name: str, on_stop: Callable[[], None], on_fork: Callable[[], None] | None = None) -> None:
        self._jobs: Inbox[_Job] = inbox()
        self._at_end = [on_stop]
        self._on_fork = on_fork or on_stop
        self._thread = threading.Thread(target=_Worker(self._jobs, self._at_end).main, name=name, daemon=True)
        self._thread.start()
        _threads.add(self)

    def read(self, job: Read, sleeper: Sleeper | None = None) -> None:
        """Run as soon as the thread is free; the sleeper is woken once for all its reads that were queued."""
        self._jobs.put((job, None, sleeper))

    def write(self, job: Write) -> None:
        """Run when no read waits; a job that returns False is tried again after a pause, before later writes."""
        self._jobs.put((None, job, None))

    def stop(self, then: Callable[[], None] | None = None) -> None:
        """Finish what is queued and end; does not wait. `then` runs on the thread as its last act."""
        if then is not None:
            self._at_end.append(then)
        self._jobs.put((None, None, None))

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, at most about as long as the flush may take; whether it came."""
        self._thread.join(2 * FLUSH_S if timeout_s is None else timeout_s)
        return not self._thread.is_alive()

    def hold(self) -> Hold | None:
        """Close what is open and stand still until released; None where the thread has ended."""
        if not self._thread.is_alive():
            return None
        hold = Hold(self._on_fork)
        self._jobs.put((hold.run, None, None))
        hold.patience_s = 0.0 if self._thread is threading.current_thread() else _FORK_S  # a codec may fork, too
        return hold


class Hold:
    """A pause of one thread."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self.still = threading.Event()
        self.go = threading.Event()
        self.patience_s = _FORK_S

    def run(self) -> None:
        """On the thread."""
        if not self.go.is_set():
            self._act()
            self.still.set()
            self.go.wait()


_threads: weakref.WeakSet[IOThread] = weakref.WeakSet()


class _ForkGuard:
    """What happens around a fork."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        """Two threads may fork at once; the second pause of a thread would wait for the end of the first."""
        self._holds: list[Hold] = []
        self._was_still = True
        self.tainted = False

    def before(self) -> None:
        """In the parent: all threads stand still, or have had half a second to."""
        self._turn.acquire()
        self._was_still = False
        self._holds = [hold for thread in list(_threads) if (hold := thread.hold()) is not None]
        self._was_still = all(hold.still.wait(hold.patience_s) for hold in self._holds)

    def in_parent(self) -> None:
        """Let the threads go on."""
        holds, self._holds = self._holds, []
        for hold in holds:
            hold.go.set()
        self._turn.release()

    def in_child(self) -> None:
        """Remember whether the disk may be used here; the threads exist in the parent only."""
        self._turn = threading.Lock()
        self._holds = []
        _threads.clear()
        self.tainted = self.tainted or not self._was_still


_guard = _ForkGuard()


def forked_badly() -> bool:
    """Whether this process was forked while a database was in use, so that SQLite must not be used in it."""
    return _guard.tainted


def taint() -> None:
    """Say so, in a child, of a database that was in use outside these threads."""
    _guard.tainted = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_guard.before, after_in_parent=_guard.in_parent, after_in_child=_guard.in_child)


class _Worker:
    """The thread's side: it holds no reference to whoever uses the thread."""

    def __init__(self, jobs: Inbox[_Job], at_end: list[Callable[[], None]]) -> None:
        self._jobs = jobs
        self._at_end = at_end
        self._writes: deque[Write] = deque()
        self._pause_s = 0.0
        self._again_at = 0.0
        """When the first write, which found the database busy, is tried again."""
        self._give_up_at: float | None = None
        """Once told to stop: until then what finds the database busy is tried again."""
        self._passed = 0
        """Reads that were let past waiting writes."""
        self._sleeper: Sleeper | None = None
        self._unheard = 0
        """Results that the sleeper was not told of yet."""

    def main(self) -> None:
        """Work until told to stop and nothing is left, or what is left finds the database busy for too long."""
        while self._writes or self._give_up_at is None:
            if self._unheard and (self._unheard >= _BATCH or self._jobs.empty()):
                self._tell()
            if self._serve():
                continue
            self._passed = 0
            self._write()
            if self._pause_s and self._give_up_at is not None and _now() >= self._give_up_at:
                break
        self._tell()
        for act in self._at_end:
            act()

    def _serve(self) -> bool:
        """Take the next job, which lives no longer than this; False when a write should be tried instead."""
        job = self._wait()
        if job is not None:
            self._take(*job)
        return job is not None

    def _wait(self) -> _Job | None:
        """The next job; None when a write should be tried instead."""
        if not self._writes:
            return self._jobs.get(None)
        left_s = self._again_at - _now() if self._pause_s else 0.0
        if left_s > 0:
            return self._jobs.get(left_s)
        return None if self._passed >= _PATIENCE else self._jobs.get(0)

    def _take(self, read: Read | None, write: Write | None, sleeper: Sleeper | None) -> None:
        if read is not None:
            read()
            self._passed += 1
            if sleeper is not self._sleeper:
                self._tell()
                self._sleeper = sleeper
            self._unheard += 1
        elif write is not None:
            self._writes.append(write)
        else:
            self._give_up_at = _now() + FLUSH_S

    def _tell(self) -> None:
        sleeper, self._sleeper, self._unheard = self._sleeper, None, 0
        if sleeper is not None:
            sleeper.wake()

    def _write(self) -> None:
        if self._writes[0]():
            self._writes.popleft()
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            self._again_at = _now() + self._pause_s
