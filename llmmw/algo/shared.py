"""One limit for many processes: what the shared counter decides, and what a process may do when the counter is lost.

The counter keeps one small state per bucket and decides on its own clock; a process holds what it was granted for at
most `hold` seconds before it is used. So the counter's window is longer by as much, and whatever the processes do with
their grants, no window sees more than the limit.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import msgspec

from llmmw.algo.bucket import leak_time

Amounts = tuple[int, ...]
"""One figure per measure: requests first where they are limited, then tokens."""

_CELLS = 256
"""Grants closer than a 256th of the window share a cell; a cell expires with its last grant."""
MEMBER_S = 600.0
"""Who has not asked for ten minutes is no member any more: it ended without a word."""
_MAX_MEMBERS = 10_000
_ROUNDING = 1e-6


class Ask(msgspec.Struct, frozen=True):
    """What a process tells the counter."""

    member: str
    limits: Amounts
    """Per window."""
    window: float
    """Seconds; longer than the limit's own by the time that a grant may be held."""
    burst: int
    """How many requests may be granted at once; 0 where requests are not limited."""
    amounts: Amounts | None = None
    """What is wanted; None: nothing, this only reports."""
    changes: tuple[tuple[float, Amounts], ...] = ()
    """(cell, what is added to it) for grants that cost more or less than was granted."""
    spent: tuple[tuple[float, Amounts], ...] = ()
    """(age in seconds, amounts) spent without the counter while it was lost."""
    leaving: bool = False


class Answer(msgspec.Struct, frozen=True):
    """What the counter says."""

    cell: float | None = None
    """Receipt of the grant, for `Ask.changes`; None: nothing was granted."""
    wait_s: float = 0.0
    """When to ask again, where nothing was granted."""
    members: int = 1
    part: float = 1.0
    """What the asker may take of the limit if the counter is lost: an n-th, or what the others do not yet know that
    they have to leave him. The parts that were told never sum up to more than 1."""
    cells: tuple[tuple[float, Amounts], ...] = ()
    """(age in seconds, amounts) of everything in the window, this grant included."""


class _Cell(msgspec.Struct, array_like=True):
    first: float
    at: float
    amounts: list[int]


class State(msgspec.Struct, array_like=True):
    """What the counter remembers of one bucket. Times are its own clock's."""

    cells: list[_Cell] = []
    paced: float = -1e18
    """Requests are spaced: theoretical arrival time of the next (the GCRA form of a leaky bucket)."""
    members: dict[str, tuple[float, float]] = {}
    """When they last asked, and the part they were told."""


_decoder = msgspec.msgpack.Decoder(State)
_encoder = msgspec.msgpack.Encoder()


def step(old: bytes | None, ask: Ask, now: float) -> tuple[bytes, Answer]:
    """One exchange with the counter, bytes in, bytes out.

    A state that cannot be read counts as a limit just spent: after one window everything is in order again.
    """
    state = State() if old is None else _read(old, ask, now)
    answer = decide(state, ask, now)
    return _encoder.encode(state), answer


def decide(state: State, ask: Ask, now: float) -> Answer:
    """Update the state and answer."""
    _forget(state, ask, now)
    for first, change in ask.changes:
        _change(state, ask, first, change, now)
    if ask.spent:
        told = [_Cell(now - age, now - age, list(amounts)) for age, amounts in ask.spent if 0 <= age < ask.window]
        state.cells = sorted([*state.cells, *told], key=lambda cell: cell.at)
    if ask.leaving:
        state.members.pop(ask.member, None)
    else:
        others = sum(part for name, (_, part) in state.members.items() if name != ask.member)
        part = max(0.0, min(1.0 - others, 1.0 / len(state.members | {ask.member: 0})))
        state.members[ask.member] = now, part
    granted, wait = None, 0.0
    if ask.amounts is not None:
        wait = _wait(state, ask, ask.amounts, now)
        if wait <= 0:
            granted, wait = _grant(state, ask, ask.amounts, now), 0.0
    cells = tuple((now - cell.at, tuple(cell.amounts)) for cell in state.cells)
    _, part = state.members.get(ask.member, (now, 0.0))
    return Answer(granted, wait, max(1, len(state.members)), part, cells)


def _read(old: bytes, ask: Ask, now: float) -> State:
    try:
        state = _decoder.decode(old)
    except (msgspec.DecodeError, RecursionError):
        return State([_Cell(now, now, list(ask.limits))])
    sound = all(math.isfinite(seen) and 0 <= part <= 1 for seen, part in state.members.values()) and all(
        len(cell.amounts) == len(ask.limits) and math.isfinite(cell.at) and math.isfinite(cell.first)
        for cell in state.cells
    )
    return state if sound and not math.isnan(state.paced) else State([_Cell(now, now, list(ask.limits))])


def _forget(state: State, ask: Ask, now: float) -> None:
    edge = now - ask.window
    for cell in state.cells:
        if cell.at > now:  # the clock began anew (a reboot): count it as spent now
            cell.first = cell.at = now
    state.cells = [cell for cell in state.cells if cell.at > edge]
    state.members = {
        name: (min(seen, now), part) for name, (seen, part) in state.members.items() if seen > now - MEMBER_S
    }
    if len(state.members) > _MAX_MEMBERS:
        state.members = {}
    if ask.burst:
        state.paced = min(state.paced, now + ask.burst * _gap(ask))


def _change(state: State, ask: Ask, first: float, change: Amounts, now: float) -> None:
    """What was granted in a cell cost more or less: less is taken from the cell if it still counts, more is due now."""
    if len(change) != len(ask.limits):
        return
    cell = next((cell for cell in state.cells if cell.first == first), None)
    if cell is not None:
        for index, amount in enumerate(change):
            cell.amounts[index] = max(0, cell.amounts[index] + min(0, amount))
        if ask.burst and change[0] < 0:
            state.paced += change[0] * _gap(ask)
    if any(amount > 0 for amount in change):
        _spend(state, ask, tuple(max(0, amount) for amount in change), now)


def _wait(state: State, ask: Ask, amounts: Amounts, now: float) -> float:
    """Seconds until these amounts fit if nothing else is granted."""
    wait = state.paced - (ask.burst - 1) * _gap(ask) - now if ask.burst else 0.0
    for index, (limit, amount) in enumerate(zip(ask.limits, amounts, strict=True)):
        excess = sum(cell.amounts[index] for cell in state.cells) + min(amount, limit) - limit
        for cell in state.cells if excess > 0 else ():
            excess -= cell.amounts[index]
            if excess <= 0:
                wait = max(wait, cell.at + ask.window - now)
                break
    return wait


def _grant(state: State, ask: Ask, amounts: Amounts, now: float) -> float:
    if ask.burst:
        state.paced = max(state.paced, now) + amounts[0] * _gap(ask)
    return _spend(state, ask, amounts, now)


def _spend(state: State, ask: Ask, amounts: Amounts, now: float) -> float:
    last = state.cells[-1] if state.cells else None
    if last is None or now - last.first >= ask.window / _CELLS:
        last = _Cell(now, now, [0] * len(ask.limits))
        state.cells.append(last)
    last.at = now
    last.amounts = [have + more for have, more in zip(last.amounts, amounts, strict=True)]
    return last.first


def _gap(ask: Ask) -> float:
    """Seconds between two requests once the burst is used up."""
    return leak_time(ask.limits[0], ask.burst, ask.window) / ask.burst


class _Own(NamedTuple):
    at: float
    amounts: list[int]


class Share:
    """What one process may spend on its own account while the counter is lost, and for one window after it is back.

    Until what the counter may have granted to others has left the window, that counts against the limit; of the rest
    each member takes the part that he was told. So all members together stay within the limit where the counter was
    lost to all of them. When it is back, others may still spend on their own account what it does not know of, so for
    one window nobody takes more than his part.

    Args:
        processes: how many there are while the counter has never answered.
    """

    def __init__(self, processes: int) -> None:
        self.members = processes
        """How many share, as far as is known."""
        self._assumed = processes
        self._part = 1.0 / processes
        self._told: tuple[tuple[float, Amounts], ...] = ()
        self._asked_at = -math.inf
        self._heard_at = -math.inf
        self._lost_at: float | None = None
        self._until = -math.inf
        self._own: deque[_Own] = deque()
        self._next = -math.inf

    @property
    def is_lost(self) -> bool:
        """Whether the counter did not answer last time."""
        return self._lost_at is not None

    def binds(self, now: float) -> bool:
        """Whether this process may not take more than its part now."""
        return self._lost_at is not None or now < self._until

    def heard(self, ask: Ask, answer: Answer, asked_at: float, now: float) -> None:
        """The counter answered a question asked at that time."""
        self._told, self._asked_at, self._heard_at = answer.cells, asked_at, now
        self.members, self._part = answer.members, answer.part
        if ask.leaving:
            self._asked_at, self._part = -math.inf, 1.0 / max(self._assumed, self.members + 1)
        if self._lost_at is not None:
            self._lost_at, self._until = None, now + ask.window

    def lost(self, now: float) -> None:
        """The counter does not answer (any more)."""
        if self._lost_at is None:
            self._lost_at = now

    def spend(self, amounts: list[int], now: float, ask: Ask) -> None:
        """A call goes out; `amounts` may be changed while it is under way."""
        self._own.append(_Own(now, amounts))
        if ask.burst:
            self._next = now + ask.window / max(1, self._of(ask.limits[0]))

    def spent(self, ask: Ask, now: float) -> tuple[tuple[float, Amounts], ...]:
        """(age, amounts) spent without the counter within the window, for `Ask.spent`."""
        if self._lost_at is None:
            return ()
        self._drop(ask, now)
        found: dict[int, tuple[float, Amounts]] = {}
        for at, amounts in self._own:
            number = int((now - at) / ask.window * _CELLS)
            _, before = found.get(number, (0.0, (0,) * len(amounts)))
            found[number] = (now - at, tuple(a + b for a, b in zip(before, amounts, strict=True)))
        return tuple(found.values())

    def opens_at(self, ask: Ask, amounts: Amounts, now: float) -> float:
        """When these amounts may be spent, or when to ask this again; infinity for never."""
        self._drop(ask, now)
        if now < self._next:
            return self._next
        for index, (limit, amount) in enumerate(zip(ask.limits, amounts, strict=True)):
            part = self._of(limit)
            if not part:
                return math.inf
            free = self._of(limit - self._foreign(ask, index, now))
            if sum(own.amounts[index] for own in self._own) + min(amount, part) > free:
                return self._changes_at(ask, now)
        return now

    def _of(self, amount: int) -> int:
        return int(amount * self._part + _ROUNDING)

    def _foreign(self, ask: Ask, index: int, now: float) -> int:
        """What the counter may have granted, to whomever, within the window that ends now."""
        lost_at = self._lost_at
        if lost_at is None or now >= lost_at + ask.window or self._asked_at == -math.inf:
            return 0  # of a counter that was never heard nothing is known; waiting would not change that
        told = sum(amounts[index] for age, amounts in self._told if self._heard_at - age + ask.window > now)
        untold = ask.limits[index]
        if ask.burst and index == 0:
            untold = math.ceil(ask.burst + (lost_at - self._asked_at) / _gap(ask))
        return min(ask.limits[index], told + untold)

    def _changes_at(self, ask: Ask, now: float) -> float:
        """The next moment at which something leaves the window."""
        moments = [own.at + ask.window for own in self._own]
        if self._lost_at is not None:
            moments += [self._lost_at + ask.window, *(self._heard_at - age + ask.window for age, _ in self._told)]
        return min((at for at in moments if at > now), default=math.inf)

    def _drop(self, ask: Ask, now: float) -> None:
        while self._own and self._own[0].at <= now - ask.window:
            self._own.popleft()
