"""Several like servers behind one stack."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import llmmw
from llmmw import (
    Balancer,
    Batcher,
    CircuitBreaker,
    Coalescer,
    ConfigError,
    Context,
    Deadline,
    ErrorRouter,
    Fallback,
    OrderError,
    RateLimiter,
    Replica,
    Retry,
    Stack,
    Timeout,
    TTLCache,
    errors,
)
from llmmw.algo.load import Load
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.replicas import replicas_of
from llmmw.env import Env
from llmmw.events import CircuitChanged, Event, Rerouted
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.call import Call, Outcome, Reply
    from llmmw.engine import Engine

REFUSED = errors.ConnectionFailed


class Server(FakeUpstream):
    """A replica that fails as long as it is told to."""

    def __init__(self, number: int, **options: Any) -> None:
        super().__init__(name=f"http://r{number}.test/v1", **options)
        self.fails: Any = None

    async def _answer(self, call: Call, number: int) -> Reply:
        if self.fails is not None:
            found = self.fails() if callable(self.fails) else self.fails
            if isinstance(found, Exception):
                raise found
            return found
        return await super()._answer(call, number)


def servers(count: int, **options: Any) -> list[Server]:
    return [Server(number, **options) for number in range(count)]


def bound(clock: ManualClock, places: Any, *layers: Any, events: list[Event] | None = None, **options: Any) -> Engine:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,))
    return Stack(Balancer(**options), *layers).bind(places, env=env)


def by(agent: str | None = None, prompt: str = "hello", **options: Any) -> Call:
    return chat_call(prompt, context=Context(agent=agent), **options)


def asked(upstreams: list[Server]) -> list[int]:
    return [len(upstream.calls) for upstream in upstreams]


def figures(engine: Engine) -> list[dict[str, Any]]:
    return list(engine.get_performance_stats()["layers"]["balance"]["replicas"].values())


# ── spreading ───────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_calls_go_where_less_is_under_way(clock: ManualClock) -> None:
    upstreams = [Server(0, latency_s=1), Server(1, latency_s=4)]
    async with bound(clock, upstreams) as engine:

        async def ask_one_after_another() -> None:
            for _ in range(25):
                await engine.call(by())

        await asyncio.gather(*(ask_one_after_another() for _ in range(10)))
    fast, slow = asked(upstreams)
    assert fast + slow == 250
    assert 2.5 < fast / slow < 5.5  # four times as fast


@manual_time
async def test_each_agent_keeps_its_replica_and_all_replicas_have_agents(clock: ManualClock) -> None:
    upstreams = servers(3)
    async with bound(clock, upstreams) as engine:
        for _ in range(5):
            for number in range(12):
                await engine.call(by(f"agent {number}"))
        found = engine.get_performance_stats()["layers"]["balance"]
    homes = [{call.context.agent for call in upstream.calls} for upstream in upstreams]
    assert sum(len(agents) for agents in homes) == 12
    assert all(homes)
    assert (found["at_home"], found["spilled"]) == (60, 0)


@manual_time
async def test_a_home_that_is_too_busy_spills(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=1)
    async with bound(clock, upstreams, room=4, spill=1.5) as engine:
        await asyncio.gather(*(engine.call(by("alice")) for _ in range(20)))
        found = engine.get_performance_stats()["layers"]["balance"]
    assert sorted(asked(upstreams)) == [5, 15]  # 1.5 times the half of 20
    assert (found["at_home"], found["spilled"]) == (15, 5)


@manual_time
async def test_affinity_goes_by_what_it_is_told(clock: ManualClock) -> None:
    upstreams = servers(2)
    async with bound(clock, upstreams, affinity=lambda call: call.context.tenant) as engine:
        for number in range(20):
            await engine.call(chat_call(str(number), context=Context(agent=str(number), tenant="t")))
    assert sorted(asked(upstreams)) == [0, 20]
    upstreams = servers(2)
    async with bound(clock, upstreams, affinity="none") as engine:
        for number in range(20):
            await engine.call(by("alice", str(number)))
    assert min(asked(upstreams)) > 4


@manual_time
async def test_weights_are_shares(clock: ManualClock) -> None:
    upstreams = servers(2)
    async with bound(clock, [Replica(upstreams[0], weight=3), upstreams[1]]) as engine:
        for number in range(200):
            await engine.call(by(prompt=str(number)))
        assert 0.65 < asked(upstreams)[0] / 200 < 0.85
        engine.reconfigure("balance", weights={"http://r0.test/v1": 0})
        before = asked(upstreams)
        for number in range(20):
            await engine.call(by(f"agent {number}"))
        assert asked(upstreams) == [before[0], before[1] + 20]
        assert [each["weight"] for each in figures(engine)] == [0, 1]


@manual_time
async def test_a_drained_replica_is_not_asked_even_where_the_other_fails(clock: ManualClock) -> None:
    upstreams = servers(2)
    async with bound(clock, upstreams) as engine:
        engine.reconfigure("balance", weights={"http://r0.test/v1": 0.0})
        upstreams[1].fails = lambda: REFUSED("down")
        for _ in range(8):
            with pytest.raises(errors.LLMMWError):
                await engine.call(by())
    assert asked(upstreams)[0] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": {"http://elsewhere": 1}}, "no replica 'http://elsewhere'"),
        ({"weights": {"http://r0.test/v1": -1}}, "at least 0"),
        ({"weights": {"http://r0.test/v1": 0, "http://r1.test/v1": 0}}, "above 0"),
        ({"weights": [1, 2]}, "mapping"),
        ({"affinity": "none"}, "cannot change"),
        ({}, "cannot change"),
    ],
)
def test_a_change_that_cannot_work_changes_nothing(changes: dict[str, Any], said: str) -> None:
    engine = Stack().bind(servers(2))
    with pytest.raises(ConfigError, match=said):
        engine.reconfigure("balance", **changes)
    assert [each["weight"] for each in figures(engine)] == [1, 1]


def test_with_two_groups_each_takes_the_weights_of_its_own() -> None:
    primary, fallback = servers(2), [Server(8), Server(9)]
    engine = Stack(ErrorRouter(fallbacks=[fallback]), Balancer()).bind(primary)

    def weights() -> dict[str, float]:
        found = engine.get_performance_stats()["layers"]["balance"]["replicas"]
        return {name.removeprefix("http://r")[:1]: each["weight"] for name, each in found.items()}

    engine.reconfigure("balance", weights={primary[0].name: 0})
    engine.reconfigure("balance", weights={primary[1].name: 2, fallback[1].name: 3})
    known = {"0": 0, "1": 2, "8": 1, "9": 3}
    assert weights() == known
    for changes, said in (
        ({"http://elsewhere": 1, fallback[0].name: 2}, "no replica 'http://elsewhere'"),
        ({primary[1].name: 0, fallback[0].name: 2}, "above 0"),
        ({primary[1].name: 5, fallback[0].name: -1}, "at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            engine.reconfigure("balance", weights=changes)
        assert weights() == known


@manual_time
async def test_a_servers_own_queue_counts(clock: ManualClock) -> None:
    upstreams = servers(2)
    upstreams[0].load = Load(waiting=30)  # type: ignore[attr-defined]
    upstreams[1].load = None  # type: ignore[attr-defined]
    async with bound(clock, upstreams) as engine:
        while not upstreams[0].calls:
            await engine.call(by())
        seen = asked(upstreams)
        for _ in range(10):
            await engine.call(by())
        assert asked(upstreams) == [seen[0], seen[1] + 10]
        clock.advance(20)  # what was said long ago holds no more
        for _ in range(10):
            await engine.call(by())
        assert asked(upstreams)[0] > seen[0]


# ── a failed call goes to another replica ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("failure", "goes_on"),
    [
        (REFUSED("x"), True),
        (error_reply(500), True),
        (error_reply(429, retry_after="60"), True),
        (error_reply(401), True),
        (errors.ProtocolError("html"), True),
        (errors.QueueFull("x"), True),
        (errors.CircuitOpen("x"), True),
        (error_reply(400), False),
        (error_reply(413), False),
        (errors.UpstreamTimeout("x"), False),
        (errors.AmbiguousOutcome("x"), False),
        (errors.DeadlineExceeded("x"), False),
        (errors.Closed("x"), False),
        (ValueError("the user's own"), False),
    ],
    ids=repr,
)
def test_whether_another_replica_is_asked_depends_on_the_class(failure: Any, goes_on: bool) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = servers(2)
        upstreams[0].fails = upstreams[1].fails = failure
        events: list[Event] = []
        async with bound(clock, upstreams, events=events) as engine:
            if isinstance(failure, Exception):
                with pytest.raises(type(failure)) as caught:
                    await engine.call(by())
                assert caught.value is failure
                attempts = getattr(failure, "attempts", ())
            else:
                reply = await engine.call(by())
                assert reply.status == failure.status
                attempts = reply.attempts
            assert [each["in_flight"] for each in figures(engine)] == [0, 0]
        assert sorted(asked(upstreams)) == [int(goes_on), 1]
        if not isinstance(failure, ValueError):
            assert len({attempt.endpoint for attempt in attempts}) == 1 + goes_on
        rerouted = [event for event in events if isinstance(event, Rerouted)]
        assert len(rerouted) == goes_on
        assert clock.monotonic() == 1000.0

    run()


@pytest.mark.parametrize("allowed", ["duplicate_ok", "idempotent"])
def test_a_lost_call_is_made_again_where_that_is_allowed(allowed: str) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = servers(2)
        for upstream in upstreams:
            upstream.capabilities = frozenset({"idempotent"} if allowed == "idempotent" else ())  # type: ignore[attr-defined]
        upstreams[0].fails = lambda: errors.UpstreamTimeout("x", sent=True)
        async with bound(clock, upstreams, duplicate_ok=allowed == "duplicate_ok") as engine:
            while not upstreams[0].calls:
                reply = await engine.call(by())
        assert (reply.text, reply.endpoint) == ("echo: hello", "http://r1.test/v1")
        assert [(attempt.endpoint, attempt.fault) for attempt in reply.attempts] == [("http://r0.test/v1", "ambiguous")]

    run()


@manual_time
async def test_one_attempt_each_then_the_last_repeats_as_retry_allows(clock: ManualClock) -> None:
    upstreams = servers(3)
    for upstream in upstreams:
        upstream.fails = error_reply(503)
    async with bound(clock, upstreams, Retry(attempts=3)) as engine:
        reply = await engine.call(by())
    assert sorted(asked(upstreams)) == [1, 1, 3]
    assert (reply.status, len(reply.attempts)) == (503, 5)


@manual_time
async def test_a_server_that_hangs_is_left_for_the_other(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=0.1)
    for upstream in upstreams:
        upstream.capabilities = frozenset({"idempotent"})  # type: ignore[attr-defined]
    upstreams[0].latency_s = 1e9
    async with bound(clock, upstreams, Retry(), CircuitBreaker(), Timeout(30)) as engine:
        replies = await asyncio.gather(*(engine.call(by(prompt=str(number))) for number in range(30)))
        assert all(reply.endpoint == "http://r1.test/v1" for reply in replies)
        assert 1030 <= clock.monotonic() < 1031
        again = [await engine.call(by(prompt=str(number))) for number in range(30)]
        assert clock.monotonic() < 1035  # ejected, so nobody waits for it again
    assert all(reply.ok for reply in again)


@pytest.mark.parametrize("layers", [(), (TTLCache(60), Coalescer())])
@pytest.mark.parametrize("agent", ["alice", None])
def test_who_answers_nobody_in_time_is_nobodys_home(agent: str | None, layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = servers(2, latency_s=0.1)
        stack = Stack(Deadline(2), *layers, Balancer(), Retry(), CircuitBreaker(), Timeout(30))
        async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
            for number in range(8):
                await engine.call(by(agent, f"well {number}"))
            own = max(upstreams, key=lambda upstream: len(upstream.calls))
            before, own.latency_s = len(own.calls), 1e6
            late = 0
            for number in range(60):
                try:
                    await engine.call(by(agent, f"hung {number}"))
                except errors.DeadlineExceeded:
                    late += 1
            assert late == len(own.calls) - before <= 6  # three, and one in 5 s
            own.latency_s = 0.1
            await asyncio.sleep(5)
            before = len(own.calls)
            for number in range(20):
                await engine.call(by(agent, f"well again {number}"))
            assert len(own.calls) - before > 4

    run()


@manual_time
async def test_replicas_asked_for_one_call_are_bounded(clock: ManualClock) -> None:
    upstreams = servers(8)
    for upstream in upstreams:
        upstream.fails = lambda: REFUSED("x")
    async with bound(clock, upstreams, Retry(attempts=2), attempts=3) as engine:
        with pytest.raises(errors.ConnectionFailed) as caught:
            await engine.call(by())
    assert sum(asked(upstreams)) == 4
    assert len(caught.value.attempts) == 4


@manual_time
async def test_the_first_call_to_a_dead_replica_waits_for_nothing(clock: ManualClock) -> None:
    upstreams = servers(2)
    upstreams[0].fails = lambda: REFUSED("down")
    async with Stack.recommended().bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        replies = [await engine.call(by(prompt=str(number))) for number in range(40)]
    assert all(reply.ok and not reply.fallback and reply.endpoint == "http://r1.test/v1" for reply in replies)
    assert clock.monotonic() == 1000.0
    assert asked(upstreams) == [5, 40]  # ejected after five in a row


@manual_time
async def test_an_error_is_gone_with_whoever_caught_it(clock: ManualClock) -> None:
    upstreams = servers(2)

    def down() -> Reply:
        raise REFUSED("x")

    for upstream in upstreams:
        upstream.fails = down
    async with bound(clock, upstreams) as engine:
        gc.collect()
        gc.disable()
        try:
            kept = None
            try:
                await engine.call(by())
            except errors.ConnectionFailed as error:
                kept = weakref.ref(error)
            await asyncio.sleep(0)
            assert kept is not None
            assert kept() is None
        finally:
            gc.enable()


class Joint(Server):
    """Takes joint requests."""

    capabilities = frozenset({"batch:chat"})

    async def generate_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        raise NotImplementedError


@manual_time
async def test_a_joint_request_that_fails_is_one_failure(clock: ManualClock) -> None:
    upstreams = [Joint(number) for number in range(2)]
    for upstream in upstreams:
        upstream.fails = error_reply(500)
    async with bound(clock, upstreams, Batcher(min_size=2), affinity=lambda _: "all", room=100) as engine:
        replies = await asyncio.gather(*(engine.call(by(None, str(number))) for number in range(40)))
        assert [reply.status for reply in replies] == [500] * 40
        assert [each["ease"] for each in figures(engine)] == [0.5, 0.5]
    assert asked(upstreams) == [1, 1]


@manual_time
async def test_fallbacks_come_after_the_replicas(clock: ManualClock) -> None:
    upstreams, cloud = servers(2), Server(9)
    for upstream in upstreams:
        upstream.fails = error_reply(503)
    stack = Stack(ErrorRouter(fallbacks=[Fallback(cloud, model="big")]), Retry(attempts=2))
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        reply = await engine.call(by().replace(target="http://r0.test/v1"))
        assert (reply.endpoint, reply.fallback) == ("http://r9.test/v1", True)
        assert sorted(asked(upstreams)) == [1, 2]
        assert len(reply.attempts) == 3
        cloud.fails = error_reply(500)
        with pytest.raises(errors.AllEndpointsFailed) as caught:
            await engine.call(by())
        assert len(caught.value.exceptions) == 2  # the replicas are one endpoint
        assert engine.get_performance_stats()["fallbacks"] == 2
    assert cloud.calls[0].model == "big"


@manual_time
async def test_attempts_of_the_router_bound_the_replicas_too(clock: ManualClock) -> None:
    upstreams, cloud = servers(3), Server(9)
    for upstream in (*upstreams, cloud):
        upstream.fails = error_reply(503)
    stack = Stack(ErrorRouter(fallbacks=[cloud], max_total_attempts=2), Retry(attempts=3))
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        assert (await engine.call(by())).status == 503
    assert (sum(asked(upstreams)), len(cloud.calls)) == (2, 0)


@manual_time
async def test_a_fallback_may_have_replicas_of_its_own(clock: ManualClock) -> None:
    first, second, others = Server(8), Server(9), servers(2)
    first.fails = second.fails = lambda: REFUSED("down")
    stack = Stack(ErrorRouter(fallbacks=[[Replica(second, weight=2), *others]]), CircuitBreaker())
    async with stack.bind(first, env=Env(clock=clock, seed=1)) as engine:
        replies = [await engine.call(by(prompt=str(number))) for number in range(30)]
    assert all(reply.fallback for reply in replies)
    assert min(asked(others)) > 5
    assert stack == Stack(ErrorRouter(fallbacks=[(Replica(second, weight=2), *others)]), CircuitBreaker())
    assert hash(stack)


@manual_time
async def test_two_groups_of_replicas_are_told_apart_in_the_statistics(clock: ManualClock) -> None:
    upstreams = servers(4)
    for upstream in upstreams[:2]:
        upstream.fails = lambda: REFUSED("down")
    stack = Stack(ErrorRouter(fallbacks=[upstreams[2:]]), Balancer(), CircuitBreaker(consecutive=2))
    async with stack.bind(upstreams[:2], env=Env(clock=clock, seed=1)) as engine:
        for number in range(12):
            assert (await engine.call(by(f"agent {number}"))).fallback
        layers = engine.get_performance_stats()["layers"]
        assert layers["breaker"]["not_closed"] == 2
        sent = {name: told["requests"] for name, told in layers["balance"]["replicas"].items()}
        assert sent == {
            upstream.name: len(upstream.calls) for upstream in upstreams
        }  # what is refused here is not sent


@manual_time
async def test_a_prompt_too_long_for_one_is_too_long_for_all_and_goes_to_the_larger_fallback(
    clock: ManualClock,
) -> None:
    upstreams, large = servers(2), Server(9)
    for upstream in upstreams:
        upstream.fails = error_reply(400, code="context_length_exceeded")
    stack = Stack(ErrorRouter(fallbacks=[large]))
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        assert (await engine.call(by())).endpoint == "http://r9.test/v1"
    assert sum(asked(upstreams)) == 1


# ── ejection and return ─────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_a_sick_replica_is_ejected_probed_and_eased_in(clock: ManualClock) -> None:
    upstreams, events = servers(2, latency_s=1), list[Event]()
    upstreams[0].fails = lambda: REFUSED("down")
    async with bound(clock, upstreams, events=events, slow_start=20) as engine:

        async def ask(count: int) -> list[int]:
            before = asked(upstreams)
            replies = await asyncio.gather(*(engine.call(by(prompt=str(number))) for number in range(count)))
            assert all(reply.ok for reply in replies)
            return [now - then for now, then in zip(asked(upstreams), before, strict=True)]

        assert (await ask(20))[1] == 20
        assert [each["ejected"] for each in figures(engine)] == [True, False]
        assert figures(engine)[0]["ejections"] == 1
        assert await ask(20) == [0, 20]
        await asyncio.sleep(6)
        assert await ask(20) == [1, 20]  # one probe, and the call was answered elsewhere
        await asyncio.sleep(6)
        assert await ask(20) == [0, 20]  # the second rest is twice as long
        upstreams[0].fails = None
        await asyncio.sleep(6)
        assert await ask(20) == [1, 19]
        assert [each["ejected"] for each in figures(engine)] == [False, False]
        assert await ask(22) == [2, 20]  # a tenth of a replica
        await asyncio.sleep(8)
        first, second = await ask(30)
        assert 5 < first < 12 < second
        await asyncio.sleep(20)
        assert sorted(await ask(20)) == [10, 10]
    states = [event.state for event in events if isinstance(event, CircuitChanged)]
    assert states == ["open", "half_open", "open", "half_open", "closed"]


@manual_time
async def test_agents_of_an_ejected_replica_go_home_again_and_the_others_never_left(clock: ManualClock) -> None:
    upstreams = servers(3)
    agents = [f"agent {number}" for number in range(12)]
    async with bound(clock, upstreams, slow_start=0) as engine:

        async def homes() -> dict[str, str]:
            return {agent: (await engine.call(by(agent))).endpoint for agent in agents}

        before = await homes()
        upstreams[0].fails = lambda: REFUSED("down")
        for _ in range(3):
            without = await homes()
        assert all(place != "http://r0.test/v1" for place in without.values())
        assert all(without[agent] == place for agent, place in before.items() if place != "http://r0.test/v1")
        upstreams[0].fails = None
        await asyncio.sleep(10)
        await homes()  # somebody's call is the probe
        assert await homes() == before


@manual_time
async def test_a_replica_that_is_sick_for_one_model_serves_the_others(clock: ManualClock) -> None:
    upstreams = servers(2)
    whole = Server._answer

    async def no_lora(self: Server, call: Call, number: int) -> Reply:
        return error_reply(500) if call.model == "lora" else await whole(self, call, number)

    upstreams[0]._answer = no_lora.__get__(upstreams[0])  # type: ignore[method-assign]
    async with bound(clock, upstreams) as engine:
        while not figures(engine)[0]["ejected"]:
            assert (await engine.call(by(model="lora"))).ok
        seen = [call.model for call in upstreams[0].calls].count("lora")
        assert seen == 5
        for _ in range(20):
            await engine.call(by(model="base"))
        assert [call.model for call in upstreams[0].calls].count("base") > 0
        assert figures(engine)[0]["ejected"]
        clock.advance(7)
        await engine.call(by("agent", model="base"))
        for number in range(30):
            await engine.call(by(f"agent {number}", model="base"))
        assert not figures(engine)[0]["ejected"]  # its rest is over, though nobody has asked for that model since
        await engine.call(by(model="lora"))
        assert [call.model for call in upstreams[0].calls].count("lora") == seen + 1


@manual_time
async def test_all_resting_is_an_open_circuit_that_says_when(clock: ManualClock) -> None:
    upstreams = servers(2)
    for upstream in upstreams:
        upstream.fails = lambda: REFUSED("down")
    async with bound(clock, upstreams, slow_start=0) as engine:
        for _ in range(12):
            with pytest.raises(errors.LLMMWError):
                await engine.call(by())
        with pytest.raises(errors.CircuitOpen) as caught:
            await engine.call(by())
        assert caught.value.retry_at is not None
        assert 1000 < caught.value.retry_at <= 1006
        assert {attempt.endpoint for attempt in caught.value.attempts} == {upstream.name for upstream in upstreams}
        assert asked(upstreams) == [5, 5]


@manual_time
async def test_with_a_deadline_the_first_to_return_is_waited_for(clock: ManualClock) -> None:
    upstreams = servers(2)
    for upstream in upstreams:
        upstream.fails = lambda: REFUSED("down")
    stack = Stack(ErrorRouter(), Balancer(), CircuitBreaker(open_for=5))
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        for _ in range(12):
            with pytest.raises(errors.LLMMWError):
                await engine.call(by())
        upstreams[1].fails = None
        reply = await engine.call(chat_call(context=Context(deadline=clock.monotonic() + 30)))
        assert reply.endpoint == "http://r1.test/v1"
        assert 1005 <= clock.monotonic() < 1012


@manual_time
async def test_when_all_rest_for_long_the_one_that_was_well_last_is_probed_at_a_pace(clock: ManualClock) -> None:
    upstreams = servers(2)
    async with bound(clock, upstreams, CircuitBreaker(open_for=5, max_open=600), slow_start=0) as engine:

        async def ask_for(seconds: int) -> None:
            for _ in range(seconds):
                with pytest.raises(errors.LLMMWError):
                    await engine.call(by())
                await asyncio.sleep(1)

        upstreams[0].fails = lambda: REFUSED("down")
        while not figures(engine)[0]["ejected"]:
            await engine.call(by())
        upstreams[1].fails = lambda: REFUSED("down")
        await ask_for(400)
        seen = asked(upstreams)
        await ask_for(100)
        probes = [now - then for now, then in zip(asked(upstreams), seen, strict=True)]
        assert probes[0] <= 2
        assert probes[1] >= 12  # every five seconds or so, however long its rest would be
        upstreams[1].fails = None
        await asyncio.sleep(6)
        assert (await engine.call(by())).ok


@manual_time
async def test_where_a_fallback_answers_nobody_is_probed_at_a_pace(clock: ManualClock) -> None:
    upstreams, cloud = servers(2), Server(9)
    for upstream in upstreams:
        upstream.fails = lambda: REFUSED("down")
    stack = Stack(ErrorRouter(fallbacks=[cloud]), Balancer(), CircuitBreaker(open_for=5, max_open=600))
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        for _ in range(400):
            assert (await engine.call(by())).fallback
            await asyncio.sleep(1)
    assert sum(asked(upstreams)) < 10 + 2 * 8


@manual_time
async def test_a_refused_key_of_one_replica_costs_no_call(clock: ManualClock) -> None:
    upstreams = servers(2)
    upstreams[0].fails = error_reply(401)
    async with bound(clock, upstreams, CircuitBreaker()) as engine:
        for _ in range(30):
            assert (await engine.call(by())).ok
    assert asked(upstreams) == [1, 30]


@manual_time
async def test_a_stack_without_breaker_has_a_circuit_per_replica_all_the_same(clock: ManualClock) -> None:
    upstreams = servers(2)
    upstreams[0].fails = error_reply(500)
    async with Stack().bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        for _ in range(40):
            assert (await engine.call(by())).ok
    assert asked(upstreams) == [5, 40]


# ── rate limits ─────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_a_replica_without_room_sends_the_call_to_one_with(clock: ManualClock) -> None:
    upstreams = servers(2)
    async with bound(clock, upstreams, Retry(), RateLimiter(rpm=60)) as engine:
        replies = await asyncio.gather(*(engine.call(by("alice", str(number))) for number in range(10)))
        assert clock.monotonic() < 1000.5
    assert all(reply.ok for reply in replies)
    assert min(asked(upstreams)) > 0


@manual_time
async def test_where_none_has_room_the_first_that_will_is_waited_for(clock: ManualClock) -> None:
    upstreams = servers(2)
    upstreams[0].fails = error_reply(429, retry_after="300")
    upstreams[1].fails = error_reply(429, retry_after="7")
    async with bound(clock, upstreams, Retry(rate_patience=600), RateLimiter(rpm=6000)) as engine:
        asking = asyncio.ensure_future(engine.call(by()))
        await asyncio.sleep(1)
        for upstream in upstreams:
            upstream.fails = None
        reply = await asking
        assert reply.endpoint == "http://r1.test/v1"
        assert 1007 <= clock.monotonic() < 1015
        reply = await engine.call(by())  # and nobody stumbles over the other one for long
        assert clock.monotonic() < 1015


@manual_time
async def test_without_anybody_who_waits_a_429_of_all_is_the_answer(clock: ManualClock) -> None:
    upstreams = servers(2)
    for upstream in upstreams:
        upstream.fails = error_reply(429, retry_after="7")
    async with bound(clock, upstreams) as engine:
        assert (await engine.call(by())).status == 429
    assert asked(upstreams) == [1, 1]


@pytest.mark.parametrize("alive", [1, 2])
def test_who_was_given_all_the_patience_is_not_asked_all_over_again(alive: int) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = servers(2)
        for upstream in upstreams:
            upstream.fails = error_reply(429)
        async with bound(clock, upstreams, Retry(attempts=3, backoff=0.1, rate_patience=0)) as engine:
            engine.reconfigure(
                "balance", weights=dict(zip([one.name for one in upstreams[alive:]], [0.0], strict=False))
            )
            reply = await engine.call(by())
            assert (reply.status, len(reply.attempts)) == (429, sum(asked(upstreams)))
        assert sorted(asked(upstreams)) == ([0, 3] if alive == 1 else [3, 4])

    run()


# ── streams, cancellation, hedging ──────────────────────────────────────────────────────────────────────────────────


async def text_of(reply: Reply) -> bytes:
    assert reply.chunks is not None
    return b"".join([chunk async for chunk in reply.chunks if isinstance(chunk, bytes)])


@pytest.mark.parametrize("layers", [(), (Retry(),)], ids=["bare", "retry"])
def test_a_stream_that_breaks_before_its_first_token_comes_from_another(layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = servers(2)
        broken = lambda: llmmw.Reply(chunks=ScriptedChunks([errors.AmbiguousOutcome("reset")]))  # noqa: E731
        for upstream in upstreams:
            upstream.capabilities = frozenset({"idempotent"})  # type: ignore[attr-defined]
        upstreams[0].fails = broken
        async with bound(clock, upstreams, *layers) as engine:
            while not upstreams[0].calls:
                reply = await engine.call(by(stream=True))
                text = await text_of(reply)
            assert b"echo" in text
            assert text.endswith(b"[DONE]\n\n")
            assert [each["in_flight"] for each in figures(engine)] == [0, 0]
            assert figures(engine)[0]["failures"] == 1

    run()


@pytest.mark.parametrize("layers", [(), (Retry(),)], ids=["bare", "retry"])
def test_a_stream_is_under_way_until_it_is_read_and_breaks_with_what_it_had(layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        chunks = chat_chunks("one two three")
        upstreams = servers(2)
        for upstream in upstreams:
            upstream.fails = lambda: llmmw.Reply(chunks=ScriptedChunks([*chunks[:2], errors.AmbiguousOutcome("reset")]))
        async with bound(clock, upstreams, *layers) as engine:
            reply = await engine.call(by(stream=True))
            assert sum(each["in_flight"] for each in figures(engine)) == 1
            with pytest.raises(errors.StreamInterrupted) as caught:
                await text_of(reply)
            assert caught.value.partial == "one two"
            assert sum(each["in_flight"] for each in figures(engine)) == 0
            assert sum(each["failures"] for each in figures(engine)) == 1
            for upstream in upstreams:
                upstream.fails = None
            reply = await engine.call(by(stream=True))
            assert reply.chunks is not None
            await reply.chunks.aclose()
            await text_of(await engine.call(by(stream=True)))
            assert [each["in_flight"] for each in figures(engine)] == [0, 0]

    run()


@manual_time
async def test_cancelled_calls_are_not_under_way_and_hurt_nobody(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=100)
    async with bound(clock, upstreams) as engine:
        tasks = [asyncio.ensure_future(engine.call(by())) for _ in range(20)]
        await asyncio.sleep(1)
        assert [each["in_flight"] for each in figures(engine)] == [10, 10]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [each["in_flight"] for each in figures(engine)] == [0, 0]
        assert [each["failures"] for each in figures(engine)] == [0, 0]


@manual_time
async def test_a_hedge_goes_to_another_replica(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=1)
    async with bound(clock, upstreams, Retry(hedge=True, attempts=2)) as engine:
        agent = "alice"
        for number in range(60):
            await engine.call(by(agent, str(number), temperature=0))
        own = max(upstreams, key=lambda upstream: len(upstream.calls))
        other = upstreams[1 - upstreams.index(own)]
        assert asked([other]) == [0]
        own.latency_s = 50
        reply = await engine.call(by(agent, "slow", temperature=0))
        assert (reply.endpoint, reply.ok) == (other.name, True)
        assert other.calls[0].context.agent == agent
        stats = engine.get_performance_stats()["layers"]
        assert (stats["retry"]["hedges"], stats["retry"]["hedges_won"]) == (1, 1)
    assert own.cancelled == 1
    assert clock.monotonic() < 1070


@manual_time
async def test_a_hedge_stays_where_no_other_is_well_and_its_failure_is_told(clock: ManualClock) -> None:
    upstreams = servers(3, latency_s=1)
    async with bound(clock, upstreams, Retry(hedge=True, attempts=2)) as engine:
        for number in range(60):
            await engine.call(by("alice", str(number), temperature=0))
        own = max(upstreams, key=lambda upstream: len(upstream.calls))
        own.latency_s = 5
        for upstream in upstreams:
            if upstream is not own:
                upstream.fails = lambda: REFUSED("down")
        reply = await engine.call(by("alice", "slow", temperature=0))
        assert (reply.endpoint, reply.ok) == (own.name, True)
        assert sorted(each["failures"] for each in figures(engine)) == [0, 0, 1]
        assert [each["in_flight"] for each in figures(engine)] == [0, 0, 0]


@manual_time
async def test_an_answer_from_beside_says_nothing_good_of_who_hangs(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=1)
    async with bound(clock, upstreams, Retry(hedge=True, attempts=2), CircuitBreaker(open_for=5)) as engine:
        for number in range(60):
            await engine.call(by("alice", str(number), temperature=0))
        own = max(upstreams, key=lambda upstream: len(upstream.calls))
        own.fails = lambda: REFUSED("down")
        for number in range(5):
            await engine.call(by("alice", f"down {number}", temperature=0))
        own.fails, own.latency_s = None, 50
        await asyncio.sleep(6)
        for number in range(3):  # each a probe that hangs, and is answered from beside
            reply = await engine.call(by("alice", f"slow {number}", temperature=0))
            assert reply.endpoint != own.name
        (told,) = (each for each in figures(engine) if each["ejections"])
        assert (told["ejected"], told["ejections"]) == (True, 1)


# ── one server to the cache ─────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_the_coalescer_joins_and_the_cache_hits_across_replicas(clock: ManualClock) -> None:
    upstreams = servers(3, latency_s=1)
    stack = Stack(TTLCache(300), Coalescer())
    async with stack.bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        await asyncio.gather(*(engine.call(by(f"agent {number}")) for number in range(30)))
        await engine.call(by("another"))
    assert sum(asked(upstreams)) == 1


def test_replicas_are_known_by_the_first_name_in_whatever_order() -> None:
    urls = ["http://h:10000/v1", "http://h:8001/v1", "http://h:8000/v1"]
    names = {replicas_of([*urls[turn:], *urls[:turn]]).name for turn in range(3)}
    assert names == {"http://h:8000/v1"}
    assert replicas_of([*urls, "http://h:9000/v1"]).name == "http://h:8000/v1"
    assert replicas_of(urls[2]).name == "http://h:8000/v1"
    assert replicas_of(urls, alias="llama").name == "llama"
    with_words = ["http://b10/v1", "http://b2/v1", "https://a/v1", "http://c/v1"]
    assert replicas_of(with_words).name == "http://b2:80/v1"


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "at least one"),
        (["http://h/v1", "http://h/v1/"], "named twice"),
        ([same := Server(1), same], "named twice"),
        (["http://h/v1", ["http://i/v1"]], "expected a base URL"),
        ([7], "expected a base URL"),
    ],
    ids=["none", "url", "object", "nested", "number"],
)
def test_a_list_that_cannot_work_is_refused(places: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Stack().bind(places)


@pytest.mark.parametrize("place", [{"http://h/v1", "http://i/v1"}, {"http://h/v1": 2}, ["http://h/v1", 7], None])
def test_a_client_says_what_it_takes(place: Any) -> None:
    with pytest.raises(ConfigError, match=r"base_url: must be a URL .* or a list of such; got"):
        llmmw.Client(place)


def test_two_credentials_at_one_url_are_two_replicas() -> None:
    found = replicas_of([HTTPEndpoint("http://h/v1", "one"), HTTPEndpoint("http://h/v1", "two")])
    assert found.labels == ("http://h:80/v1", "http://h:80/v1 #2")
    assert found.asker.credential == "\nauthorization: Bearer one"


def test_servers_that_are_asked_differently_are_no_replicas() -> None:
    places = [HTTPEndpoint("http://a/v1?api-version=1"), HTTPEndpoint("http://b/v1?api-version=2")]
    with pytest.raises(ConfigError, match="no replicas"):
        _ = replicas_of(places).asker
    with pytest.raises(ConfigError, match="no replicas"):
        llmmw.Client(places)


# ── in the stack ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_balancer_stands_inside_the_router_and_outside_what_is_kept_per_replica() -> None:
    for layers in ([Retry(), Balancer()], [Balancer(), ErrorRouter()], [Balancer(), TTLCache(1)]):
        with pytest.raises(OrderError):
            Stack(*layers)
    Stack(TTLCache(1), Coalescer(), ErrorRouter(), Balancer(), Retry(), CircuitBreaker(), RateLimiter(rpm=1))


@pytest.mark.parametrize(
    "stack",
    [
        Stack(Balancer(), ErrorRouter(), allow=("route-outside-balance",)),
        Stack(Balancer(), ErrorRouter(fallbacks=["http://f/v1"]), allow=("route-outside-balance",)),
    ],
)
def test_an_order_that_only_an_exception_allows_cannot_be_bound(stack: Stack) -> None:
    with pytest.raises(ConfigError, match="inside"):
        stack.bind(servers(2))


def test_explain_prints_the_replicas_and_the_balancer_they_need() -> None:
    text = Stack.recommended().explain(["http://a/v1", Replica("http://b/v1", weight=2)])
    lines = text.splitlines()
    roles = [line.split()[1] for line in lines if line.startswith("  ↓")]
    assert roles[:4] == ["coalesce", "route", "balance", "retry"]
    at = lines.index("endpoint, by the cache known as http://a:80/v1, one of")
    assert lines[at + 1 : at + 3] == ["  http://a:80/v1  weight 1", "  http://b:80/v1  weight 2"]
    assert "kept per replica" in text
    assert "endpoint http://a:80/v1" in Stack().explain("http://a/v1")
    assert Stack().explain() == "call\nendpoint"
    client = llmmw.Client(["http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"], name="llama")
    assert "known as llama, one of" in client.explain()
    assert llmmw.SyncClient("http://127.0.0.1:9/v1").explain().count("balance") == 0


def test_an_engine_names_each_layer_once() -> None:
    engine = Stack(Coalescer(), Balancer(), Retry(), CircuitBreaker()).bind(servers(3))
    named = "coalesce > balance > retry > breaker -> http://r0.test/v1, http://r1.test/v1, http://r2.test/v1"
    assert repr(engine) == f"Engine({named})"


@manual_time
async def test_one_endpoint_has_nothing_to_choose(clock: ManualClock) -> None:
    upstream = Server(0)
    async with bound(clock, [upstream], Retry()) as engine:
        await engine.call(by("alice").replace(target="as it was"))
        assert "balance" not in engine.get_performance_stats()["layers"]
    assert upstream.calls[0].target == "as it was"
    layer = Balancer().bind(upstream, Env(clock=clock))
    assert (await layer(by())).ok


@manual_time
async def test_a_name_alone_gives_nobody_a_circuit(clock: ManualClock) -> None:
    (upstream,) = servers(1)
    upstream.fails = error_reply(500)
    engine = Stack().bind(replicas_of(upstream, alias="mine"), env=Env(clock=clock, seed=1))
    assert [(await engine.call(by(None, str(number)))).status for number in range(8)] == [500] * 8
    await engine.aclose()


@manual_time
async def test_functions_and_endpoints_of_all_kinds_are_replicas(clock: ManualClock) -> None:
    async def here(call: Call) -> Reply:
        return llmmw.Reply(data=b'{"choices": [{"message": {"content": "here"}}]}')

    async def there(call: Call) -> Reply:
        return llmmw.Reply(data=b'{"choices": [{"message": {"content": "there"}}]}')

    async with bound(clock, [here, there, Server(1), Replica(Server(2))], affinity="none") as engine:
        texts = Counter([(await engine.call(by())).text for _ in range(80)])
    assert set(texts) == {"here", "there", "echo: hello"}
    assert min(texts.values()) > 5


@manual_time
async def test_every_replica_has_limits_of_its_own_and_all_are_changed_together(clock: ManualClock) -> None:
    upstreams = servers(2, latency_s=1)
    async with bound(clock, upstreams, RateLimiter(concurrency=2)) as engine:
        await asyncio.gather(*(engine.call(by(prompt=str(number))) for number in range(8)))
        assert [upstream.peak for upstream in upstreams] == [2, 2]
        assert engine.get_performance_stats()["layers"]["limit"]["concurrency"] == 4  # of both
        engine.reconfigure("limit", concurrency=4)
        await asyncio.gather(*(engine.call(by(prompt=str(number))) for number in range(16)))
        assert [upstream.peak for upstream in upstreams] == [4, 4]
        engine.tick()
        engine.begin_run()
    assert all(upstream.closed for upstream in upstreams)


def test_a_new_loop_begins_with_nothing_under_way_and_keeps_who_is_ejected() -> None:
    clock = ManualClock()
    upstreams = servers(2, latency_s=50)
    engine = bound(clock, upstreams)

    async def leave_some_behind() -> None:
        upstreams[0].fails = lambda: REFUSED("down")
        upstreams[0].latency_s = 0
        tasks = [asyncio.ensure_future(engine.call(by())) for _ in range(30)]
        await asyncio.sleep(1)
        assert figures(engine)[0]["ejected"]
        assert len(tasks) == 30

    async def go_on() -> None:
        assert [each["in_flight"] for each in figures(engine)] == [0, 0]
        assert figures(engine)[0]["ejected"]
        assert (await engine.call(by())).endpoint == "http://r1.test/v1"
        assert [each["in_flight"] for each in figures(engine)] == [0, 0]
        await engine.aclose()

    clock.run(leave_some_behind())
    clock.run(go_on())


@manual_time
async def test_disabled_layers_leave_the_choice(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMMW_DISABLE", "1")
    upstreams = servers(2)
    async with Stack(TTLCache(300), Retry()).bind(upstreams, env=Env(clock=clock, seed=1)) as engine:
        for _ in range(20):
            await engine.call(by())
    assert min(asked(upstreams)) > 3
