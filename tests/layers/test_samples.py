"""`Coalescer(merge_samples=True)`: the same question of several agents is one request, with a sample for each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw import errors
from llmmw.answer import Usage, usage_of
from llmmw.call import Call, Context, Reply, Urgency
from llmmw.env import Env
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.deadline import Deadline
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter
from llmmw.layers.samples import MAX_SAMPLES, Samples
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, chat_call, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.engine import Engine

MERGING = Coalescer(merge_samples=True)
LANES = TTLCache(60, sampling="lanes")


class Sampler(FakeUpstream):
    """Takes n, and numbers its samples over all requests.

    Args:
        refuses: the refusal of a call, if any.
        gives: how many choices, out of so many.
    """

    capabilities = frozenset({"n"})

    def __init__(
        self,
        *,
        latency_s: float = 1.0,
        refuses: Callable[[Call], Reply | None] = lambda _: None,
        gives: Callable[[int], int] = lambda n: n,
    ) -> None:
        super().__init__(latency_s=latency_s)
        self.drawn = 0
        self.refuses = refuses
        self.gives = gives

    async def _answer(self, call: Call, number: int) -> Reply:
        if self._script or call.stream:
            return await super()._answer(call, number)
        refusal = self.refuses(call)
        if refusal is not None:
            return refusal
        count = self.gives(n_of(call))
        body = answer_body([f"sample {self.drawn + index}" for index in range(count)])
        self.drawn += count
        return Reply(data=body, usage=usage_of(msgspec.json.decode(body)))


def answer_body(texts: Sequence[str]) -> bytes:
    choices = [
        {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 11, "completion_tokens": 3 * len(texts), "total_tokens": 11 + 3 * len(texts)}
    return msgspec.json.encode({"object": "chat.completion", "choices": choices, "usage": usage})


def n_of(call: Call) -> int:
    return int(call.payload.get("n") or 1)


def asked(upstream: FakeUpstream) -> list[int]:
    return [n_of(call) for call in upstream.calls]


def engine_of(upstream: FakeUpstream, clock: ManualClock, *layers: Any) -> Engine:
    return Stack(*layers).bind(upstream, env=Env(clock=clock, seed=1))


def ask(engine: Engine, agents: Sequence[str | None], **fields: Any) -> list[asyncio.Task[Reply]]:
    fields = {"temperature": 1, **fields}
    return [
        asyncio.ensure_future(engine.call(chat_call("why?", context=Context(agent=agent), **fields)))
        for agent in agents
    ]


def agents(count: int) -> list[str | None]:
    return [f"agent {number}" for number in range(count)]


FULL = (LANES, MERGING, ErrorRouter(), Retry(attempts=2, backoff=0.1), CircuitBreaker(), RateLimiter(concurrency=64))


@pytest.mark.parametrize(
    "layers", [(MERGING,), (LANES, MERGING), FULL, (TTLCache(60, sampling="deterministic"), MERGING)]
)
def test_the_same_question_of_many_is_one_request(layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = Sampler()
        engine = engine_of(upstream, clock, *layers)
        replies = await asyncio.gather(*ask(engine, agents(8)))
        assert [reply.text for reply in replies] == [f"sample {number}" for number in range(8)]
        assert asked(upstream) == [8]
        assert [choice["index"] for reply in replies for choice in reply.body["choices"]] == [0] * 8
        assert {reply.source for reply in replies} == {"batch"}
        assert sum((reply.usage for reply in replies), Usage()) == Usage(11, 24, reported=True)
        assert all(reply.body["usage"]["completion_tokens"] == reply.usage.output_tokens for reply in replies)
        told = engine.get_performance_stats()
        assert (told["request_count"], told["upstream_requests"], told["batched_requests"]) == (8, 1, 8)
        assert (told["tokens_in"], told["tokens_out"]) == (11, 24)
        assert sum(each["tokens_out"] for each in told["by_agent"].values()) == 24
        await engine.aclose()

    run()


@manual_time
async def test_every_sample_is_kept_under_its_own_key(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, LANES, MERGING)
    first = [reply.text for reply in await asyncio.gather(*ask(engine, agents(5)))]
    second = [reply.text for reply in await asyncio.gather(*ask(engine, agents(5)))]
    assert asked(upstream) == [5, 5]
    assert len({*first, *second}) == 10
    engine.begin_run()
    again = [reply.text for reply in await asyncio.gather(*ask(engine, agents(5)))]
    assert again == first
    assert asked(upstream) == [5, 5]
    await engine.aclose()


@manual_time
async def test_samples_by_their_index_are_merged_too(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, LANES, MERGING)
    calls = [chat_call("why?", context=Context(sample=index), temperature=1) for index in (0, 1, 2, 1)]
    replies = await asyncio.gather(*map(engine.call, calls))
    assert asked(upstream) == [3]
    assert replies[1].text == replies[3].text
    assert len({reply.text for reply in replies}) == 3
    await engine.aclose()


@pytest.mark.parametrize(
    "fields", [{"seed": 1}, {"n": 2}, {"best_of": 2}, {"use_beam_search": True}, {"odd": object()}]
)
def test_what_n_would_change_stays_as_it_is(fields: dict[str, Any]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = Sampler()
        engine = engine_of(upstream, clock, MERGING)
        assert all(reply.ok for reply in await asyncio.gather(*ask(engine, agents(3), **fields)))
        assert set(asked(upstream)) == {fields.get("n", 1)}
        await engine.aclose()

    run()


@manual_time
async def test_streams_are_left_alone(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, MERGING)
    calls = [chat_call("why?", temperature=1, stream=True) for _ in range(2)]
    for reply in await asyncio.gather(*map(engine.call, calls)):
        assert reply.chunks is not None
        assert [chunk async for chunk in reply.chunks]
    assert asked(upstream) == [1, 1]
    await engine.aclose()


@manual_time
async def test_unlike_questions_are_not_merged(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, MERGING)
    unlike = [
        chat_call("a", temperature=1), chat_call("b", temperature=1), chat_call("a", temperature=0.5),
        chat_call("a", temperature=1, metadata={"x": "y"}), chat_call("a", temperature=1, context=Context(priority=3)),
        chat_call("a", temperature=1, context=Context(tenant="t")), chat_call("a", temperature=1, model="other"),
        chat_call("a", temperature=1).replace(native=(("x-header", "1"),)),
        chat_call("a", temperature=1).replace(namespace="n"), chat_call("a", temperature=1).replace(native=object()),
    ]  # fmt: skip
    replies = await asyncio.gather(*map(engine.call, unlike))
    assert asked(upstream) == [1] * len(unlike)
    assert {reply.source for reply in replies} == {"upstream"}
    assert clock.monotonic() == 1001
    await engine.aclose()


@manual_time
async def test_where_no_endpoint_takes_n_nothing_is_merged(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream.capabilities = frozenset()
    engine = engine_of(upstream, clock, MERGING)
    await asyncio.gather(*ask(engine, agents(4)))
    assert asked(upstream) == [1] * 4
    upstream.capabilities = frozenset({"n"})  # it finds out late
    await asyncio.gather(*ask(engine, agents(4)))
    assert asked(upstream) == [1] * 4 + [4]
    await engine.aclose()


@manual_time
async def test_all_fallbacks_must_take_n(clock: ManualClock) -> None:
    for other, requests in ((Sampler(), [3]), (FakeUpstream(), [1] * 3)):
        upstream = Sampler()
        upstream.name = "http://first.test/v1"
        engine = engine_of(upstream, clock, MERGING, ErrorRouter(fallbacks=[other]))
        await asyncio.gather(*ask(engine, agents(3)))
        assert asked(upstream) == requests
        await engine.aclose()


@manual_time
async def test_without_the_option_nothing_is_merged(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, Coalescer())
    await asyncio.gather(*ask(engine, agents(4)))
    assert asked(upstream) == [1] * 4
    await engine.aclose()


@manual_time
async def test_a_lone_call_is_sent_as_it_is_and_waits_for_nobody(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, LANES, MERGING)
    (task,) = ask(engine, ["a"])
    reply = await task
    assert (reply.source, clock.monotonic(), asked(upstream)) == ("upstream", 1001, [1])
    assert "n" not in upstream.calls[0].payload
    await engine.aclose()


@manual_time
async def test_more_than_a_server_takes_go_in_several(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, MERGING)
    replies = await asyncio.gather(*ask(engine, [None] * (MAX_SAMPLES + 2)))
    assert asked(upstream) == [MAX_SAMPLES, 2]
    assert len({reply.text for reply in replies}) == MAX_SAMPLES + 2
    await engine.aclose()


# ── who leaves ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layers", [(MERGING,), (LANES, MERGING)])
def test_the_request_ends_with_the_last_who_waits(layers: tuple[Any, ...]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = Sampler(latency_s=10)
        engine = engine_of(upstream, clock, *layers)
        tasks = ask(engine, agents(4))
        await asyncio.sleep(1)
        for task in tasks[:3]:
            task.cancel()
        await asyncio.sleep(1)
        assert (upstream.in_flight, upstream.cancelled) == (1, 0)
        tasks[3].cancel()
        await asyncio.sleep(1)
        assert (upstream.in_flight, upstream.cancelled) == (0, 1)
        assert all(task.cancelled() for task in tasks)
        # And one who stays gets what is their own.
        tasks = ask(engine, agents(4))
        await asyncio.sleep(1)
        for task in tasks[:2]:
            task.cancel()
        replies = await asyncio.gather(*tasks[2:])
        assert [reply.text for reply in replies] == ["sample 2", "sample 3"]
        await engine.aclose()

    run()


@manual_time
async def test_who_leaves_while_each_is_asked_alone_ends_a_request(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=10)
    upstream._script = [errors.ResponseTooLarge("64 MiB")]
    engine = engine_of(upstream, clock, MERGING)
    tasks = ask(engine, agents(4))
    await asyncio.sleep(12)
    assert (upstream.in_flight, upstream.cancelled) == (4, 0)
    tasks[1].cancel()
    await asyncio.sleep(1)
    assert (upstream.in_flight, upstream.cancelled) == (3, 1)
    assert len({reply.text for reply in await asyncio.gather(tasks[0], *tasks[2:])}) == 3
    await engine.aclose()


@manual_time
async def test_who_leaves_before_the_turn_ends_is_not_asked_for(clock: ManualClock) -> None:
    upstream = Sampler()
    engine = engine_of(upstream, clock, MERGING)
    tasks = ask(engine, agents(4))
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    assert len(await asyncio.gather(*tasks[2:])) == 2
    assert asked(upstream) == [2]
    tasks = ask(engine, agents(2))
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.sleep(5)
    assert asked(upstream) == [2]
    await engine.aclose()


@manual_time
async def test_everybody_keeps_their_own_deadline(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=3)
    engine = engine_of(upstream, clock, Deadline(100), LANES, MERGING)
    now = clock.monotonic()
    calls = [chat_call("why?", context=Context(agent=str(s), deadline=now + s), temperature=1) for s in (1, 2, 10)]
    outcomes = await asyncio.gather(*map(engine.call, calls), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.DeadlineExceeded, errors.DeadlineExceeded, Reply]
    (call,) = upstream.calls
    assert call.deadline == now + 10
    assert (call.context.agent, call.context.tags) == (None, ())
    await engine.aclose()


@manual_time
async def test_a_flight_that_becomes_urgent_takes_the_request_along(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream.start(env := Env(clock=clock, seed=1))
    samples = Samples(upstream, env.endowed({"n"}))
    urgency = Urgency(priority=5)
    call = chat_call("why?", temperature=1, context=Context(priority=5))
    tasks = [asyncio.ensure_future(samples(call.replace(urgency=urgency))), asyncio.ensure_future(samples(call))]
    await asyncio.sleep(0.5)
    urgency.join(Context(priority=-2))
    assert upstream.calls[0].priority == -2
    await asyncio.gather(*tasks)
    assert not urgency._listeners


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def no_n(call: Call) -> Reply | None:
    return error_reply(400, message="n must be 1") if n_of(call) > 1 else None


@manual_time
async def test_a_refusal_of_n_is_remembered(clock: ManualClock) -> None:
    upstream = Sampler(refuses=no_n)
    engine = engine_of(upstream, clock, *FULL)
    replies = await asyncio.gather(*ask(engine, agents(4)))
    assert len({reply.text for reply in replies}) == 4
    assert asked(upstream) == [4, 1, 1, 1, 1]
    assert clock.monotonic() == 1003  # the refusal, one to see why, then the rest at once
    await asyncio.gather(*ask(engine, agents(4)))
    assert asked(upstream)[5:] == [1] * 4
    assert len(await asyncio.gather(*ask(engine, agents(2), model="other"))) == 2
    assert asked(upstream)[9:] == [2, 1, 1]
    await engine.aclose()


@manual_time
async def test_a_refusal_of_the_question_is_everybodys(clock: ManualClock) -> None:
    upstream = Sampler(refuses=lambda _: error_reply(400, message="no such thing"))
    engine = engine_of(upstream, clock, *FULL)
    replies = await asyncio.gather(*ask(engine, agents(6)))
    assert {reply.status for reply in replies} == {400}
    assert asked(upstream) == [6, 1]
    upstream.refuses = lambda _: None
    await asyncio.gather(*ask(engine, agents(6)))
    assert asked(upstream) == [6, 1, 6]
    await engine.aclose()


@pytest.mark.parametrize("status", [401, 413])
def test_a_refusal_that_is_not_about_n_is_everybodys_at_once(status: int) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = Sampler(refuses=lambda _: error_reply(status))
        engine = engine_of(upstream, clock, MERGING)
        replies = await asyncio.gather(*ask(engine, agents(6)))
        assert {reply.status for reply in replies} == {status}
        assert asked(upstream) == [6]
        await engine.aclose()

    run()


@manual_time
async def test_a_server_that_gives_fewer_is_asked_for_the_rest_and_remembered(clock: ManualClock) -> None:
    upstream = Sampler(gives=lambda _: 1)
    engine = engine_of(upstream, clock, LANES, MERGING)
    replies = await asyncio.gather(*ask(engine, agents(4)))
    assert len({reply.text for reply in replies}) == 4
    assert asked(upstream) == [4, 1, 1, 1]
    await asyncio.gather(*ask(engine, agents(4)))
    assert asked(upstream)[4:] == [1] * 4
    await engine.aclose()


@manual_time
async def test_an_answer_that_is_none_fails_everybody(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [Reply(data=b"<html>")]
    engine = engine_of(upstream, clock, MERGING)
    outcomes = await asyncio.gather(*ask(engine, agents(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ProtocolError] * 3
    await asyncio.gather(*ask(engine, agents(3)))
    assert asked(upstream) == [3, 3]
    await engine.aclose()


@manual_time
async def test_a_queue_that_counts_samples_gets_fewer_at_a_time(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=0.1, refuses=lambda call: error_reply(503) if n_of(call) > 8 else None)
    engine = engine_of(upstream, clock, MERGING)
    for _ in range(3):
        replies = await asyncio.gather(*ask(engine, [None] * 16))
        assert len({reply.text for reply in replies}) == 16
    assert asked(upstream)[:2] == [16, 1]
    assert asked(upstream)[17:19] == [8, 8]  # remembered; then one more is tried
    assert len(asked(upstream)) < 45
    await engine.aclose()


@manual_time
async def test_a_queue_that_takes_nothing_is_not_asked_by_everybody(clock: ManualClock) -> None:
    upstream = Sampler(refuses=lambda _: error_reply(503))
    engine = engine_of(upstream, clock, MERGING)
    assert {reply.status for reply in await asyncio.gather(*ask(engine, agents(9)))} == {503}
    assert asked(upstream) == [9, 1]
    await engine.aclose()


@manual_time
async def test_a_queue_that_takes_one_is_tried_again_with_two_later(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=0.1, refuses=lambda call: error_reply(503) if n_of(call) > 1 else None)
    engine = engine_of(upstream, clock, MERGING)
    for _ in range(20):
        await asyncio.gather(*ask(engine, agents(2)))
    assert asked(upstream)[:3] == [2, 1, 1]
    assert 2 in asked(upstream)[3:]
    assert asked(upstream).count(2) < 5
    await engine.aclose()


@manual_time
async def test_samples_too_large_together_are_fetched_one_by_one(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=0.1)
    upstream._script = [errors.ResponseTooLarge("64 MiB")]
    engine = engine_of(upstream, clock, MERGING)
    assert len({reply.text for reply in await asyncio.gather(*ask(engine, agents(8)))}) == 8
    assert asked(upstream) == [8] + [1] * 8
    await asyncio.gather(*ask(engine, agents(8)))
    assert asked(upstream)[9:] == [4, 4]
    await engine.aclose()


@manual_time
async def test_samples_that_take_too_long_together_are_fewer_later(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [errors.UpstreamTimeout("60 s")]
    engine = engine_of(upstream, clock, MERGING)
    outcomes = await asyncio.gather(*ask(engine, agents(8)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.UpstreamTimeout] * 8
    await asyncio.gather(*ask(engine, agents(8)))
    assert asked(upstream) == [8, 4, 4]
    await engine.aclose()


@manual_time
async def test_a_token_limit_that_each_sample_keeps_refuses_none(clock: ManualClock) -> None:
    upstream = Sampler()
    limiter = RateLimiter(tpm=100, window=1, oversize="refuse")
    engine = engine_of(upstream, clock, MERGING, limiter)
    replies = await asyncio.gather(*ask(engine, agents(8), max_tokens=30))
    assert len({reply.text for reply in replies}) == 8
    assert asked(upstream) == [1] * 8
    await engine.aclose()


@manual_time
async def test_a_lost_request_is_lost_for_everybody(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [errors.ConnectionFailed("gone")]
    engine = engine_of(upstream, clock, MERGING)
    outcomes = await asyncio.gather(*ask(engine, agents(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ConnectionFailed] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3
    await engine.aclose()


@manual_time
async def test_a_lost_request_is_repeated_for_everybody_at_once(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [errors.ConnectionFailed("gone")]
    engine = engine_of(upstream, clock, *FULL)
    assert len({reply.text for reply in await asyncio.gather(*ask(engine, agents(3)))}) == 3
    assert asked(upstream) == [3, 3]
    await engine.aclose()


@manual_time
async def test_the_probe_that_is_lost_leaves_the_others_their_own_chance(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [error_reply(400), errors.ConnectionFailed("gone")]
    engine = engine_of(upstream, clock, MERGING)
    outcomes = await asyncio.gather(*ask(engine, agents(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ConnectionFailed, Reply, Reply]
    assert asked(upstream) == [3, 1, 1, 1]
    await asyncio.gather(*ask(engine, agents(3)))
    assert asked(upstream)[4:] == [3]  # that n was to blame is not known
    await engine.aclose()


@manual_time
async def test_a_request_that_is_cancelled_from_inside_is_ambiguous(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream._script = [asyncio.CancelledError()]
    engine = engine_of(upstream, clock, MERGING)
    outcomes = await asyncio.gather(*ask(engine, agents(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.AmbiguousOutcome] * 3
    await engine.aclose()


@manual_time
async def test_a_bug_inside_reaches_whoever_waits(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream.start(env := Env(clock=clock, seed=1))
    samples = Samples(upstream, env.endowed({"n"}))

    def broken(_: Call) -> Reply:
        raise AssertionError("ours")

    upstream._script = [broken]
    call = chat_call("why?", temperature=1)
    outcomes = await asyncio.gather(samples(call), samples(call), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [AssertionError] * 2


@manual_time
async def test_closing_leaves_nobody_waiting(clock: ManualClock) -> None:
    upstream = Sampler(latency_s=1000)
    engine = engine_of(upstream, clock, MERGING)
    tasks = ask(engine, agents(3))
    await asyncio.sleep(1)
    await engine.aclose(drain_timeout=0.1)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {errors.Closed, asyncio.CancelledError}
    assert upstream.in_flight == 0


@manual_time
async def test_closing_in_the_turn_of_asking_leaves_nobody_waiting(clock: ManualClock) -> None:
    upstream = Sampler()
    upstream.start(env := Env(clock=clock, seed=1))
    samples = Samples(upstream, env.endowed({"n"}))
    call = chat_call("why?", temperature=1)
    waiting = [asyncio.ensure_future(samples(call)) for _ in range(2)]
    await asyncio.sleep(0)
    await samples.aclose()
    waiting += [asyncio.ensure_future(samples(call))]
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.Closed] * 3
    assert not upstream.calls


def test_a_new_loop_starts_afresh() -> None:
    upstream = Sampler(latency_s=0)
    engine = Stack(MERGING).bind(upstream)

    async def crowd() -> list[str]:
        return [reply.text for reply in await asyncio.gather(*ask(engine, agents(3)))]

    async def leave() -> None:
        upstream.latency_s = 60
        ask(engine, agents(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    assert len({*asyncio.run(crowd())}) == 3
    asyncio.run(leave())
    upstream.latency_s = 0
    assert len({*asyncio.run(crowd())}) == 3
    asyncio.run(engine.aclose())


def test_what_is_remembered_is_bounded() -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = Sampler(latency_s=0, refuses=no_n)
        upstream.start(env := Env(clock=clock, seed=1))
        samples = Samples(upstream, env.endowed({"n"}))
        samples._alone = dict.fromkeys(("x", str(number)) for number in range(1000))
        call = chat_call("why?", temperature=1)
        await asyncio.gather(samples(call), samples(call))
        assert len(samples._alone) == 1

    run()


# ── under fire ──────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from([0.0, 0.0, 0.5]),
            st.sampled_from([None, None, 0.0, 0.2, 1.3]),
            st.booleans(),
        ),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from(["well", "no n", "few", "busy", "lost"]),
)
def test_everybody_has_one_outcome_and_nobody_anothers(
    schedule: list[tuple[str, float, float | None, bool]], mood: str
) -> None:
    clock = ManualClock()
    upstream = Sampler(latency_s=0.3)
    if mood == "no n":
        upstream.refuses = no_n
    elif mood == "few":
        upstream.gives = lambda n: max(1, n // 2)
    elif mood == "busy":
        upstream.refuses = lambda call: error_reply(503) if n_of(call) > 2 else None
    elif mood == "lost":
        upstream._script = [errors.ConnectionFailed("gone")]

    async def main() -> None:
        engine = engine_of(upstream, clock, LANES, MERGING) if schedule[0][3] else engine_of(upstream, clock, MERGING)

        async def one(number: int, question: str, begins: float, leaves: float | None) -> Reply | None:
            await asyncio.sleep(begins)
            call = chat_call(question, temperature=1, context=Context(agent=str(number)))
            try:
                async with asyncio.timeout(leaves):
                    return await engine.call(call)
            except TimeoutError:
                return None

        outcomes = await asyncio.gather(
            *(one(number, *entry[:3]) for number, entry in enumerate(schedule)), return_exceptions=True
        )
        texts = [outcome.text for outcome in outcomes if isinstance(outcome, Reply)]
        assert len(texts) == len({*texts})
        for outcome, (_, _, leaves, _) in zip(outcomes, schedule, strict=True):
            if outcome is None:
                assert leaves is not None
            elif isinstance(outcome, BaseException):
                assert mood == "lost"
                assert isinstance(outcome, errors.ConnectionFailed)
            else:
                assert outcome.ok
                assert outcome.usage.reported
        told = engine.get_performance_stats()
        answered = sum(outcome.usage.output_tokens for outcome in outcomes if isinstance(outcome, Reply))
        assert answered <= told["tokens_out"]
        if all(leaves is None for _, _, leaves, _ in schedule) and mood == "well":
            assert answered == told["tokens_out"] == 3 * len(schedule)
            paid = sum(outcome.usage.input_tokens for outcome in outcomes if isinstance(outcome, Reply))
            assert paid == told["tokens_in"] == 11 * len(upstream.calls)
        await engine.aclose()
        assert upstream.in_flight == 0

    clock.run(main())
