"""A circuit breaker as a pure state machine: closed, open, half open. Time and chance are given.

Outcomes carry the ticket of their admission. The generation moves on with every opening and closing, so what was
admitted before says nothing about the endpoint after.

Failures come fast and answers of language models slowly, so of 64 calls of which a fifth fails the first thirteen
outcomes are failures. "In a row" is therefore meant in the order of admission, and a share is one of all calls, those
under way included: else an endpoint with 20 % of errors, which retries get over, would be left alone most of the time.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llmmw.algo.window import OutcomeWindow

State = Literal["closed", "open", "half_open"]
Result = Literal["ok", "failed", "neutral"]
"""How a call speaks about the endpoint; "neutral" (4xx, 429, cancelled) says nothing and frees the probe."""

Standing = Literal["well", "due", "resting"]
""""due": the next call is a probe."""

_JITTER = 0.1
_MAX_MARKS = 256
"""Outcomes remembered one by one: a run is looked for among those of the last moments."""
_PEEK_AGAIN_S = 1.0
"""While a probe is under way its answer may come any moment: whoever can wait should look again soon."""


class CircuitRules(msgspec.Struct, frozen=True):
    """When a circuit opens, and for how long."""

    window_s: float = 30.0
    min_calls: int = 10
    failure_share: float = 0.5
    consecutive: int = 5
    open_s: float = 5.0
    max_open_s: float = 60.0
    lease_s: float = 30.0
    """A probe without outcome for so long is taken for hung, and the next call may probe."""


class Ticket(msgspec.Struct, frozen=True):
    """An admission; `probe` numbers the probes of a half-open circuit from 1, 0 is an ordinary call."""

    generation: int
    probe: int = 0
    number: int = 0
    """Of the admission."""


class Streak:
    """Runs of failures among calls that end in any order."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: dict[int, bool] = {}
        """Calls, by number, that failed (True) or said nothing (False); others succeeded or are under way."""

    def failed(self, number: int, enough: int) -> int:
        """The run of failures that this one is part of, counted up to `enough`."""
        self._mark(number, failed=True)
        length = 1
        for step in (-1, 1):
            at = number + step
            while length < enough and (mark := self._marks.get(at)) is not None:
                length += mark
                at += step
        return length

    def said_nothing(self, number: int) -> None:
        """The call does not interrupt a run."""
        self._mark(number, failed=False)

    def clear(self) -> None:
        """Forget everything."""
        self._marks.clear()

    def _mark(self, number: int, *, failed: bool) -> None:
        self._marks[number] = failed
        if len(self._marks) > _MAX_MARKS:
            del self._marks[next(iter(self._marks))]


class Circuit:
    """One circuit. Every method is given the time; it must not run backwards."""

    __slots__ = ("_admitted", "_failures_in_row", "_in_flight", "_lease_until", "_open_until", "_paced_at", "_probe",
                 "_rules", "_streak", "_window", "generation", "state", "well_until")  # fmt: skip

    def __init__(self, rules: CircuitRules) -> None:
        self._rules = rules
        self._window = OutcomeWindow(rules.window_s)
        self._streak = Streak()
        self._admitted = self._in_flight = 0
        self._failures_in_row = 0
        self._open_until = self._paced_at = 0.0
        self._lease_until: float | None = None
        self._probe = 0
        self.state: State = "closed"
        self.generation = 0
        self.well_until = 0.0
        """When it last opened after having been closed."""

    def admit(self, now: float, *, alone: bool = False) -> Ticket | None:
        """Let a call through, or None while the endpoint rests (then `retry_at` says until when).

        Args:
            now: the time.
            alone: nobody else can answer, so probes come at the pace of the first rest, however long this one is.
        """
        if self.state == "closed":
            self._in_flight += 1
            self._admitted += 1
            return Ticket(self.generation, 0, self._admitted)
        if self.state == "open":
            if now < (self._paced_at if alone else self._open_until):
                return None
            self.state = "half_open"
        if self._lease_until is not None and now < self._lease_until:
            return None
        self._probe += 1
        self._lease_until = now + self._rules.lease_s
        return Ticket(self.generation, self._probe)

    def standing(self, now: float) -> Standing:
        """Whether a call would be let through now, and whether it would be a probe; asking changes nothing."""
        if self.state == "closed":
            return "well"
        until = self._open_until if self.state == "open" else self._lease_until
        return "due" if until is None or now >= until else "resting"

    def retry_at(self, now: float, *, alone: bool = False) -> float:
        """When a call that was not admitted may come again."""
        if self.state == "open":
            return max(self._paced_at if alone else self._open_until, now)
        return now if self._lease_until is None else min(self._lease_until, now + _PEEK_AGAIN_S)

    def record(
        self,
        ticket: Ticket,
        result: Result,
        now: float,
        *,
        draw: float = 0.0,
        asked_s: float | None = None,
        decisive: bool = False,
    ) -> None:
        """Take in how an admitted call ended.

        Args:
            ticket: from `admit`; one of an older generation is ignored.
            result: what it says about the endpoint.
            now: the time.
            draw: uniform in [0, 1), for the jitter of an opening.
            asked_s: seconds that the server asked for; an opening lasts at least as long.
            decisive: one failure is enough.
        """
        if ticket.generation != self.generation or self.state == "open":
            return
        if self.state == "half_open":
            self._record_probe(ticket, result, now, draw, asked_s)
            return
        self._in_flight -= self._in_flight > 0
        if result == "ok":
            self._window.add(now, failed=False)
        elif result == "neutral":
            self._streak.said_nothing(ticket.number)
        else:
            self._window.add(now, failed=True)
            enough = self._rules.consecutive
            if decisive or self._streak.failed(ticket.number, enough) >= enough or self._fails_often():
                self._open(now, draw, asked_s)

    def leased_until(self) -> float | None:
        """Until when a probe keeps others from probing; None where none does."""
        return self._lease_until if self.state == "half_open" else None

    def renew(self) -> None:
        """Begin anew, for somebody else; what is under way belongs to the past."""
        if self._failures_in_row:
            self._failures_in_row = 0
            self._open_until = self._paced_at = 0.0
        self._turn("closed")

    def release(self) -> None:
        """Calls in flight are lost without outcome (fork, new home loop): free the probe."""
        self._lease_until = None
        self._in_flight = 0

    def _record_probe(self, ticket: Ticket, result: Result, now: float, draw: float, asked_s: float | None) -> None:
        if result == "ok":
            # Also of a probe taken for hung: a slow success is a success, else slow models would stay locked out.
            self._close()
        elif result == "failed":
            self._open(now, draw, asked_s)
        elif ticket.probe == self._probe:
            self._lease_until = None

    def _fails_often(self) -> bool:
        rules, window = self._rules, self._window
        share = rules.failure_share * (window.total + self._in_flight)
        return window.total >= rules.min_calls and window.failed >= share

    def _open(self, now: float, draw: float, asked_s: float | None) -> None:
        rules, asked = self._rules, asked_s or 0.0
        rest = rules.open_s * 2.0 ** min(self._failures_in_row, 30)
        stretch = 1 + _JITTER * draw
        if not self._failures_in_row:
            self.well_until = now
        self._failures_in_row += 1
        self._open_until = max(self._open_until, now + min(max(rest, asked), rules.max_open_s) * stretch)
        self._paced_at = now + min(max(rules.open_s, asked), rules.max_open_s) * stretch
        self._turn("open")

    def _close(self) -> None:
        self._failures_in_row = 0
        self._turn("closed")

    def _turn(self, state: State) -> None:
        self.state = state
        self.generation += 1
        self._lease_until = None
        self._in_flight = 0
        self._streak.clear()
        self._window.clear()
