from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.call import Call, Context, Reply
from llmmw.env import Env
from llmmw.events import Event, FellBack, RefusedEarly
from llmmw.layers.base import Bound, ForkingLayer
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.retry import Retry
from llmmw.layers.route import BoundRouter, ErrorRouter, Fallback
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    from llmmw.layers.base import Layer


def fakes(*scripts: list[object]) -> list[FakeUpstream]:
    return [FakeUpstream(script, name=f"http://e{number}.test/v1") for number, script in enumerate(scripts)]  # type: ignore[arg-type]


def bound(
    upstreams: list[FakeUpstream],
    clock: ManualClock,
    *inside: Layer,
    events: list[Event] | None = None,
    entries: list[object] | None = None,
    **options: object,
) -> BoundRouter:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,))
    targets = []
    for upstream in upstreams:
        upstream.start(env)
        handler = upstream
        for layer in reversed(inside):
            handler = layer.bind(handler, env)
        targets.append(handler)
    router = ErrorRouter(fallbacks=entries or upstreams[1:], **options)  # type: ignore[arg-type]
    return router.bind_fork(targets, env)


def asked(upstreams: list[FakeUpstream]) -> list[int]:
    return [len(upstream.calls) for upstream in upstreams]


def primary_call(**options: object) -> Call:
    return chat_call(**options).replace(target="http://e0.test/v1")  # type: ignore[arg-type]


# ── falling back ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("failure", "goes_on"),
    [
        (errors.ConnectionFailed("x"), True),
        (error_reply(500), True),
        (error_reply(429), True),
        (error_reply(429, code="insufficient_quota"), True),
        (error_reply(401), True),
        (errors.ProtocolError("html"), True),
        (errors.ResponseTooLarge("x"), True),
        (error_reply(413), True),
        (errors.CircuitOpen("x"), True),
        (errors.RateLimited("x"), True),
        (errors.QueueFull("x"), True),
        (error_reply(400), False),
        (error_reply(404), False),
        (errors.UpstreamTimeout("x"), False),
        (errors.StaleConnection("x"), False),
        (errors.DeadlineExceeded("x"), False),
        (errors.Closed("x"), False),
        (error_reply(400, code="content_filter"), False),
        (Reply(data=chat_body("x", finish="content_filter")), False),
        (ValueError("the user's own"), False),
    ],
    ids=repr,
)
def test_who_is_asked_next_depends_on_the_class(failure: Reply | Exception, goes_on: bool) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = fakes([failure], [])
        router = bound(upstreams, clock)
        if goes_on:
            assert (await router(primary_call())).text == "echo: hello"
        elif isinstance(failure, Exception):
            with pytest.raises(type(failure)) as caught:
                await router(primary_call())
            assert caught.value is failure
        else:
            assert (await router(primary_call())).status == failure.status
        assert asked(upstreams) == [1, int(goes_on)]

    run()


@manual_time
async def test_route_18_answer_of_a_fallback_says_so(clock: ManualClock) -> None:
    events: list[Event] = []
    upstreams = fakes([error_reply(503)], [errors.ConnectionFailed("x")], [])
    reply = await bound(upstreams, clock, events=events)(primary_call())
    assert (reply.endpoint, reply.fallback) == ("http://e2.test/v1", True)
    assert [(a.endpoint, a.fault, a.status) for a in reply.attempts] == [
        ("http://e0.test/v1", "server", 503),
        ("http://e1.test/v1", "not_sent", None),
    ]
    assert [event for event in events if isinstance(event, FellBack)] == [
        FellBack("http://e0.test/v1", "http://e1.test/v1", "server"),
        FellBack("http://e1.test/v1", "http://e2.test/v1", "not_sent"),
    ]


@manual_time
async def test_first_endpoints_answer_is_not_marked(clock: ManualClock) -> None:
    reply = await bound(fakes([], []), clock)(primary_call())
    assert (reply.endpoint, reply.fallback, reply.attempts) == ("http://e0.test/v1", False, ())


@manual_time
async def test_fallback_gets_its_own_model_and_nothing_of_the_first_request(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503)], [])
    router = bound(upstreams, clock, entries=[Fallback(upstreams[1], model="other")])
    request = HTTPRequest("POST", "http://e0.test/v1/chat/completions", (("authorization", "Bearer secret"),), b"{}")
    call = primary_call().replace(native=request)
    await router(call)
    first, second = upstreams[0].calls[0], upstreams[1].calls[0]
    assert (first.model, first.native) == ("m", request)
    assert (second.model, second.payload["model"], second.native) == ("other", "other", None)
    assert second.target == "http://e1.test/v1"
    assert call.payload["model"] == "m"


@manual_time
async def test_function_fallback_keeps_its_arguments(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503)], [])
    router = bound(upstreams, clock, entries=[Fallback(upstreams[1], model="other")])
    invocation = object()
    await router(Call("function", "f", {"prompt": "x"}, native=invocation))
    second = upstreams[1].calls[0]
    assert (second.native, second.payload) == (invocation, {"prompt": "x"})


@manual_time
async def test_all_failing_gives_one_error_per_endpoint(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503, message="overloaded")], [errors.ConnectionFailed("refused")])
    with pytest.raises(errors.AllEndpointsFailed) as caught:
        await bound(upstreams, clock)(primary_call())
    told = "http://e0.test/v1: server, status 503 (overloaded); http://e1.test/v1: not_sent, ConnectionFailed"
    assert str(caught.value).startswith(f"all 2 endpoints failed: {told}")
    first, second = caught.value.exceptions
    assert isinstance(first, errors.StatusError)
    assert (first.status, first.endpoint) == (503, "http://e0.test/v1")
    assert isinstance(second, errors.ConnectionFailed)
    assert [attempt.fault for attempt in caught.value.attempts] == ["server", "not_sent"]
    assert len(pickle.loads(pickle.dumps(caught.value)).exceptions) == 2


@manual_time
async def test_bad_request_at_the_fallback_is_told_with_the_first_failure(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503)], [error_reply(400)], [])
    with pytest.raises(errors.AllEndpointsFailed):
        await bound(upstreams, clock)(primary_call())
    assert asked(upstreams) == [1, 1, 0]


@manual_time
async def test_single_endpoint_passes_everything_unchanged(clock: ManualClock) -> None:
    refusal, error = error_reply(503), errors.ConnectionFailed("x")
    (upstream,) = fakes([refusal, error])
    env = Env(clock=clock)
    router = ErrorRouter().bind(upstream, env)
    reply = await router(primary_call())
    assert (reply.status, reply.data) == (503, refusal.data)
    with pytest.raises(errors.ConnectionFailed) as caught:
        await router(primary_call())
    assert caught.value is error
    assert (await router(primary_call())).ok
    assert upstream.calls[0].tries_left is None


@manual_time
async def test_lost_call_and_filtered_answer_go_elsewhere_where_allowed(clock: ManualClock) -> None:
    upstreams = fakes([errors.UpstreamTimeout("x")], [])
    assert (await bound(upstreams, clock, duplicate_ok=True)(primary_call())).fallback
    upstreams = fakes([Reply(data=chat_body("x", finish="content_filter"))], [])
    assert (await bound(upstreams, clock, on_content_filter=True)(primary_call())).text == "echo: hello"
    filtered = Reply(data=chat_body("x", finish="content_filter"))
    reply = await bound(fakes([error_reply(503)], [filtered]), clock, on_content_filter=True)(primary_call())
    assert (reply.text, reply.fallback) == ("x", True)


@manual_time
async def test_call_lost_where_repeating_is_free_goes_elsewhere(clock: ManualClock) -> None:
    upstreams = fakes([errors.UpstreamTimeout("x")] * 2, [])
    upstreams[0].capabilities = frozenset({"idempotent"})  # type: ignore[attr-defined]
    reply = await bound(upstreams, clock)(primary_call())
    assert (reply.text, reply.fallback) == ("echo: hello", True)
    upstreams = fakes([error_reply(503)], [errors.UpstreamTimeout("x")], [])
    upstreams[0].capabilities = frozenset({"idempotent"})  # type: ignore[attr-defined]
    with pytest.raises(errors.AllEndpointsFailed):
        await bound(upstreams, clock)(primary_call())
    assert asked(upstreams) == [1, 1, 0]


@manual_time
async def test_filtered_answer_is_given_where_nobody_does_better(clock: ManualClock) -> None:
    filtered = Reply(data=chat_body("I ca", finish="content_filter"))
    upstreams = fakes([filtered], [error_reply(503)])
    reply = await bound(upstreams, clock, on_content_filter=True)(primary_call())
    assert (reply.ok, reply.text, reply.fallback) == (True, "I ca", False)
    assert [attempt.fault for attempt in reply.attempts] == ["content_filter", "server"]
    upstreams = fakes([filtered], [Reply(data=chat_body("neither", finish="content_filter"))])
    reply = await bound(upstreams, clock, on_content_filter=True)(primary_call())
    assert (reply.text, reply.fallback) == ("neither", True)


# ── context length ──────────────────────────────────────────────────────────────────────────────────────────────────

TOO_LONG = [
    {"object": "error", "message": "This model's maximum context length is 1024 tokens.", "code": 400},
    {"error": {"message": "maximum context length is 1024 tokens", "param": "input_tokens", "code": 400}},
    {"error": {"message": "You passed 1015 input tokens. The maximum context length is 1024.", "code": 400}},
]  # fmt: skip


@pytest.mark.parametrize("body", TOO_LONG, ids=["old", "new", "0.16"])
def test_route_06_too_long_prompt_asks_a_larger_model_once(body: object) -> None:
    import msgspec

    @manual_time
    async def run(clock: ManualClock) -> None:
        upstreams = fakes([Reply(data=msgspec.json.encode(body), status=400)] * 3, [], [])
        entries = [Fallback(upstreams[1], max_context=8192), upstreams[2]]
        reply = await bound(upstreams, clock, Retry(), entries=entries)(primary_call())
        assert reply.endpoint == "http://e1.test/v1"
        assert asked(upstreams) == [1, 1, 0]

    run()


@manual_time
async def test_route_07_smaller_fallback_is_skipped(clock: ManualClock) -> None:
    too_long = error_reply(400, code="context_length_exceeded", message="maximum context length is 4096 tokens")
    upstreams = fakes([too_long], [], [])
    entries = [Fallback(upstreams[1], max_context=4096), Fallback(upstreams[2], max_context=8192)]
    reply = await bound(upstreams, clock, entries=entries)(primary_call())
    assert reply.endpoint == "http://e2.test/v1"
    assert asked(upstreams) == [1, 0, 1]


@manual_time
async def test_route_07_only_smaller_fallbacks_return_the_refusal(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(413)], [])
    reply = await bound(upstreams, clock, entries=[Fallback(upstreams[1], max_context=1)], max_context=2)(
        primary_call()
    )
    assert reply.status == 413
    assert asked(upstreams) == [1, 0]


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_attempts_over_all_endpoints_are_bounded(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(500)] * 9, [error_reply(500)] * 9, [error_reply(500)] * 9)
    with pytest.raises(errors.AllEndpointsFailed) as caught:
        await bound(upstreams, clock, Retry(), max_total_attempts=4)(primary_call())
    assert asked(upstreams) == [3, 1, 0]
    assert len(caught.value.attempts) == 4


@manual_time
async def test_route_02_long_rate_limit_goes_elsewhere_at_once(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(429, retry_after="38")] * 3, [])
    reply = await bound(upstreams, clock, Retry())(primary_call())
    assert reply.fallback
    assert clock.monotonic() == 1000.0


@manual_time
async def test_last_endpoints_rate_limit_is_waited_for(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(500)] * 3, [error_reply(429, retry_after="38")])
    reply = await bound(upstreams, clock, Retry())(primary_call())
    assert reply.fallback
    assert clock.monotonic() >= 1038.0


# ── open circuits ───────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_route_14_all_open_waits_for_the_earliest_within_the_deadline(clock: ManualClock) -> None:
    now = clock.monotonic()
    upstreams = fakes(
        [errors.CircuitOpen("x", retry_at=now + 30, retry_after_s=30.0)] * 2,
        [errors.CircuitOpen("x", retry_at=now + 4, retry_after_s=4.0)],
    )
    reply = await bound(upstreams, clock)(primary_call(context=Context(deadline=now + 10)))
    assert (reply.endpoint, reply.fallback) == ("http://e1.test/v1", True)
    assert clock.monotonic() == now + 4


@pytest.mark.parametrize("end", ["answered", "refused", "cancelled"])
def test_route_14_crowd_waits_for_the_probes_end_without_asking_again(end: str) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        events: list[Event] = []
        probe: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        upstream = FakeUpstream([*[error_reply(500)] * 5, lambda _: probe])
        router = bound([upstream], clock, CircuitBreaker(), events=events)
        for _ in range(5):
            await router(primary_call())
        context = Context(deadline=clock.monotonic() + 300)
        crowd = [asyncio.ensure_future(router(primary_call(context=context))) for _ in range(100)]
        await asyncio.sleep(25)
        refused = sum(isinstance(event, RefusedEarly) for event in events)
        assert (len(upstream.calls), refused) == (6, 199)  # once each as it opened, once each as the probe went out
        if end == "cancelled":
            probe.cancel()
        else:
            probe.set_result(error_reply(400) if end == "refused" else Reply(data=chat_body("x")))
        ended = clock.monotonic()
        found = await asyncio.gather(*crowd, return_exceptions=True)
        assert clock.monotonic() == ended
        assert [isinstance(one, Reply) and one.ok for one in found].count(False) == (end != "answered")
        (line,) = router._routes[0].breaker._endpoints.values()  # type: ignore[union-attr]
        assert not line.waiters

    run()


@manual_time
async def test_route_14_probe_that_fails_or_hangs_lets_the_crowd_wait_on(clock: ManualClock) -> None:
    def hang(_: Call) -> asyncio.Future[Reply]:
        return asyncio.get_running_loop().create_future()

    upstream = FakeUpstream([*[error_reply(500)] * 6, hang])
    router = bound([upstream], clock, CircuitBreaker())
    for _ in range(5):
        await router(primary_call())
    opened = clock.monotonic()
    context = Context(deadline=opened + 300)
    crowd = [asyncio.ensure_future(router(primary_call(context=context))) for _ in range(10)]
    await asyncio.wait(crowd, timeout=299)
    crowd_done = [task.result().status for task in crowd if task.done()]
    assert sorted(crowd_done) == [200] * 8 + [500]
    for task in crowd:
        task.cancel()
    late = asyncio.ensure_future(router(primary_call(context=Context(deadline=clock.monotonic() + 1))))
    assert (await late).ok


@manual_time
async def test_route_14_waiting_for_a_probe_ends_with_the_deadline(clock: ManualClock) -> None:
    upstream = FakeUpstream([*[error_reply(500)] * 5, lambda _: asyncio.get_running_loop().create_future()])
    router = bound([upstream], clock, CircuitBreaker())
    for _ in range(5):
        await router(primary_call())
    began = clock.monotonic()
    probing = asyncio.ensure_future(router(primary_call(context=Context(deadline=began + 100))))
    await asyncio.sleep(6)
    with pytest.raises(errors.CircuitOpen, match="asked again"):
        await router(primary_call(context=Context(deadline=began + 20)))
    assert clock.monotonic() - began == pytest.approx(20, abs=0.1)
    probing.cancel()


@manual_time
async def test_route_14_recommended_stack_waits_for_its_only_endpoint(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 6)
    engine = Stack.recommended(deadline=30).bind(upstream, env=Env(clock=clock, seed=1))
    refused = [await engine.call(chat_call("a")) for _ in range(2)]  # three attempts, then two until it opens
    assert [reply.status for reply in refused] == [500, 200]
    assert engine.get_performance_stats()["layers"]["breaker"]["not_closed"] == 0
    assert clock.monotonic() > 1005 + 10  # one rest, a failed probe, a longer rest
    assert len(upstream.calls) == 7


@manual_time
async def test_endpoint_that_was_well_last_is_probed_at_a_pace(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503)] * 1000, [Reply(data=chat_body("x")), *[error_reply(503)] * 1000])
    router = bound(upstreams, clock, CircuitBreaker(consecutive=1))
    await _seen(router)
    clock.advance(1)
    await _seen(router)  # both open now, the second last
    before, times = asked(upstreams), list[float]()
    for _ in range(6000):
        clock.advance(0.1)
        if len(upstreams[1].calls) > len(times) + before[1]:
            times.append(clock.monotonic())
        await _seen(router)
    first, second = [now - was for now, was in zip(asked(upstreams), before, strict=True)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 600 / 5.8 <= second <= 600 / 5  # every open_for, jittered, as long as it takes
    assert all(4.9 < gap < 5.8 for gap in gaps)
    assert first <= 600 / 60 + 5  # the other one's rest doubles as ever
    with pytest.raises(errors.AllEndpointsFailed) as caught:
        await router(primary_call())
    waits = [error.retry_after_s for error in caught.value.exceptions if isinstance(error, errors.CircuitOpen)]
    assert len(waits) == 2
    assert min(wait for wait in waits if wait is not None) <= 5.5


@manual_time
async def test_endpoint_beside_a_healthy_one_is_not_probed_at_a_pace(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(503)] * 1000, [])
    router = bound(upstreams, clock, CircuitBreaker(consecutive=1))
    for _ in range(600):
        clock.advance(1)
        assert (await router(primary_call())).ok
    assert asked(upstreams)[0] <= 600 / 60 + 5


async def _seen(router: BoundRouter) -> None:
    with contextlib.suppress(errors.AllEndpointsFailed, errors.CircuitOpen):
        await router(primary_call())


@manual_time
async def test_route_14_all_open_beyond_the_deadline_names_the_earliest(clock: ManualClock) -> None:
    now = clock.monotonic()
    script = [errors.CircuitOpen("x", retry_at=now + 30, retry_after_s=30.0)]
    for context in (Context(deadline=now + 10), Context()):
        with pytest.raises(errors.AllEndpointsFailed, match=r"again in 30\.0 s"):
            await bound(fakes(list(script), list(script)), clock)(primary_call(context=context))
    assert clock.monotonic() == now
    with pytest.raises(errors.CircuitOpen):
        await bound(fakes(list(script)), clock)(primary_call())


@manual_time
async def test_open_circuit_of_the_first_is_passed_by(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(500)] * 50, [])
    router = bound(upstreams, clock, CircuitBreaker())
    for _ in range(10):
        assert (await router(primary_call())).fallback
    assert asked(upstreams) == [5, 10]


@manual_time
async def test_single_endpoint_waits_for_its_probe_within_the_deadline(clock: ManualClock) -> None:
    upstreams = fakes([error_reply(500)] * 5)
    router = bound(upstreams, clock, CircuitBreaker())
    for _ in range(5):
        await router(primary_call())
    reply = await router(primary_call(context=Context(deadline=clock.monotonic() + 20)))
    assert reply.ok
    assert 1005.0 <= clock.monotonic() <= 1006.0


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_route_09_stream_broken_before_its_first_chunk_goes_elsewhere(clock: ManualClock) -> None:
    for inside in ((), (Retry(attempts=1),)):
        broken = Reply(chunks=ScriptedChunks([errors.StatusError("x", status=503)]))
        upstreams = fakes([broken], [])
        reply = await bound(upstreams, clock, *inside)(primary_call(prompt="a", stream=True))
        assert reply.fallback
        assert [chunk async for chunk in reply.chunks or ()] == chat_chunks("echo: a")


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_are_checked_compared_and_unwrapped() -> None:
    router = ErrorRouter(fallbacks=["http://a/v1", Fallback("http://b/v1", model="m", max_context=10)])
    assert router.targets == ("http://a/v1", "http://b/v1")
    assert router == ErrorRouter(fallbacks=("http://a/v1", Fallback("http://b/v1", model="m", max_context=10)))
    assert hash(router) is not None
    assert isinstance(router, ForkingLayer)
    assert "max_context=10" in repr(router)
    for wrong in ({"fallbacks": "http://a/v1"}, {"max_total_attempts": 0}, {"max_context": 0}, {"rate_wait": "soon"}):
        with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
            ErrorRouter(**wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="max_context"):
        Fallback("http://a/v1", max_context=0)


@manual_time
async def test_fallbacks_need_their_handlers(clock: ManualClock) -> None:
    env = Env(clock=clock)
    with pytest.raises(errors.ConfigError, match="1 fallbacks but 0 bound"):
        ErrorRouter(fallbacks=["http://a/v1"]).bind(Bound(FakeUpstream(), env), env)
