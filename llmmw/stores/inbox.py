"""Jobs on their way to a thread.

A thread that sleeps in `SimpleQueue.get` is woken while the sender still holds the interpreter's lock, and goes to
sleep again until that one lets go: two more switches than one that sleeps on an eventfd, whose writing lets go.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import sys
import weakref
from collections import deque
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Inbox(Protocol[T]):
    """What many threads put and one takes, in order."""

    def put(self, item: T, /) -> None:
        """From any thread, and from finalizers."""
        ...

    def get(self, timeout_s: float | None, /) -> T | None:
        """The next one; None where none came in so many seconds (None: wait for ever)."""
        ...

    def empty(self) -> bool:
        """Whether nothing waits."""
        ...


class QueueInbox(Generic[T]):
    """Works everywhere."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self.put = self._items.put
        self.empty = self._items.empty

    def get(self, timeout_s: float | None, /) -> T | None:
        """See `Inbox`."""
        try:
            return self._items.get(timeout=timeout_s) if timeout_s != 0 else self._items.get_nowait()
        except queue.Empty:
            return None


if sys.platform == "linux":

    class EventInbox(Generic[T]):
        """Half the price, on Linux."""

        def __init__(self) -> None:
            self._items: deque[T] = deque()
            self._bell = os.eventfd(0, os.EFD_CLOEXEC)
            self._ears = select.poll()
            self._ears.register(self._bell, select.POLLIN)
            self._asleep = False
            # Not before nobody can ring any more: its number may soon be that of another file.
            self._closing = weakref.finalize(self, os.close, self._bell)
            self._closing.atexit = False
            _boxes.add(self)

        def forked(self) -> None:
            """In a child: who takes from it is the parent's, and so is the bell. Before the child may close it."""
            self._asleep = False
            self._closing()

        def put(self, item: T, /) -> None:
            """See `Inbox`."""
            self._items.append(item)
            if self._asleep:  # not set to False here: the thread may have gone to sleep again meanwhile
                os.eventfd_write(self._bell, 1)

        def empty(self) -> bool:
            """See `Inbox`."""
            return not self._items

        def get(self, timeout_s: float | None, /) -> T | None:
            """See `Inbox`."""
            while not self._items:
                if timeout_s == 0:
                    return None
                self._asleep = True
                # Whoever puts something from here on rings; what was put before is seen. One ring too many is harmless.
                if not self._items:
                    timeout_s = self._sleep(timeout_s)
                self._asleep = False
            return self._items.popleft()

        def _sleep(self, timeout_s: float | None) -> float | None:
            """Until somebody rings, or the time is over; returns what is left of it: all or nothing."""
            if timeout_s is not None and not self._ears.poll(math.ceil(timeout_s * 1000)):
                return 0
            with contextlib.suppress(InterruptedError):  # by a signal: this call, unlike others, is not repeated
                os.eventfd_read(self._bell)
            return timeout_s

    _boxes: weakref.WeakSet[EventInbox[Any]] = weakref.WeakSet()

    def _in_child() -> None:
        for box in list(_boxes):
            box.forked()
        _boxes.clear()

    os.register_at_fork(after_in_child=_in_child)


def inbox() -> Inbox[Any]:
    """The better one of those that work here, where handles for it are left."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return EventInbox()
    return QueueInbox()
