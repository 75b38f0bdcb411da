from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.call import Call, Reply
from llmmw.env import Env
from llmmw.events import CircuitChanged, Event, RefusedEarly
from llmmw.layers.base import Bound
from llmmw.layers.breaker import BoundBreaker, CircuitBreaker
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Handler


def bound(inner: Handler, clock: ManualClock, events: list[Event] | None = None, **options: object) -> BoundBreaker:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,))
    if isinstance(inner, FakeUpstream):
        inner.start(env)
    return CircuitBreaker(**options).bind(inner, env)  # type: ignore[arg-type]


async def fail(breaker: BoundBreaker, times: int, call: Call | None = None) -> None:
    for _ in range(times):
        with contextlib.suppress(errors.UpstreamError):
            await breaker(call or chat_call())


def states(events: list[Event]) -> list[str]:
    return [event.state for event in events if isinstance(event, CircuitChanged)]


# ── opening and closing ─────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_sick_endpoint_is_left_alone_then_probed(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = FakeUpstream([error_reply(500)] * 5)
    breaker = bound(upstream, clock, events)
    await fail(breaker, 5)
    with pytest.raises(errors.CircuitOpen, match="failed too often for model 'm'") as caught:
        await breaker(chat_call())
    assert len(upstream.calls) == 5
    assert caught.value.retry_after_s is not None
    assert 5.0 <= caught.value.retry_after_s <= 5.5
    assert caught.value.retry_at == clock.monotonic() + caught.value.retry_after_s
    assert breaker.gauges() == {"not_closed": 1, "credentials_not_closed": 0}
    clock.advance(5.5)
    assert (await breaker(chat_call())).ok
    assert (await breaker(chat_call())).ok
    assert states(events) == ["open", "half_open", "closed"]
    assert [event.reason for event in events if isinstance(event, RefusedEarly)] == ["circuit open"]
    assert breaker.gauges() == {"not_closed": 0, "credentials_not_closed": 0}


@pytest.mark.parametrize(
    "sick",
    [
        error_reply(500),
        error_reply(529),
        errors.ConnectionFailed("x"),
        errors.UpstreamTimeout("x"),
        errors.StaleConnection("x"),
        errors.ProtocolError("x"),
    ],
    ids=repr,
)
def test_what_opens(sick: Reply | Exception) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        breaker = bound(FakeUpstream([sick] * 5), clock)
        await fail(breaker, 5)
        with pytest.raises(errors.CircuitOpen):
            await breaker(chat_call())

    run()


@pytest.mark.parametrize(
    "innocent",
    [
        error_reply(400),
        error_reply(404),
        error_reply(429),
        error_reply(413),
        errors.PoolTimeout("x"),
        errors.RateLimited("x"),
        ValueError("the user's own"),
        Reply(data=chat_body("x", finish="content_filter")),
    ],
    ids=repr,
)
def test_what_says_nothing_about_the_endpoint(innocent: Reply | Exception) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        breaker = bound(FakeUpstream([innocent] * 30), clock)
        for _ in range(30):
            with contextlib.suppress(type(innocent) if isinstance(innocent, Exception) else ()):
                await breaker(chat_call())
        assert (await breaker(chat_call())).ok

    run()


@manual_time
async def test_route_13_429_storm_leaves_the_circuit_closed(clock: ManualClock) -> None:
    breaker = bound(FakeUpstream([error_reply(429, retry_after="1")] * 500), clock)
    await asyncio.gather(*(breaker(chat_call()) for _ in range(500)))
    assert (await breaker(chat_call())).ok


@manual_time
async def test_route_12_cancellations_leave_the_circuit_closed(clock: ManualClock) -> None:
    upstream = FakeUpstream(latency_s=5)
    breaker = bound(upstream, clock)
    tasks = [asyncio.ensure_future(breaker(chat_call(str(i)))) for i in range(1000)]
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert upstream.cancelled == 1000
    assert (await breaker(chat_call())).ok


@manual_time
async def test_route_11_half_open_circuit_sends_one_probe(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 5, latency_s=0.5)
    breaker = bound(upstream, clock)
    await fail(breaker, 5)
    await asyncio.sleep(6)
    outcomes = await asyncio.gather(*(breaker(chat_call()) for _ in range(100)), return_exceptions=True)
    assert len(upstream.calls) == 6
    assert sum(isinstance(outcome, errors.CircuitOpen) for outcome in outcomes) == 99
    assert (await breaker(chat_call())).ok


@manual_time
async def test_cancelled_and_refused_probes_free_their_place(clock: ManualClock) -> None:
    upstream = FakeUpstream([*[error_reply(500)] * 5, error_reply(400)], latency_s=0.5)
    breaker = bound(upstream, clock)
    await fail(breaker, 5)
    await asyncio.sleep(6)
    probe = asyncio.ensure_future(breaker(chat_call()))
    await asyncio.sleep(0.1)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    upstream._script.insert(0, error_reply(400))
    assert (await breaker(chat_call())).status == 400
    upstream._script.clear()
    assert (await breaker(chat_call())).ok


@manual_time
async def test_models_and_targets_have_their_own_circuits(clock: ManualClock) -> None:
    def answer(call: Call) -> Reply:
        return error_reply(500) if call.model == "sick" else Reply(data=chat_body("x"))

    breaker = bound(FakeUpstream([answer] * 50), clock)
    await fail(breaker, 5, chat_call(model="sick"))
    with pytest.raises(errors.CircuitOpen):
        await breaker(chat_call(model="sick"))
    assert (await breaker(chat_call(model="well"))).ok
    assert (await breaker(chat_call(model="sick").replace(target="elsewhere"))).status == 500


@manual_time
async def test_circuits_of_endless_model_names_are_bounded(clock: ManualClock) -> None:
    breaker = bound(FakeUpstream(), clock)
    for number in range(3000):
        await breaker(chat_call().replace(model=str(number)))
    assert len(breaker._endpoints) <= 1024


@manual_time
async def test_circuits_of_endless_models_that_all_fail_are_bounded(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503)] * 3000)
    breaker = bound(upstream, clock, consecutive=1)
    for number in range(3000):
        await breaker(chat_call().replace(model=f"m{number}"))
    assert breaker.gauges() == {"not_closed": 1024, "credentials_not_closed": 0}
    with pytest.raises(errors.CircuitOpen):
        await breaker(chat_call().replace(model="m2999"))


@manual_time
async def test_flood_of_models_does_not_make_an_open_circuit_or_a_busy_one_be_forgotten(clock: ManualClock) -> None:
    failing = [error_reply(503)] * 4
    upstream = FakeUpstream([*failing, error_reply(503)])
    breaker = bound(upstream, clock, open_for=50)
    await fail(breaker, 5, chat_call().replace(model="dead"))
    for number in range(5000):
        assert (await breaker(chat_call().replace(model=f"m{number}"))).ok
        if number % 500 == 0:
            await breaker(chat_call().replace(model="busy"))
    with pytest.raises(errors.CircuitOpen):
        await breaker(chat_call().replace(model="dead"))
    assert breaker.rests_since(chat_call().replace(model="dead")) is not None
    assert breaker.rests_since(chat_call().replace(model="busy")) is None
    assert ("http://fake.test/v1", "busy") in breaker._endpoints


@manual_time
async def test_refused_credentials_without_end_are_bounded(clock: ManualClock) -> None:
    breaker = bound(FakeUpstream([error_reply(401)] * 3000), clock)
    for number in range(3000):
        await breaker(chat_call().replace(namespace=f"key {number}"))
    assert breaker.gauges()["credentials_not_closed"] == 1024


@manual_time
async def test_failed_exchange_of_many_calls_is_one_failure(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500).replace(exchange=9)] * 20)
    breaker = bound(upstream, clock)
    await fail(breaker, 20)
    assert (await breaker(chat_call())).ok


@manual_time
async def test_fork_or_new_loop_frees_the_probe(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 5, latency_s=0.5)
    breaker = bound(upstream, clock)
    await fail(breaker, 5)
    await asyncio.sleep(6)
    probe = asyncio.ensure_future(breaker(chat_call()))
    await asyncio.sleep(0.1)
    breaker.rehome()
    assert (await breaker(chat_call())).ok
    await probe


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_stream_is_judged_at_its_end(clock: ManualClock) -> None:
    def broken(_: Call) -> Reply:
        return Reply(chunks=ScriptedChunks([b"x", errors.TruncatedStream("cut")]))

    breaker = bound(FakeUpstream([broken] * 5), clock)
    for _ in range(5):
        reply = await breaker(chat_call(stream=True))
        with pytest.raises(errors.TruncatedStream):
            _ = [chunk async for chunk in reply.chunks or ()]
    with pytest.raises(errors.CircuitOpen):
        await breaker(chat_call())


@manual_time
async def test_reader_who_leaves_says_nothing(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 5)
    breaker = bound(upstream, clock)
    await fail(breaker, 5)
    clock.advance(6)
    reply = await breaker(chat_call(stream=True))
    with pytest.raises(errors.CircuitOpen):
        await breaker(chat_call())
    assert reply.chunks is not None
    await reply.chunks.aclose()
    reply = await breaker(chat_call("a", stream=True))
    assert [chunk async for chunk in reply.chunks or ()] == chat_chunks("echo: a")
    assert breaker.gauges()["not_closed"] == 0


# ── what waits below ────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_opening_sheds_what_waits_below(clock: ManualClock) -> None:
    class Queue(Bound):
        waiting = 0
        failed: list[Exception]

        def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
            assert (call.target, call.model) == ("http://fake.test/v1", "m")
            self.failed = [make_error(), make_error()]
            return 2

    env = Env(clock=clock, seed=1)
    queue = Queue(FakeUpstream([error_reply(500)] * 5), env)
    breaker = bound(Bound(queue, env), clock)
    await fail(breaker, 5)
    first, second = queue.failed
    assert isinstance(first, errors.CircuitOpen)
    assert first is not second


@manual_time
async def test_opening_frees_the_limiters_queue_at_once(clock: ManualClock) -> None:
    from llmmw.layers.limit import RateLimiter
    from llmmw.stack import Stack

    upstream = FakeUpstream([error_reply(500)] * 5, latency_s=1)
    async with Stack(CircuitBreaker(), RateLimiter(concurrency=1)).bind(
        upstream, env=Env(clock=clock, seed=1)
    ) as engine:
        calls = (engine.call(chat_call(str(i))) for i in range(40))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        # The permit of the fifth failure had passed to the next in line before the circuit could open.
        assert len(upstream.calls) <= 6
        assert sum(isinstance(outcome, errors.CircuitOpen) for outcome in outcomes) >= 34
        assert clock.monotonic() <= 1006.0
        await asyncio.sleep(6)
        assert (await engine.call(chat_call())).ok


# ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "refusal", [error_reply(401, code="invalid_api_key"), error_reply(402), error_reply(429, code="insufficient_quota")]
)
def test_route_19_refused_key_rests_alone(refusal: Reply) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        def answer(call: Call) -> Reply:
            return refusal if call.namespace == "key-1" else Reply(data=chat_body("x"))

        events: list[Event] = []
        upstream = FakeUpstream([answer] * 50)
        breaker = bound(upstream, clock, events)
        one, two = chat_call().replace(namespace="key-1"), chat_call().replace(namespace="key-2")
        first = await breaker(one)
        again = await breaker(one)
        assert (again.status, again.data) == (first.status, first.data)
        assert len(upstream.calls) == 1
        assert (await breaker(two)).ok
        assert breaker.gauges() == {"not_closed": 0, "credentials_not_closed": 1}
        clock.advance(6)
        upstream._script[:] = []
        assert (await breaker(one)).ok
        assert breaker.gauges() == {"not_closed": 0, "credentials_not_closed": 0}
        assert states(events) == ["open", "closed"]

    run()


@manual_time
async def test_single_403_may_be_about_one_prompt(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(403)] * 5)
    breaker = bound(upstream, clock)
    await fail(breaker, 4)
    assert len(upstream.calls) == 4
    await fail(breaker, 5)
    assert len(upstream.calls) == 5


class AuthenticationError(Exception):
    status_code = 401


@manual_time
async def test_prompt_that_quotes_a_spent_account_does_not_stop_the_others(clock: ManualClock) -> None:
    quoting = error_reply(400, message="cannot parse: 'Your credit balance is too low'")
    fine = Reply(data=chat_body("x"))
    breaker = bound(FakeUpstream([quoting, fine, fine] * 10), clock)
    assert [(await breaker(chat_call())).status for _ in range(30)] == [400, 200, 200] * 10
    upstream = FakeUpstream([quoting] * 10)
    breaker = bound(upstream, clock)
    for _ in range(10):
        assert (await breaker(chat_call())).status == 400
    assert len(upstream.calls) == 5


@manual_time
async def test_refused_credential_of_an_sdk_gets_a_fresh_copy_of_its_exception(clock: ManualClock) -> None:
    upstream = FakeUpstream([AuthenticationError("no")])
    breaker = bound(upstream, clock)
    seen: list[Exception] = []
    for _ in range(3):
        with pytest.raises(AuthenticationError, match="no") as caught:
            await breaker(chat_call())
        seen.append(caught.value)
    assert len(upstream.calls) == 1
    assert len({id(error) for error in seen}) == 3
    assert seen[2].__cause__ is None


@manual_time
async def test_exception_that_cannot_be_copied_becomes_circuit_open(clock: ManualClock) -> None:
    class Stubborn(AuthenticationError):
        def __str__(self) -> str:
            return str(id(self))

    breaker = bound(FakeUpstream([Stubborn()]), clock)
    with pytest.raises(Stubborn):
        await breaker(chat_call())
    with pytest.raises(errors.CircuitOpen, match=r"refused this credential \(auth, status 401\)"):
        await breaker(chat_call())


@manual_time
async def test_function_with_several_keys_is_not_stopped_by_one(clock: ManualClock) -> None:
    breaker = bound(FakeUpstream([AuthenticationError("key 1")]), clock)
    call = Call("function", "f", {"prompt": "x"}, target="f")
    with pytest.raises(AuthenticationError):
        await breaker(call)
    assert (await breaker(call)).ok


@manual_time
async def test_credential_probe_is_not_spent_on_an_open_endpoint(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(401), *[error_reply(500)] * 5])
    breaker = bound(upstream, clock)
    await breaker(chat_call())
    clock.advance(6)
    await fail(breaker, 1)
    other = chat_call().replace(namespace="other")
    await fail(breaker, 4, other)
    with pytest.raises(errors.CircuitOpen, match="failed too often"):
        await breaker(chat_call())
    with pytest.raises(errors.CircuitOpen, match="failed too often"):
        await breaker(chat_call())


@manual_time
async def test_requests_refused_at_once_by_one_key_trip_it_once(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(401)] * 8, latency_s=0.1)
    breaker = bound(upstream, clock)
    replies = await asyncio.gather(*(breaker(chat_call()) for _ in range(8)))
    assert {reply.status for reply in replies} == {401}
    line = next(iter(breaker._credentials.values()))
    assert line.circuit.generation == 1


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"min_calls": 0},
        {"failure_share": 0},
        {"failure_share": 1.1},
        {"consecutive": 0},
        {"max_open": 1},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        CircuitBreaker(**options)  # type: ignore[arg-type]


def test_settings_compare_and_read_text() -> None:
    assert CircuitBreaker(window="30s", open_for="5s", max_open="1m") == CircuitBreaker()


@manual_time
async def test_security_08_kept_refusal_holds_no_object_of_the_sdk(clock: ManualClock) -> None:
    told = error_reply(401).replace(native=ValueError("the SDK's own, with its request"))
    breaker = bound(FakeUpstream([told]), clock)
    assert (await breaker(chat_call())).native is told.native
    again = await breaker(chat_call())
    assert (again.status, again.data, again.native) == (401, told.data, None)


@manual_time
async def test_calls_of_a_forgotten_model_are_not_charged_to_another(clock: ManualClock) -> None:
    async def slow(_: Call) -> Reply:
        await asyncio.sleep(60)
        return error_reply(500)

    breaker = bound(FakeUpstream([slow] * 5), clock)
    late = [asyncio.ensure_future(breaker(chat_call().replace(model="slow"))) for _ in range(5)]
    await asyncio.sleep(0)
    for number in range(1100):
        await breaker(chat_call().replace(model=f"m{number}"))
    assert {reply.status for reply in await asyncio.gather(*late)} == {500}
    assert breaker.gauges() == {"not_closed": 0, "credentials_not_closed": 0}
    assert (await breaker(chat_call().replace(model="slow"))).ok
