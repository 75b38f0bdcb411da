"""How many calls of the last seconds succeeded and failed, in constant memory."""

from __future__ import annotations

from collections import deque

_CELLS = 30


class OutcomeWindow:
    """Counts outcomes over a sliding window, in cells of a thirtieth of it.

    Args:
        window_s: length in seconds; an outcome leaves between one window and one window and a cell later.
    """

    __slots__ = ("_cell_s", "_cells", "failed", "total")

    def __init__(self, window_s: float) -> None:
        self._cell_s = window_s / _CELLS
        self._cells: deque[list[int]] = deque()  # cell number, outcomes, failures among them
        self.total = 0
        """Outcomes in the window as of the last `add`."""
        self.failed = 0
        """Failures among them."""

    def add(self, now: float, *, failed: bool) -> None:
        """Count one outcome; time must not run backwards."""
        cell = int(now / self._cell_s)
        self.total += 1
        self.failed += failed
        last = self._cells[-1] if self._cells else None
        if last is not None and last[0] == cell:
            last[1] += 1
            last[2] += failed
            return
        self._cells.append([cell, 1, int(failed)])
        while self._cells[0][0] < cell - _CELLS:
            _, gone, gone_failures = self._cells.popleft()
            self.total -= gone
            self.failed -= gone_failures

    def clear(self) -> None:
        """Forget everything."""
        self._cells.clear()
        self.total = self.failed = 0
