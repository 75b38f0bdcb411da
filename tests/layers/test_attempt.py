"""What a caller learns about the attempts behind an answer or an error, whatever shape the call had."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.call import Attempt, Call, Context, Item, Reply
from llmmw.env import Env
from llmmw.layers.attempt import annotate
from llmmw.layers.balance import Balancer
from llmmw.layers.batch import Batcher
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.deadline import Deadline
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter
from llmmw.layers.timeout import Timeout
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from llmmw.call import Chunk
    from llmmw.layers.base import Layer

PATIENT = Retry(attempts=3, backoff=0.001)


def told(attempts: tuple[Attempt, ...]) -> list[tuple[str, str, int | None, str]]:
    return [(attempt.endpoint, attempt.fault, attempt.status, attempt.error) for attempt in attempts]


async def ask(clock: ManualClock, upstream: object, call: Call, *layers: Layer) -> Reply:
    return await Stack(*layers).bind(upstream, env=Env(clock=clock, seed=1)).call(call)


def hang(_: Call) -> asyncio.Future[Reply]:
    return asyncio.get_running_loop().create_future()


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (errors.ConnectionFailed("gone"), "not_sent"),
        (errors.TruncatedStream("cut", partial="one"), "malformed"),
        (errors.StreamInterrupted("broke", partial="one"), "ambiguous"),
        (errors.ResponseTooLarge("a line"), "malformed"),
        (errors.DeadlineExceeded("late", sent=True), "refused"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_route_17_stream_that_breaks_lists_every_attempt(error: errors.LLMMWError, fault: str) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        chunks: list[Chunk | BaseException] = [chat_chunks("one")[0], error]
        first = FakeUpstream([error_reply(503)] * 2, name="http://a.test/v1")
        second = FakeUpstream([error_reply(500), Reply(chunks=ScriptedChunks(chunks))], name="http://b.test/v1")
        layers = ErrorRouter(fallbacks=[second]), Retry(attempts=2, backoff=0.001)
        call = chat_call(stream=True).replace(target="http://a.test/v1")
        reply = await ask(clock, first, call, *layers)
        with pytest.raises(errors.LLMMWError) as caught:
            async for _ in reply.chunks or ():
                pass
        assert told(caught.value.attempts) == [
            ("http://a.test/v1", "server", 503, ""),
            ("http://a.test/v1", "server", 503, ""),
            ("http://b.test/v1", "server", 500, ""),
            ("http://b.test/v1", fault, None, type(error).__name__),
        ]
        assert pickle.loads(pickle.dumps(caught.value)).attempts == caught.value.attempts
        if not isinstance(error, errors.ResponseTooLarge | errors.DeadlineExceeded):
            assert isinstance(caught.value, errors.StreamInterrupted)
            assert caught.value.partial == "one"

    run()


@manual_time
async def test_generators_own_exception_after_a_repetition_carries_the_note(clock: ManualClock) -> None:
    failing = ValueError("the user's own")
    streams = [ScriptedChunks([errors.ConnectionFailed("x")]), ScriptedChunks([Item("a"), failing])]
    upstream = FakeUpstream([Reply(chunks=stream) for stream in streams])
    reply = await ask(clock, upstream, chat_call(stream=True), PATIENT)
    with pytest.raises(ValueError, match="own") as caught:
        async for _ in reply.chunks or ():
            pass
    assert caught.value is failing
    (note,) = caught.value.__notes__
    assert "not_sent: ConnectionFailed" in note
    assert "invalid: ValueError" in note


@manual_time
async def test_generator_without_a_repetition_raises_its_own_exception_bare(clock: ManualClock) -> None:
    async def numbers():  # type: ignore[no-untyped-def]  # a user's generator
        yield 1
        raise ValueError("bug")

    wrapped = Stack(PATIENT).wrap(numbers, env=Env(clock=clock))
    with pytest.raises(ValueError, match="bug") as caught:
        async for _ in wrapped():
            pass
    assert not hasattr(caught.value, "__notes__")


# ── deadlines ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "inside",
    [(), (Timeout(60),), (RateLimiter(concurrency=1),), (RateLimiter(concurrency=1), Timeout(60))],
    ids=["retry alone", "timeout", "limiter", "both"],
)
def test_route_17_deadline_that_passes_lists_what_was_tried(inside: tuple[Layer, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = FakeUpstream([error_reply(503), hang])
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await ask(clock, upstream, chat_call(), Deadline(5), PATIENT, *inside)
        assert clock.monotonic() == pytest.approx(1005, abs=0.002)
        assert told(caught.value.attempts) == [
            ("http://fake.test/v1", "server", 503, ""),
            ("http://fake.test/v1", "refused", None, "DeadlineExceeded"),
        ]
        assert caught.value.sent
        assert upstream.in_flight == 0

    run()


@manual_time
async def test_route_17_deadline_at_the_fallback_is_the_error_not_a_group(clock: ManualClock) -> None:
    other = FakeUpstream([hang], name="http://b.test/v1")
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await ask(
            clock,
            FakeUpstream([error_reply(503)] * 3),
            chat_call(),
            Deadline(5),
            ErrorRouter(fallbacks=[other]),
            PATIENT,
        )
    assert [attempt.status for attempt in caught.value.attempts] == [503, 503, 503, None]
    assert caught.value.attempts[-1].endpoint == "http://b.test/v1"


@manual_time
async def test_async_04_task_cancelled_in_the_moment_of_the_deadline_is_cancelled(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503), hang])
    task = asyncio.ensure_future(ask(clock, upstream, chat_call(), Deadline(5), PATIENT))
    asyncio.get_running_loop().call_at(clock.monotonic() + 5, task.cancel)
    with pytest.raises((asyncio.CancelledError, errors.DeadlineExceeded)):
        await task
    assert upstream.in_flight == 0
    assert task.cancelled() or isinstance(task.exception(), errors.DeadlineExceeded)
    late = asyncio.ensure_future(ask(clock, FakeUpstream([hang]), chat_call(), Deadline(5), PATIENT))
    asyncio.get_running_loop().call_at(clock.monotonic() + 4.9, late.cancel)
    with pytest.raises(asyncio.CancelledError):
        await late


# ── notes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_exception_object_that_is_raised_for_ever_carries_one_note(clock: ManualClock) -> None:
    gone = ConnectionRefusedError("the user's own, made once")
    gone.add_note("the user's own note")

    async def broken() -> None:
        raise gone

    wrapped = Stack(PATIENT).wrap(broken, env=Env(clock=clock))
    for _ in range(5):
        with pytest.raises(ConnectionRefusedError) as caught:
            await wrapped()
        assert caught.value is gone
    assert len(gone.__notes__) == 2
    assert gone.__notes__[0] == "the user's own note"
    assert gone.__notes__[1].startswith("llmmw: ")


def test_note_of_a_call_that_succeeds_at_repeating_nothing_goes() -> None:
    error = ValueError("x")
    annotate(error, (Attempt("e", "server"), Attempt("e", "server")))
    annotate(error, (Attempt("e", "server"),))
    assert error.__notes__ == []


def test_class_with_notes_of_its_own_is_left_alone() -> None:
    class Odd(ValueError):
        __notes__ = ("mine",)  # type: ignore[assignment]

    error = Odd("x")
    annotate(error, (Attempt("e", "server"),) * 3)
    assert error.__notes__ == ("mine",)


def test_route_17_note_of_ten_thousand_attempts_stays_readable() -> None:
    error = ValueError("x")
    annotate(error, tuple(Attempt(f"http://e{number}.test", "server", 500) for number in range(10_000)))
    (note,) = error.__notes__
    assert len(note) < 1000
    assert "e0.test" in note
    assert "e9999.test" in note
    assert "9988 more attempts" in note


@manual_time
async def test_route_17_error_of_thousands_of_attempts_is_bounded_and_pickles(clock: ManualClock) -> None:
    upstreams = [FakeUpstream([error_reply(500, message="x" * 600)] * 100, name=f"http://e{n}.test") for n in range(64)]
    layers = (
        ErrorRouter(fallbacks=upstreams[1:], max_total_attempts=10_000),
        Retry(attempts=100, backoff=1e-6, budget=100_000),
    )
    with pytest.raises(errors.AllEndpointsFailed) as caught:
        await ask(clock, upstreams[0], chat_call().replace(target="http://e0.test"), *layers)
    assert len(caught.value.attempts) == 6400
    assert len(str(caught.value)) < 64 * 700
    again = pickle.loads(data := pickle.dumps(caught.value))
    assert again.attempts == caught.value.attempts
    assert len(data) < 1_000_000


# ── interrupts ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit, GeneratorExit], ids=lambda kind: kind.__name__)
def test_route_15_interrupt_inside_a_function_is_not_repeated(wish: type[BaseException]) -> None:
    calls = 0

    async def interrupted(_: Call) -> Reply:
        nonlocal calls
        calls += 1
        raise wish

    clock = ManualClock()
    with pytest.raises(wish):
        clock.run(ask(clock, interrupted, chat_call(), ErrorRouter(), PATIENT, RateLimiter(concurrency=1)))
    assert calls == 1


@manual_time
async def test_route_15_group_with_a_cancellation_inside_is_not_repeated(clock: ManualClock) -> None:
    calls = 0

    async def cancels_itself() -> None:
        nonlocal calls
        calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(wait_for_ever())
            group.create_task(lose())

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    async def lose() -> None:
        try:
            raise asyncio.CancelledError
        except asyncio.CancelledError as error:
            raise ConnectionRefusedError("while leaving") from error

    wrapped = Stack(ErrorRouter(), PATIENT).wrap(cancels_itself, env=Env(clock=clock))
    with pytest.raises(ExceptionGroup):
        await wrapped()
    assert calls == 1


# ── whoever catches an error holds nothing else ─────────────────────────────────────────────────────────────────────


class Dead(FakeUpstream):
    """Takes joint requests, n and whatever else, and answers none."""

    capabilities = frozenset({"n", "batch:chat"})

    async def _answer(self, call: Call, number: int) -> Reply:
        raise errors.ConnectionFailed("down")


@pytest.mark.parametrize(
    "layers",
    [
        (Batcher(min_size=2),),
        (Coalescer(merge_samples=True),),
        (TTLCache(60, sampling="lanes"), Coalescer()),
        (TTLCache(60), Coalescer()),
        (Balancer(), Retry(attempts=2)),
        (Retry(attempts=2),),
        (ErrorRouter(),),
        (ErrorRouter(fallbacks=[Dead(name="http://other.test")]),),
        (Deadline(60), TTLCache(60), Coalescer(), ErrorRouter(), Retry(), CircuitBreaker(), RateLimiter(9), Timeout(5)),
    ],
    ids=lambda layers: "-".join(layer.role for layer in layers),
)
def test_an_error_is_gone_with_whoever_caught_it(layers: tuple[Layer, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        engine = Stack(*layers).bind(
            [Dead(), Dead(name="http://two.test")][: 1 + (layers[0].role == "balance")], env=Env(clock=clock, seed=1)
        )

        async def caught(agent: str) -> weakref.ref[Exception] | None:
            try:
                await engine.call(chat_call("why?", temperature=1, context=Context(agent=agent)))
            except errors.LLMMWError as error:
                return weakref.ref(error)
            return None

        gc.collect()
        gc.disable()
        try:
            found = await asyncio.gather(*map(caught, "abc"))
            await clock.sleep(0.1)
            assert [ref is not None and ref() for ref in found] == [None] * 3
        finally:
            gc.enable()
        await engine.aclose()

    run()
