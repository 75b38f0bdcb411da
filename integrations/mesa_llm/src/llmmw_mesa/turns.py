"""When agents may act in a snapshot step: after everybody has thought, one after another."""

from __future__ import annotations

import threading

from llmmw_mesa.acting import StepAbandoned


class Turns:
    """Who may act, and who waits.

    The first may act when everybody has thought (waits here, or has ended); each further one when the one before has
    ended its step. Every agent runs on a thread of its own, so waiting here holds up nobody else.

    Args:
        count: of agents; their numbers are their order.
    """

    def __init__(self, count: int) -> None:
        self._thinking = count
        self._waiting: dict[int, threading.Event] = {}
        self._thought: set[int] = set()
        self._ended: set[int] = set()
        self._next = 0
        self._lock = threading.Lock()

    def holds(self, number: int) -> bool:
        """Whether it is this one's turn already."""
        with self._lock:
            return not self._thinking and self._next == number

    def wait(self, number: int) -> None:
        """Wait for the turn.

        Raises:
            StepAbandoned: the step was given up meanwhile.
        """
        with self._lock:
            mine = self._waiting.setdefault(number, threading.Event())
            self._has_thought(number)
            if number in self._ended:
                mine.set()
            self._call_next()
        mine.wait()
        if number in self._ended:
            raise StepAbandoned("this step was given up; what it would do now comes too late")

    def done(self, number: int) -> None:
        """This one's step has ended, however. Idempotent."""
        with self._lock:
            self._ended.add(number)
            self._has_thought(number)
            if number in self._waiting:
                self._waiting[number].set()
            self._call_next()

    def _has_thought(self, number: int) -> None:
        if number not in self._thought:
            self._thought.add(number)
            self._thinking -= 1

    def _call_next(self) -> None:
        if self._thinking:
            return
        while self._next in self._ended:
            self._next += 1
        if self._next in self._waiting:
            self._waiting[self._next].set()
