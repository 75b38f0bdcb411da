"""How much may be spent now: an exact sliding window of units, and the arithmetic of a leaky bucket."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CELLS = 1024
"""Entries closer than a 1024th of the window share a cell: memory is bounded, a cell expires with its last entry."""

MAX_BURST = 50
"""Providers' burst allowances do not grow with the limit (60 RPM may be enforced as 1/s; 12,000 RPM as 200/s)."""

_STEADY_SHARE = 0.98


class Cell:
    """Units spent at (nearly) one moment; handed back when the reservation is settled."""

    __slots__ = ("amount", "at", "first", "live")

    def __init__(self, at: float, amount: int) -> None:
        self.first = at
        self.at = at
        self.amount = amount
        self.live = True


class Ledger:
    """Units spent in the last `window` seconds; never lets more than `limit` be admitted in any such window.

    One amount above the whole limit fits when the window is empty, and is then a debt until it has left it.
    """

    __slots__ = ("_cells", "_foreign", "_foreign_until", "_grain", "_sum", "limit", "window")

    def __init__(self, limit: int, window: float) -> None:
        self.limit = limit
        self.window = window
        self._grain = window / _CELLS
        self._cells: deque[Cell] = deque()
        self._sum = 0
        self._foreign = 0
        self._foreign_until = 0.0

    def used(self, now: float) -> int:
        """Units in the window that ends now, others' known use of the same limit included."""
        cells, edge = self._cells, now - self.window
        while cells and cells[0].at <= edge:
            cell = cells.popleft()
            cell.live = False
            self._sum -= cell.amount
        if self._foreign and now >= self._foreign_until:
            self._foreign = 0
        return self._sum + self._foreign

    def fits(self, amount: int, now: float) -> bool:
        """Whether this amount may be spent now."""
        limit = self.limit
        return self.used(now) + (min(limit, amount)) <= limit

    def when(self, amount: int, now: float) -> float:
        """The earliest time at which this amount fits if nothing else is spent until then."""
        excess = self.used(now) + min(amount, self.limit) - self.limit
        if excess <= 0:
            return now
        foreign = self._foreign
        for cell in self._cells:
            at = cell.at + self.window
            if foreign and self._foreign_until <= at:
                excess, foreign = excess - foreign, 0
                if excess <= 0:
                    return self._foreign_until
            excess -= cell.amount
            if excess <= 0:
                return at
        if foreign and excess <= foreign:
            return self._foreign_until
        return now + self.window

    def spend(self, amount: int, now: float) -> Cell:
        """Record a spending; the cell is the receipt for `settle`."""
        self._sum += amount
        last = self._cells[-1] if self._cells else None
        if last is not None and now - last.first < self._grain:
            last.amount += amount
            last.at = now
            return last
        cell = Cell(now, amount)
        self._cells.append(cell)
        return cell

    def settle(self, cell: Cell, reserved: int, actual: int, now: float) -> None:
        """Replace a reservation by what it really cost: more is spent now, less is given back."""
        self.used(now)
        if actual > reserved:
            self.spend(actual - reserved, now)
        elif cell.live:
            cell.amount -= reserved - actual
            self._sum -= reserved - actual

    def observe(self, remaining: int, started: float, now: float, reset_s: float | None) -> None:
        """The server said how many units are left, in the answer to the request that started then.

        Where that is less than our own record up to that request leaves, others spend under the same limit; the
        difference counts until the reset or the next view.
        """
        own = self.used(now) - self._foreign
        for cell in reversed(self._cells):
            if cell.at <= started:
                break
            own -= cell.amount
        self._foreign = max(0, self.limit - own - remaining)
        self._foreign_until = now + min(self.window if reset_s is None else reset_s, self.window)

    def record(self, now: float) -> list[tuple[float, int]]:
        """(age in seconds, units) of what is in the window, oldest first. Changes nothing."""
        return [(now - cell.at, cell.amount) for cell in list(self._cells) if now - cell.at < self.window]


def burst_of(limit: int, burst: int | None = None) -> int:
    """How many of `limit` requests may leave at once: a twelfth, at least 1, at most 50, unless told."""
    return min(limit, burst) if burst is not None else max(1, min(limit // 12, MAX_BURST))


def leak_time(limit: int, burst: int, window: float) -> float:
    """Seconds in which a bucket of `burst` leaks empty, such that burst + leak stay within `limit` per window.

    In any half-open window a bucket that holds `burst` and leaks (limit + 1 - burst) per window admits fewer than
    limit + 1, so at most limit.
    """
    return burst * window / (limit + 1 - burst)


def steady_time(limit: int, burst: int, window: float) -> float:
    """Seconds in which a bucket of `burst` leaks empty where a `Ledger` keeps the limit as well.

    A burst of a twelfth is a twelfth of the throughput in `leak_time`. The ledger lets no window exceed the limit, so
    the bucket need not; it leaves 2 % of it free, for requests that take longer to the server than those behind.
    """
    return burst * window / max(limit + 1 - burst, _STEADY_SHARE * limit)


def prefill(record: Iterable[tuple[float, int]], limit: int, burst: int, window: float) -> float:
    """The level, within [0, burst], at which a new bucket must start so that old and new admissions fit one limit.

    Args:
        record: (age in seconds, admissions) within the window, oldest first.
        limit: admissions per window.
        burst: size of the bucket.
        window: seconds.
    """
    rate = (limit + 1 - burst) / window
    remaining, level = 0, 0.0
    for age, amount in reversed(list(record)):
        remaining += amount
        level = max(level, burst + rate * (window - age) + remaining - limit - 1)
    return min(level, float(burst))
