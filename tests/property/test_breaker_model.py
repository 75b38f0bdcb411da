"""The breaker under random schedules, against what SPEC 7 promises: the pure circuit, and the layer in virtual time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from llmmw import errors
from llmmw.algo.circuit import Circuit, CircuitRules, Ticket
from llmmw.call import Call, Reply
from llmmw.env import Env
from llmmw.events import CircuitChanged, Event
from llmmw.layers.breaker import CircuitBreaker
from llmmw.testing.clock import ManualClock, ManualLoop
from llmmw.testing.fake import chat_body, chat_call, error_reply

if TYPE_CHECKING:
    from llmmw.algo.circuit import Result

SCHEDULES = settings(max_examples=120, stateful_step_count=60, derandomize=True, deadline=None)
RULES = CircuitRules(window_s=30, min_calls=6, failure_share=0.5, consecutive=3, open_s=5, max_open_s=60, lease_s=30)
RESULTS: list[Result] = ["ok", "failed", "neutral"]
OUTCOMES = ["ok", "500", "503", "lost", "400", "429", "404", "cancel"]
moments = st.sampled_from([0.0, 0.1, 1.0, 4.9, 5.0, 5.6, 11.0, 29.0, 31.0, 70.0])


class CircuitModel(RuleBasedStateMachine):
    """Calls are admitted, end in any order and any way, or never; time jumps."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Circuit(RULES)
        self.now = 1000.0
        self.seen = self._state()
        self.probes: dict[int, float] = {}
        """Probes of this generation without outcome, and until when each is leased."""
        self.latest = 0
        self.rest_until = 0.0
        self.paced_at = 0.0
        self.openings = 0

    def _state(self) -> tuple[str, int]:
        return self.circuit.state, self.circuit.generation

    @rule(target=tickets, alone=st.booleans())
    def admit(self, alone: bool) -> Ticket:
        before, generation = self._state()
        ticket = self.circuit.admit(self.now, alone=alone)
        free = all(until <= self.now for probe, until in self.probes.items() if probe == self.latest)
        if before == "closed":
            assert ticket is not None
            assert (ticket.generation, ticket.probe) == (generation, 0)
        elif before == "open":
            assert (ticket is not None) is (self.now >= (self.paced_at if alone else self.rest_until))
        else:
            assert (ticket is not None) is free
        if ticket is None:
            assert self.circuit.retry_at(self.now, alone=alone) > self.now - 1e-9
            return Ticket(-1)
        if ticket.probe:
            assert ticket.probe not in self.probes
            assert self.circuit.state == "half_open"
            self.latest = ticket.probe
            self.probes[ticket.probe] = self.now + RULES.lease_s
        self.seen = self._state()
        return ticket

    @rule(
        ticket=consumes(tickets),
        result=st.sampled_from(RESULTS),
        draw=st.sampled_from([0.0, 0.5, 0.999]),
        asked_s=st.sampled_from([None, 1.0, 40.0, 3600.0]),
        decisive=st.booleans(),
    )
    def ends(self, ticket: Ticket, result: Result, draw: float, asked_s: float | None, decisive: bool) -> None:
        (before, generation), rested = self._state(), self.rest_until
        self.circuit.record(ticket, result, self.now, draw=draw, asked_s=asked_s, decisive=decisive)
        after, moved = self._state()
        if ticket.generation != generation or before == "open" or result == "neutral":
            assert (after, moved) == (before, generation)
        if ticket.generation == generation and ticket.probe:
            self.probes.pop(ticket.probe, None)
            assert after == {"ok": "closed", "failed": "open", "neutral": "half_open"}[result]
        if (after, moved) == (before, generation):
            return
        assert moved == generation + 1
        self.probes.clear()
        if after == "closed":
            assert result == "ok"
            self.openings = 0
            self.seen = after, moved
            return
        assert (after, result) == ("open", "failed")
        own = min(RULES.max_open_s, RULES.open_s * 2.0**self.openings)
        rest = min(RULES.max_open_s, max(own, asked_s or 0.0)) * (1 + 0.1 * draw)
        self.openings += 1
        self.rest_until = max(rested, self.now + rest)
        self.paced_at = self.now + min(RULES.max_open_s, max(RULES.open_s, asked_s or 0.0)) * (1 + 0.1 * draw)
        assert self.circuit.retry_at(self.now) == pytest.approx(self.rest_until)
        assert self.circuit.retry_at(self.now) >= rested  # a rest is never cut short
        assert self.circuit.retry_at(self.now) <= max(rested, self.now + RULES.max_open_s * 1.1)
        self.seen = after, moved

    @rule(seconds=moments)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def home_is_lost(self) -> None:
        """A fork, or a new loop: whoever was under way is gone, but may still be heard of."""
        self.circuit.release()
        self.probes.clear()

    @invariant()
    def changes_only_where_the_rules_say(self) -> None:
        assert self._state() == self.seen


class LayerModel(RuleBasedStateMachine):
    """The bound layer with real calls under way on a manual loop."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.loop = ManualLoop(self.clock)
        self.events: list[Event] = []
        env = Env(clock=self.clock, seed=7, sinks=(self.events.append,))
        options = CircuitBreaker(window=30, min_calls=6, consecutive=3, open_for=5, max_open=60, probe_timeout=30)
        self.breaker = options.bind(self.serve, env)
        self.asked: list[tuple[float, str, asyncio.Future[Reply]]] = []
        """Requests under way at the endpoint: since when, in which state they were let in, their answer."""
        self.tasks: list[asyncio.Task[Reply]] = []
        self.healthy_only = True

    async def serve(self, call: Call, /) -> Reply:
        del call
        line = next(iter(self.breaker._endpoints.values()))
        answer: asyncio.Future[Reply] = self.loop.create_future()
        entry = (self.clock.monotonic(), line.circuit.state, answer)
        self.asked.append(entry)
        try:
            return await answer
        finally:
            self.asked.remove(entry)

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        self.tasks = [task for task in self.tasks if not (task.done() and self._checked(task))]

    def _checked(self, task: asyncio.Task[Reply]) -> bool:
        if not task.cancelled():
            error = task.exception()
            assert error is None or isinstance(error, errors.CircuitOpen | errors.ConnectionFailed)
            if isinstance(error, errors.CircuitOpen):
                assert error.retry_at is not None
                assert error.retry_after_s is not None
                assert 0 <= error.retry_after_s <= 66.0 + 1e-6
        return True

    @initialize(count=st.integers(1, 8))
    def crowd(self, count: int) -> None:
        self.ask(count)

    @rule(count=st.integers(1, 20))
    def ask(self, count: int) -> None:
        line = next(iter(self.breaker._endpoints.values()), None)
        before = "closed" if line is None else line.circuit.state
        under_way = len(self.asked)
        self.tasks += [self.loop.create_task(self.breaker(chat_call())) for _ in range(count)]
        self.settle()
        let_in = len(self.asked) - under_way
        assert let_in == count if before == "closed" else let_in <= 1

    @precondition(lambda self: self.asked)
    @rule(
        place=st.integers(0, 99), outcome=st.sampled_from(["ok", "500", "503", "lost", "400", "429", "404", "cancel"])
    )
    def ends(self, place: int, outcome: str) -> None:
        _, _, answer = self.asked[place % len(self.asked)]
        line = next(iter(self.breaker._endpoints.values()))
        before = line.circuit.state
        if outcome == "ok":
            answer.set_result(Reply(data=chat_body("x")))
        elif outcome == "lost":
            answer.set_exception(errors.ConnectionFailed("gone"))
        elif outcome == "cancel":
            answer.cancel()
        else:
            answer.set_result(error_reply(int(outcome)))
        self.settle()
        if outcome in {"400", "404", "429", "cancel"}:
            assert line.circuit.state == before
        self.healthy_only = self.healthy_only and outcome not in {"500", "503", "lost"}

    @precondition(lambda self: self.tasks)
    @rule(place=st.integers(0, 99))
    def caller_leaves(self, place: int) -> None:
        line = next(iter(self.breaker._endpoints.values()))
        before = line.circuit.state
        self.tasks[place % len(self.tasks)].cancel()
        self.settle()
        assert line.circuit.state == before

    @rule(seconds=moments)
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    @invariant()
    def one_probe_at_most_in_a_lease(self) -> None:
        now = self.clock.monotonic()
        line = next(iter(self.breaker._endpoints.values()), None)
        if line is not None and line.circuit.state == "half_open":
            fresh = [since for since, state, _ in self.asked if state == "half_open" and since + 30 > now]
            assert len(fresh) <= 1

    @invariant()
    def an_endpoint_that_only_answers_is_never_left_alone(self) -> None:
        if self.healthy_only:
            assert not [event for event in self.events if isinstance(event, CircuitChanged)]

    @invariant()
    def states_follow_each_other(self) -> None:
        states = [event.state for event in self.events if isinstance(event, CircuitChanged)]
        allowed = {("open", "half_open"), ("half_open", "open"), ("half_open", "closed"), ("closed", "open")}
        assert set(zip(["closed", *states], states, strict=False)) <= allowed

    def teardown(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.settle()
        assert not self.asked
        self.loop.close()


class TestCircuitModel(CircuitModel.TestCase):  # type: ignore[name-defined,misc]  # made by hypothesis
    settings = SCHEDULES


class TestLayerModel(LayerModel.TestCase):  # type: ignore[name-defined,misc]  # made by hypothesis
    settings = settings(SCHEDULES, max_examples=80)
