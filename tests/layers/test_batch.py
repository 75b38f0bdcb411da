from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from llmmw import errors
from llmmw.answer import Usage
from llmmw.call import Call, Context, Reply, Urgency
from llmmw.env import Env
from llmmw.events import BatchFlushed, Event
from llmmw.layers.batch import Batcher, BoundBatcher
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.deadline import Deadline
from llmmw.layers.entrance import Entrance
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.layers.base import Bound

JOINT = frozenset({"batch:chat", "batch:complete"})


class Broken(Exception):
    """A bug of ours."""


class BatchServer(FakeUpstream):
    """Answers chat_batch with one choice per conversation; a prompt with "bad" spoils the whole request."""

    def __init__(self, *, latency_s: float = 1.0, refusal: Reply | None = None) -> None:
        super().__init__(latency_s=latency_s)
        self.refusal = refusal or error_reply(400, message="bad item")

    async def _answer(self, call: Call, number: int) -> Reply:
        if self._script or call.op != "chat_batch":
            prompt = call.payload["messages"][-1]["content"] if call.op == "chat" else ""
            return self.refusal if "bad" in prompt and not self._script else await super()._answer(call, number)
        prompts = [conversation[-1]["content"] for conversation in call.payload["messages"]]
        if any("bad" in prompt for prompt in prompts):
            return self.refusal
        usage = Usage(10 * len(prompts), 2 * len(prompts), reported=True)
        return Reply(data=joint_body(prompts), usage=usage, headers=(("content-length", "9"), ("x-request-id", "r")))


class WithBatch(BatchServer):
    """One that says what it can."""

    capabilities = JOINT


def joint_body(prompts: Sequence[str], **changes: Any) -> bytes:
    choices = [
        {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": f"echo: {prompt}"}}
        for index, prompt in enumerate(prompts)
    ]
    usage = {"prompt_tokens": 10 * len(prompts), "completion_tokens": 2 * len(prompts)}
    return msgspec.json.encode({"object": "chat.completion", "choices": choices, "usage": usage, **changes})


def bound(
    upstream: FakeUpstream,
    clock: ManualClock,
    events: list[Event] | None = None,
    *,
    caps: frozenset[str] = JOINT,
    **options: Any,
) -> BoundBatcher:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,))
    upstream.start(env)
    return Batcher(**{"min_size": 1, **options}).bind(upstream, env.endowed(caps))


def keeping_deadlines(batcher: BoundBatcher) -> Bound:
    """As it stands in an engine, which leaves a call when its deadline has come."""
    return Deadline(3600).bind(batcher, batcher.env)


def start(batcher: Bound, *prompts: str, **fields: Any) -> list[asyncio.Task[Reply]]:
    return [asyncio.ensure_future(batcher(chat_call(prompt, **fields))) for prompt in prompts]


def flushed(events: list[Event]) -> list[tuple[int, str]]:
    return [(event.size, event.cause) for event in events if isinstance(event, BatchFlushed)]


def sizes(upstream: FakeUpstream) -> list[int]:
    return [len(call.payload["messages"]) if call.op == "chat_batch" else 1 for call in upstream.calls]


async def occupy(batcher: BoundBatcher) -> asyncio.Task[Reply]:
    """Make the endpoint busy, so that what follows waits for mates."""
    (task,) = start(batcher, "first")
    await asyncio.sleep(0.001)
    return task


# ── when a group goes ───────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_batch_01_idle_endpoint_gets_a_lone_call_at_once(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=0)
    reply = await bound(upstream, clock, events, flush_interval=1)(chat_call("a"))
    assert (reply.text, reply.source) == ("echo: a", "upstream")
    assert clock.monotonic() == 1000.0
    assert flushed(events) == [(1, "idle")]


@manual_time
async def test_calls_of_one_turn_share_a_request(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events)
    replies = await asyncio.gather(*start(batcher, "a", "b", "c"))
    assert [reply.text for reply in replies] == ["echo: a", "echo: b", "echo: c"]
    assert sizes(upstream) == [3]
    assert flushed(events) == [(3, "idle")]
    assert {reply.source for reply in replies} == {"batch"}
    assert {reply.exchange for reply in replies} != {0}
    assert sum(reply.usage.input_tokens for reply in replies) == 30
    assert replies[0].header("content-length") is None
    assert replies[0].header("x-request-id") == "r"
    assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}


@manual_time
async def test_busy_endpoint_gets_what_gathered_in_the_interval(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=5)
    batcher = bound(upstream, clock, events)
    busy = await occupy(batcher)
    began = clock.monotonic()
    tasks = start(batcher, "a", "b")
    await asyncio.sleep(0.01)
    tasks += start(batcher, "c")
    await asyncio.sleep(0.011)
    assert sizes(upstream) == [1, 3]
    assert clock.monotonic() - began < 0.022
    await asyncio.gather(busy, *tasks)
    assert flushed(events) == [(1, "idle"), (3, "interval")]


@manual_time
async def test_group_goes_when_the_endpoint_becomes_idle(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=0.1)
    batcher = bound(upstream, clock, events, flush_interval=60)
    busy = await occupy(batcher)
    await asyncio.gather(busy, *start(batcher, "a", "b"))
    assert clock.monotonic() == pytest.approx(1000.2)
    assert flushed(events) == [(1, "idle"), (2, "idle")]


@manual_time
async def test_batch_02_full_group_goes_at_once(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events, max_size=4)
    await asyncio.gather(*start(batcher, *map(str, range(10))))
    assert sizes(upstream) == [4, 4, 2]
    assert flushed(events) == [(4, "size"), (4, "size"), (2, "idle")]


@manual_time
async def test_batch_02_large_items_go_in_their_own_group(clock: ManualClock) -> None:
    for options, cause in (({"max_bytes": 200}, "bytes"), ({"max_tokens": 50}, "tokens")):
        events: list[Event] = []
        upstream = BatchServer()
        batcher = bound(upstream, clock, events, **options)
        prompts = ["a", "b" * 100, "c" * 400, "d", "e"]
        replies = await asyncio.gather(*start(batcher, *prompts))
        assert [reply.text for reply in replies] == [f"echo: {prompt}" for prompt in prompts]
        # "c" is above the limit: what waits goes before it, it goes alone, and what comes later is a new group.
        assert flushed(events) == [(2, cause), (1, cause), (2, "idle")]
        assert sizes(upstream) == [1, 2, 2] or sizes(upstream) == [2, 1, 2]


def test_every_flush_reason_is_named_in_the_statistics() -> None:
    clock = ManualClock()

    async def main() -> None:
        upstream = WithBatch(latency_s=0.2)
        stack = Stack(Batcher(max_size=3, min_size=1, max_bytes=300, max_tokens=80, flush_interval=0.05, barrier=2))
        async with stack.bind(upstream, env=Env(clock=clock, seed=1)) as engine:

            def ask(*prompts: str, **fields: Any) -> list[asyncio.Task[Reply]]:
                return [asyncio.ensure_future(engine.call(chat_call(prompt, **fields))) for prompt in prompts]

            tasks = ask("idle")
            await asyncio.sleep(0.001)
            tasks += ask("size", "size", "size") + ask("interval", temperature=1)
            await asyncio.sleep(0.06)
            tasks += ask("hurry", temperature=1, context=Context(deadline=clock.monotonic() + 0.05))
            await asyncio.sleep(0.03)
            tasks += ask("b" * 200, "b" * 200, "c") + ask("t", "u", max_tokens=79)
            tasks += ask("x", context=Context(agent="a", step=1)) + ask("y", context=Context(agent="b", step=1))
            tasks += ask("waits", context=Context(agent="a", step=2))
            await asyncio.sleep(0.001)
            engine.tick()
            await asyncio.sleep(0.001)
            tasks += ask("closing", context=Context(step=3))
            await asyncio.sleep(0.001)
            await engine.aclose()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            late = [type(outcome) for outcome in outcomes if not isinstance(outcome, Reply)]
            assert late == [
                errors.DeadlineExceeded
            ]  # the hurried one: it left in time for an answer, which took longer
            told = engine.get_performance_stats()
            names = {name for name in told["layers"]["batch"] if name.startswith("flushed by ")}
            causes = ("idle", "size", "bytes", "tokens", "interval", "deadline", "barrier", "close")
            assert names == {f"flushed by {cause}" for cause in causes}
            assert told["batched_requests"] == len(tasks)
            assert told["batch_count"] == sum(told["layers"]["batch"][name] for name in names)

    clock.run(main())


@manual_time
async def test_batch_06_deadline_flushes_before_the_interval(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=5)
    batcher = bound(upstream, clock, events, flush_interval=0.5)
    busy = await occupy(batcher)
    began = clock.monotonic()
    timely = keeping_deadlines(batcher)
    tasks = start(batcher, "patient") + start(timely, "a", context=Context(deadline=began + 0.05))
    while len(upstream.calls) < 2:
        await asyncio.sleep(0.001)
    assert clock.monotonic() - began <= 0.05
    assert flushed(events)[-1] == (2, "deadline")
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await tasks[1]
    assert clock.monotonic() - began == pytest.approx(0.05)
    assert caught.value.sent
    assert all(reply.ok for reply in await asyncio.gather(busy, tasks[0]))
    assert upstream.cancelled == 0


@manual_time
async def test_batch_06_twin_in_a_hurry_takes_the_item_along(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=0.02)
    batcher = bound(upstream, clock, events, flush_interval=0.5)
    streams = start(batcher, "keep busy", temperature=1)
    await asyncio.sleep(0.001)
    upstream.latency_s = 0.01
    streams += start(batcher, "a", temperature=0)
    began = clock.monotonic()
    hurried = start(batcher, "a", temperature=0, context=Context(deadline=began + 0.03))
    assert (await hurried[0]).text == "echo: a"
    assert clock.monotonic() - began < 0.03
    assert flushed(events)[-1] == (1, "deadline")
    await asyncio.gather(*streams)


@manual_time
async def test_shared_request_lasts_as_long_as_its_most_patient_caller(clock: ManualClock) -> None:
    for fields in ({"temperature": 0}, {}):
        upstream = BatchServer(latency_s=1)
        batcher = keeping_deadlines(bound(upstream, clock))
        soon, later = clock.monotonic() + 0.5, clock.monotonic() + 3
        hurried = start(batcher, "a", context=Context(deadline=soon), **fields)
        patient = start(batcher, "a", context=Context(deadline=later), **fields)
        outcomes = await asyncio.gather(*hurried, *patient, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [errors.DeadlineExceeded, Reply]
        assert [call.deadline for call in upstream.calls] == [later]
        assert len(upstream.calls) == 1


@manual_time
async def test_deadline_is_kept_while_waiting_for_room(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=5)
    batcher = bound(upstream, clock, max_queue=1)
    busy = await occupy(batcher)
    began = clock.monotonic()
    (outside,) = start(keeping_deadlines(batcher), "a", context=Context(deadline=began + 0.05))
    with pytest.raises(errors.DeadlineExceeded):
        await outside
    assert clock.monotonic() - began == pytest.approx(0.05)
    assert (await busy).ok
    assert len(upstream.calls) == 1
    assert (await batcher(chat_call("next"))).ok


@manual_time
async def test_flight_that_becomes_more_urgent_takes_its_request_along(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=1)
    batcher = bound(upstream, clock)
    urgency = Urgency(priority=5, deadline=clock.monotonic() + 60)
    tasks = [asyncio.ensure_future(batcher(chat_call("a", context=Context(priority=5)).replace(urgency=urgency)))]
    tasks += start(batcher, "b", context=Context(priority=5, deadline=clock.monotonic() + 30))
    await asyncio.sleep(0.5)
    (asked,) = upstream.calls
    assert asked.priority == 5
    urgency.join(Context(priority=-1))
    assert (asked.priority, asked.deadline) == (-1, None)
    await asyncio.gather(*tasks)
    assert not urgency._listeners


@manual_time
async def test_step_barrier_lets_the_step_go_when_all_have_asked(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events, barrier=3, flush_interval=10)
    tasks = []
    for agent in ("a", "b", "c"):
        tasks += start(batcher, agent, context=Context(agent=agent, step=1))
        await asyncio.sleep(0.5)
    await asyncio.gather(*tasks)
    assert flushed(events) == [(3, "barrier")]
    tasks = start(batcher, "x", "y", context=Context(step=2))
    await asyncio.sleep(0.5)
    batcher.tick()
    await asyncio.gather(*tasks)
    assert flushed(events) == [(3, "barrier"), (2, "barrier")]


@manual_time
async def test_batch_10_incomplete_barrier_flushes_at_the_interval(clock: ManualClock) -> None:
    events: list[Event] = []
    batcher = bound(BatchServer(), clock, events, barrier=4, flush_interval=0.25)
    await asyncio.gather(*start(batcher, "a", "b", "c", context=Context(step=1)))
    assert flushed(events) == [(3, "interval")]
    assert clock.monotonic() == pytest.approx(1001.25)
    # The calls went, but that the agents have asked is remembered.
    late = start(batcher, "d", context=Context(step=1))
    await asyncio.gather(*late)
    assert flushed(events)[1:] == [(1, "barrier")]


@manual_time
async def test_barrier_counts_agents_that_ask_the_same(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events, barrier=3, flush_interval=10)
    tasks = [start(batcher, "same", temperature=0, context=Context(agent=name, step=1))[0] for name in "abc"]
    replies = await asyncio.gather(*tasks)
    assert [reply.text for reply in replies] == ["echo: same"] * 3
    assert flushed(events) == [(1, "barrier")]
    assert len(upstream.calls) == 1


@manual_time
async def test_barrier_does_not_wait_for_an_agent_that_asked_and_died(clock: ManualClock) -> None:
    events: list[Event] = []
    batcher = bound(BatchServer(), clock, events, barrier=3, flush_interval=10)
    tasks = [start(batcher, name, context=Context(agent=name, step=1))[0] for name in "ab"]
    await asyncio.sleep(0.1)
    tasks[0].cancel()
    tasks += start(batcher, "c", context=Context(agent="c", step=1))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert flushed(events) == [(2, "barrier")]
    assert clock.monotonic() < 1002


@manual_time
async def test_an_agent_that_asks_twice_counts_once(clock: ManualClock) -> None:
    events: list[Event] = []
    batcher = bound(BatchServer(), clock, events, barrier=2, flush_interval=10)
    tasks = [start(batcher, prompt, context=Context(agent="a", step=1))[0] for prompt in ("x", "y")]
    await asyncio.sleep(0.1)
    assert flushed(events) == []
    tasks += start(batcher, "z", context=Context(agent="b", step=1))
    await asyncio.gather(*tasks)
    assert flushed(events) == [(3, "barrier")]


@manual_time
async def test_what_a_step_asks_after_its_barrier_waits_for_nobody(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer(latency_s=0)
    upstream._script = [error_reply(500)]
    env = Env(clock=clock, seed=1, sinks=(events.append,)).endowed(JOINT)
    upstream.start(env)
    retry = Retry(attempts=3, backoff=0.1).bind(
        Batcher(min_size=1, barrier=3, flush_interval=600).bind(upstream, env), env
    )
    tasks = [start(retry, name, context=Context(agent=name, step=1))[0] for name in "abc"]
    assert all(reply.ok for reply in await asyncio.gather(*tasks))
    assert clock.monotonic() < 1002  # the repetitions did not wait for the interval
    (again,) = start(retry, "more", context=Context(agent="a", step=1))
    assert (await again).ok
    assert clock.monotonic() < 1002
    assert flushed(events)[0] == (3, "barrier")
    assert {cause for _, cause in flushed(events)[1:]} == {"idle"}


@manual_time
async def test_barrier_of_one_step_leaves_the_others_waiting(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events, barrier=2, flush_interval=10)
    next_step = start(batcher, "early", context=Context(agent="a", step=2))
    tasks = [start(batcher, name, context=Context(agent=name, step=1))[0] for name in "ab"]
    free = start(batcher, "free")
    await asyncio.gather(*tasks, *free)
    assert sorted(flushed(events)) == [(1, "idle"), (2, "barrier")]
    assert not next_step[0].done()
    batcher.tick()
    assert (await next_step[0]).ok


@manual_time
async def test_steps_that_never_complete_are_forgotten(clock: ManualClock) -> None:
    batcher = bound(BatchServer(latency_s=0), clock, barrier=2, flush_interval=0.01)
    for step in range(100):
        await asyncio.gather(*start(batcher, "a", context=Context(step=step)))
    assert len(batcher._gathering._asked) <= 65
    for step in range(100):
        await asyncio.gather(*start(batcher, "a", "b", context=Context(step=step)))
    assert len(batcher._gathering._complete) <= 64


@manual_time
async def test_steps_of_another_run_are_other_steps(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=0)
    batcher = bound(upstream, clock, barrier=2, flush_interval=60)
    for _ in range(2):
        tasks = start(batcher, "a", context=Context(step=0))
        await asyncio.sleep(1)
        assert not tasks[0].done()
        tasks += start(batcher, "b", context=Context(step=0))
        await asyncio.gather(*tasks)
        batcher.begin_run()
    assert sizes(upstream) == [2, 2]


# ── who travels together ────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_batch_07_different_calls_never_share(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock)
    tasks = [
        *start(batcher, "a", "b"),
        *start(batcher, "a", "b", model="other"),
        *start(batcher, "a", "b", temperature=1),
        *start(batcher, "a", "b", context=Context(tenant="t")),
    ]
    apart = {
        "credential": {"namespace": "another key's"},
        "headers": {"native": (("authorization", "Bearer other"),)},
        "version": {"variant": (("anthropic-beta", "x"),)},
        "endpoint": {"target": "http://elsewhere/v1"},
    }
    for changes in apart.values():
        calls = [chat_call(prompt).replace(**changes) for prompt in ("a", "b")]
        tasks += [asyncio.ensure_future(batcher(call)) for call in calls]
    replies = await asyncio.gather(*tasks)
    assert [reply.text for reply in replies] == ["echo: a", "echo: b"] * 8
    assert sizes(upstream) == [2] * 8
    assert len({(call.namespace, call.native, call.variant, call.target) for call in upstream.calls}) == 5


@manual_time
async def test_streams_and_tools_go_straight_through(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = FakeUpstream(latency_s=1)
    batcher = bound(upstream, clock, events)
    stream, _ = await asyncio.gather(*start(batcher, "a", stream=True), *start(batcher, "b", tools=[]))
    assert [chunk async for chunk in stream.chunks or ()] == chat_chunks("echo: a")
    assert flushed(events) == []


@pytest.mark.parametrize("options", [{"caps": frozenset()}, {"joint": "off"}])
def test_endpoint_without_batch_call_gets_single_calls_together(options: dict[str, Any]) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        events: list[Event] = []
        upstream = FakeUpstream(latency_s=1)
        batcher = bound(upstream, clock, events, **options)
        busy = await occupy(batcher)
        tasks = start(batcher, "a", "b", "c")
        replies = await asyncio.gather(*tasks)
        assert [reply.text for reply in replies] == ["echo: a", "echo: b", "echo: c"]
        assert [call.op for call in upstream.calls] == ["chat"] * 4
        assert flushed(events) == [(1, "idle"), (3, "few")]  # no mate could help them, so they waited for none
        assert clock.monotonic() == pytest.approx(1001, abs=0.01)
        assert upstream.peak == 4
        await busy

    run()


@manual_time
async def test_single_call_runs_in_its_callers_context(clock: ManualClock) -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []

    def note(_: Call) -> Reply:
        seen.append(who.get())
        return Reply(data=b"{}")

    batcher = bound(FakeUpstream([note, note]), clock)

    async def ask(name: str) -> None:
        who.set(name)
        await batcher(Call("function", "f", {"x": object()}))

    await asyncio.gather(ask("alice"), ask("bob"))
    assert seen == ["alice", "bob"]


@manual_time
async def test_completions_become_a_list_of_prompts(clock: ManualClock) -> None:
    def answer(call: Call) -> Reply:
        assert call.payload["prompt"] == ["a", "b"]
        choices = [{"index": i, "text": t, "finish_reason": "stop"} for i, t in enumerate(("A", "B"))]
        return Reply(data=msgspec.json.encode({"choices": choices}))

    batcher = bound(FakeUpstream([answer]), clock)
    calls = [Call("complete", "m", {"prompt": prompt, "max_tokens": 3}) for prompt in ("a", "b")]
    replies = await asyncio.gather(*map(batcher, calls))
    assert [reply.text for reply in replies] == ["A", "B"]


@manual_time
async def test_batch_09_greedy_duplicates_are_one_item(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock)
    replies = await asyncio.gather(*start(batcher, "a", "a", "b", "a", temperature=0))
    assert [reply.text for reply in replies] == ["echo: a", "echo: a", "echo: b", "echo: a"]
    assert sizes(upstream) == [2]
    replies = await asyncio.gather(*start(batcher, "a", "a", temperature=1))
    assert sizes(upstream) == [2, 2]
    replies = await asyncio.gather(*start(batcher, "a", "a", temperature=0))
    assert [reply.source for reply in replies] == ["upstream", "coalesced"]
    assert sizes(upstream) == [2, 2, 1]


@manual_time
async def test_duplicates_get_their_own_errors(clock: ManualClock) -> None:
    batcher = bound(FakeUpstream([errors.ConnectionFailed("x")]), clock)
    first, second = await asyncio.gather(*start(batcher, "a", "a", temperature=0), return_exceptions=True)
    assert isinstance(first, errors.ConnectionFailed)
    assert isinstance(second, errors.ConnectionFailed)
    assert first is not second


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("position", range(8))
def test_batch_03_bad_item_is_found_and_the_others_answered(position: int) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = BatchServer()
        prompts = [str(number) for number in range(8)]
        prompts[position] = "bad"
        replies = await asyncio.gather(*start(bound(upstream, clock), *prompts))
        assert [reply.status for reply in replies] == [400 if prompt == "bad" else 200 for prompt in prompts]
        assert [reply.text for reply in replies if reply.ok] == [f"echo: {p}" for p in prompts if p != "bad"]
        assert len(upstream.calls) - 1 <= 2 * 3 + 1

    run()


@manual_time
async def test_batch_03_refused_half_that_nobody_waits_for_is_cancelled(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock)
    tasks = start(batcher, "bad", *map(str, range(7)))
    await asyncio.sleep(1.5)  # two requests of four are under way
    assert upstream.in_flight == 2
    for task in tasks[1:5]:  # by their prompts they stand before the others
        task.cancel()
    await asyncio.sleep(0.01)
    assert (upstream.in_flight, upstream.cancelled) == (1, 1)
    replies = await asyncio.gather(tasks[0], *tasks[5:])
    assert [reply.status for reply in replies] == [400, 200, 200, 200]
    assert batcher.gauges()["active"] == 0


@manual_time
async def test_closing_during_the_search_leaves_nobody_waiting(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock)
    tasks = start(batcher, "bad", *map(str, range(7)))
    await asyncio.sleep(2.5)
    batcher.closing()
    await batcher.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {Reply, errors.Closed}
    assert upstream.in_flight == 0
    assert not batcher._gathering._tasks


@manual_time
async def test_many_bad_items_end_as_single_calls(clock: ManualClock) -> None:
    upstream = BatchServer()
    prompts = ["bad" if number % 2 else str(number) for number in range(16)]
    replies = await asyncio.gather(*start(bound(upstream, clock), *prompts))
    assert [reply.status for reply in replies] == [200, 400] * 8
    assert len(upstream.calls) <= 1 + 9 + 16


@manual_time
async def test_wrong_answers_fail_their_items_only(clock: ManualClock) -> None:
    body = msgspec.json.decode(joint_body(["a", "b", "c"]))
    body["choices"][1]["index"] = 2
    upstream = FakeUpstream([Reply(data=msgspec.json.encode(body))])
    outcomes = await asyncio.gather(*start(bound(upstream, clock), "a", "b", "c"), return_exceptions=True)
    assert isinstance(outcomes[0], Reply)
    assert [type(outcome) for outcome in outcomes[1:]] == [errors.ProtocolError] * 2


@manual_time
async def test_unfinished_choice_fails_its_item_only(clock: ManualClock) -> None:
    upstream = BatchServer()
    choices = msgspec.json.decode(joint_body("abc"))["choices"]
    choices[1]["finish_reason"] = None
    upstream._script.append(Reply(data=joint_body("abc", choices=choices)))
    outcomes = await asyncio.gather(*start(bound(upstream, clock), *"abc"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Reply, errors.ProtocolError, Reply]
    assert "finish_reason" in str(outcomes[1])


@manual_time
async def test_list_for_the_number_of_choices_goes_alone(clock: ManualClock) -> None:
    upstream = BatchServer()
    await asyncio.gather(*start(bound(upstream, clock), "a", "b", n=[1]))
    assert sizes(upstream) == [1, 1]


@manual_time
async def test_unreadable_joint_answer_fails_everybody(clock: ManualClock) -> None:
    outcomes = await asyncio.gather(
        *start(bound(FakeUpstream([Reply(data=b"<html>")]), clock), "a", "b"), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [errors.ProtocolError] * 2


@manual_time
async def test_stream_in_place_of_a_joint_answer_is_closed(clock: ManualClock) -> None:
    chunks = ScriptedChunks(chat_chunks("x"))
    batcher = bound(FakeUpstream([Reply(chunks=chunks)]), clock)
    outcomes = await asyncio.gather(*start(batcher, "a", "b"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.ProtocolError] * 2
    assert chunks.closed


@manual_time
async def test_every_agent_is_told_its_part_of_the_tokens(clock: ManualClock) -> None:
    stack = Stack(Batcher(min_size=1))
    async with stack.bind(WithBatch(), env=Env(clock=clock, seed=1)) as engine:
        calls = [chat_call(name, context=Context(agent=name)) for name in "abc"]
        replies = await asyncio.gather(*map(engine.call, calls))
        stats = engine.get_performance_stats()
    assert {reply.source for reply in replies} == {"batch"}
    told = {name: (found["tokens_in"], found["tokens_out"]) for name, found in stats["by_agent"].items()}
    assert told == dict.fromkeys("abc", (10, 2))
    assert (stats["tokens_in"], stats["tokens_out"], stats["upstream_requests"]) == (30, 6, 1)


@manual_time
async def test_limiter_charges_one_request_and_everybodys_tokens(clock: ManualClock) -> None:
    stack = Stack(Batcher(min_size=1), RateLimiter(rpm=600, tpm=100_000, concurrency=64))
    upstream = WithBatch(latency_s=1)
    async with stack.bind(upstream, env=Env(clock=clock, seed=1)) as engine:
        tasks = [asyncio.ensure_future(engine.call(chat_call("x" * 400, max_tokens=50))) for _ in range(8)]
        await asyncio.sleep(0.5)
        limit = engine.get_performance_stats()["layers"]["limit"]
        assert (limit["in_use"], limit["requests_in_window"]) == (8, 1)
        await asyncio.gather(*tasks)
        stats = engine.get_performance_stats()
    assert stats["layers"]["limit"]["in_use"] == 0
    assert (stats["upstream_requests"], stats["tokens_in"], stats["tokens_out"]) == (1, 80, 16)


@manual_time
async def test_retry_of_a_failed_exchange_costs_the_budget_once(clock: ManualClock) -> None:
    upstream = WithBatch()
    upstream._script = [error_reply(500)]
    env = Env(clock=clock, seed=1).endowed(JOINT)
    upstream.start(env)
    retry = Retry(attempts=2, budget=10).bind(Batcher(min_size=1).bind(upstream, env), env)
    replies = await asyncio.gather(*start(retry, *map(str, range(16))))
    assert {reply.status for reply in replies} == {200}


@manual_time
async def test_failed_exchange_gives_each_its_own_error_of_one_exchange(clock: ManualClock) -> None:
    error = errors.ConnectionFailed("refused", endpoint="e")
    outcomes = await asyncio.gather(*start(bound(FakeUpstream([error]), clock), "a", "b", "c"), return_exceptions=True)
    assert len({id(outcome) for outcome in outcomes}) == 3
    assert len({outcome.exchange for outcome in outcomes if isinstance(outcome, errors.ConnectionFailed)} - {0}) == 1
    foreign = RuntimeError("x")
    outcomes = await asyncio.gather(*start(bound(FakeUpstream([foreign]), clock), "a", "b"), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["x", "x"]


@manual_time
async def test_breaker_and_budget_count_a_failed_exchange_once(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)])
    env = Env(clock=clock, seed=1).endowed(JOINT)
    upstream.start(env)
    breaker = CircuitBreaker().bind(Batcher(min_size=1).bind(upstream, env), env)
    retry = Retry(attempts=1).bind(breaker, env)
    replies = await asyncio.gather(*start(retry, *map(str, range(16))))
    assert {reply.status for reply in replies} == {500}
    assert breaker.gauges()["not_closed"] == 0


@manual_time
@pytest.mark.parametrize(("joint", "expected"), [("on", [3]), ("auto", [1, 1, 1]), ("off", [1, 1, 1])])
async def test_joint_requests_go_where_somebody_says_so(clock: ManualClock, joint: str, expected: list[int]) -> None:
    upstream = BatchServer()
    await asyncio.gather(*start(bound(upstream, clock, caps=frozenset(), joint=joint), "a", "b", "c"))
    assert sizes(upstream) == expected


@manual_time
async def test_unknown_batch_call_is_remembered(clock: ManualClock) -> None:
    for refusal in (Reply(data=b'{"detail":"Not Found"}', status=404), error_reply(405)):
        upstream = FakeUpstream([refusal], latency_s=1)
        batcher = bound(upstream, clock)
        replies = await asyncio.gather(*start(batcher, "a", "b"))
        assert [reply.text for reply in replies] == ["echo: a", "echo: b"]
        assert [call.op for call in upstream.calls] == ["chat_batch", "chat", "chat"]
        await asyncio.gather(*start(batcher, "a", "b"))
        assert [call.op for call in upstream.calls][3:] == ["chat", "chat"]


@manual_time
async def test_unknown_model_is_each_items_own_refusal(clock: ManualClock) -> None:
    missing = error_reply(404, code="model_not_found")
    upstream = FakeUpstream([missing] * 3)
    batcher = bound(upstream, clock)
    replies = await asyncio.gather(*start(batcher, "a", "b"))
    assert [reply.status for reply in replies] == [404, 404]
    await asyncio.gather(*start(batcher, "a", "b"), return_exceptions=True)
    assert upstream.calls[3].op == "chat_batch"


@manual_time
async def test_overload_makes_the_next_groups_smaller(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=0.1)
    upstream._script.append(error_reply(503))
    batcher = bound(upstream, clock, max_size=8)
    replies = await asyncio.gather(*start(batcher, *map(str, range(8))))
    assert {reply.status for reply in replies} == {503}
    replies = await asyncio.gather(*start(batcher, *map(str, range(8))))
    assert sizes(upstream) == [8, 4, 4]
    await asyncio.gather(*start(batcher, *map(str, range(8))))
    assert sizes(upstream)[3:] == [6, 2]


@manual_time
async def test_batches_come_back_after_an_overload_that_took_them_all(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=0.1)
    batcher = bound(upstream, clock, max_size=8)
    for prompts in ("abcdefgh", "ab"):
        upstream._script.append(error_reply(503))
        await asyncio.gather(*start(batcher, *prompts))
    upstream.calls.clear()
    await asyncio.gather(*start(batcher, *map(str, range(4))))
    assert sizes(upstream) == [1, 1, 1, 1]
    for _ in range(20):
        await asyncio.gather(*start(batcher, *map(str, range(8))))
    assert sizes(upstream)[-1] == 8


# ── cancellation ────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_batch_04_cancelled_before_the_flush_is_not_on_the_wire(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock, flush_interval=0.5)
    busy = await occupy(batcher)
    tasks = start(batcher, "a", "b", "c")
    await asyncio.sleep(0.1)
    tasks[1].cancel()
    await asyncio.gather(*tasks, busy, return_exceptions=True)
    assert [c[-1]["content"] for c in upstream.calls[1].payload["messages"]] == ["a", "c"]
    assert tasks[1].cancelled()


@manual_time
async def test_batch_04_cancelled_after_the_flush_disturbs_nobody(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock)
    tasks = start(batcher, "a", "b", "c")
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    replies = await asyncio.gather(*tasks[1:])
    assert [reply.text for reply in replies] == ["echo: b", "echo: c"]
    assert upstream.cancelled == 0


@manual_time
async def test_last_to_leave_cancels_the_request(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=60)
    batcher = bound(upstream, clock)
    tasks = start(batcher, "a", "b", "c")
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (upstream.cancelled, upstream.in_flight) == (1, 0)
    assert batcher.gauges()["active"] == 0
    assert (await batcher(chat_call("next"))).ok


@manual_time
async def test_everybody_gone_before_the_flush_sends_nothing(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock, flush_interval=0.5)
    busy = await occupy(batcher)
    tasks = start(batcher, "a", "a", temperature=0)
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await busy
    await asyncio.sleep(1)
    assert len(upstream.calls) == 1
    assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}


@manual_time
async def test_cancelled_in_the_very_turn_of_its_release(clock: ManualClock) -> None:
    upstream = FakeUpstream(latency_s=1)
    batcher = bound(upstream, clock)
    (task,) = start(batcher, "a")
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert batcher.gauges()["active"] == 0
    assert (await batcher(chat_call("b"))).ok


@manual_time
async def test_cancelled_twin_leaves_the_other_its_answer(clock: ManualClock) -> None:
    batcher = bound(BatchServer(), clock)
    one, two = start(batcher, "a", "a", temperature=0)
    await asyncio.sleep(0.5)
    one.cancel()
    assert (await two).text == "echo: a"


@manual_time
async def test_order_01_cancelled_follower_leaves_its_flights_item_in_the_batch(clock: ManualClock) -> None:
    upstream = BatchServer()
    env = Env(clock=clock, seed=1).endowed(JOINT)
    upstream.start(env)
    flights = Coalescer().bind(Batcher(min_size=1).bind(upstream, env), env)
    tasks = start(flights, "a", "a", "b", temperature=0)
    await asyncio.sleep(0.5)
    tasks[1].cancel()
    replies = await asyncio.gather(tasks[0], tasks[2])
    assert [reply.text for reply in replies] == ["echo: a", "echo: b"]
    assert sizes(upstream) == [2]


@manual_time
async def test_item_cancelled_during_the_search_is_not_sent_again(clock: ManualClock) -> None:
    upstream = BatchServer()
    tasks = start(bound(upstream, clock), "a", "bad")
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    assert (await tasks[1]).status == 400
    assert [call.op for call in upstream.calls] == ["chat_batch", "chat"]


# ── bounds and lifetime ─────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_batch_08_endless_submits_wait_outside(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=0.01)
    batcher = bound(upstream, clock, max_queue=50, max_size=10)
    tasks = start(batcher, *map(str, range(1000)))
    await asyncio.sleep(0.005)
    assert batcher._gathering.entrance.inside == 50
    replies = await asyncio.gather(*tasks)
    assert [reply.text for reply in replies] == [f"echo: {number}" for number in range(1000)]
    assert batcher._gathering.entrance.inside == 0


@manual_time
async def test_batch_08_ten_thousand_submits_at_a_slow_upstream_keep_its_bound(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=2)
    batcher = bound(upstream, clock, max_queue=200, max_size=50)
    gathering = batcher._gathering
    most = 0

    async def ask(number: int) -> str:
        nonlocal most
        reply = await batcher(chat_call(str(number)))
        most = max(most, gathering.entrance.inside, len(gathering._plan) + 50 * len(gathering._tasks))
        return reply.text

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(number)) for number in range(10_000)]
        await asyncio.sleep(1)
        gone = tasks[5000:9000]
        for task in gone:
            task.cancel()
    assert most <= 250
    left = [task for task in tasks if not task.cancelled()]
    assert len(left) == 6000
    assert [task.result() for task in left[:2]] == ["echo: 0", "echo: 1"]
    assert upstream.peak <= 4
    assert not gathering.entrance._outside
    assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}


@manual_time
async def test_batch_08_full_queue_refuses_where_wanted(clock: ManualClock) -> None:
    batcher = bound(BatchServer(), clock, max_queue=2, when_full="refuse")
    outcomes = await asyncio.gather(*start(batcher, "a", "b", "c"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Reply, Reply, errors.QueueFull]


@manual_time
async def test_batch_05_closing_sends_what_waits(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = BatchServer()
    batcher = bound(upstream, clock, events, flush_interval=60)
    busy = await occupy(batcher)
    tasks = start(batcher, *map(str, range(5)))
    await asyncio.sleep(0.1)
    batcher.closing()
    assert all(reply.ok for reply in await asyncio.gather(busy, *tasks))
    assert flushed(events)[-1] == (5, "close")
    assert (await batcher(chat_call("a repetition while draining"))).ok
    await batcher.aclose()
    with pytest.raises(errors.Closed):
        await batcher(chat_call("late"))
    await batcher.aclose()


@manual_time
async def test_batch_05_closing_without_drain_fails_what_waits(clock: ManualClock) -> None:
    upstream = BatchServer()
    batcher = bound(upstream, clock, flush_interval=60, drain=False, max_queue=4)
    busy = await occupy(batcher)
    tasks = start(batcher, *map(str, range(5)), temperature=0)
    await asyncio.sleep(0.1)
    batcher.closing()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.Closed] * 5
    assert (await busy).ok
    assert len(upstream.calls) == 1


@manual_time
async def test_batch_05_aclose_cancels_what_is_under_way(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=60)
    batcher = bound(upstream, clock, max_queue=4)
    tasks = start(batcher, *map(str, range(6)))
    await asyncio.sleep(0.5)
    await batcher.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.Closed] * 6
    assert upstream.cancelled == 1


@pytest.mark.parametrize("drain", [True, False])
def test_batch_05_async_with_left_by_an_exception_leaves_nobody_waiting(drain: bool) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        upstream = WithBatch()
        stack = Stack(Batcher(min_size=1, flush_interval=600, drain=drain))
        tasks: list[asyncio.Task[Reply]] = []
        with pytest.raises(Broken):
            async with stack.bind(upstream, env=Env(clock=clock, seed=1)) as engine:
                tasks += [asyncio.ensure_future(engine.call(chat_call("busy")))]
                await asyncio.sleep(0.1)
                tasks += [asyncio.ensure_future(engine.call(chat_call(name))) for name in "abcde"]
                await asyncio.sleep(0.1)
                raise Broken
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds == [Reply, *([Reply] if drain else [errors.Closed]) * 5]
        assert sizes(upstream) == ([1, 5] if drain else [1])
        with pytest.raises(errors.Closed):
            await engine.call(chat_call("late"))

    run()


@pytest.mark.parametrize("turns", range(6))
def test_batch_05_call_that_races_the_closing_gets_an_answer_or_closed(turns: int) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        stack = Stack(Batcher(min_size=1, flush_interval=600, max_queue=3))
        engine = stack.bind(WithBatch(), env=Env(clock=clock, seed=1))
        tasks = [asyncio.ensure_future(engine.call(chat_call(str(number)))) for number in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(engine.aclose())
        tasks += [asyncio.ensure_future(engine.call(chat_call(f"late {number}"))) for number in range(3)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
        assert {type(outcome) for outcome in outcomes} <= {Reply, errors.Closed}
        assert sum(isinstance(outcome, Reply) for outcome in outcomes) >= (5 if turns else 0)

    run()


@manual_time
async def test_aclose_before_the_flush(clock: ManualClock) -> None:
    batcher = bound(BatchServer(), clock, flush_interval=60)
    busy = await occupy(batcher)
    tasks = start(batcher, "a", "b")
    await asyncio.sleep(0.1)
    await batcher.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.Closed] * 2
    await busy


def test_new_loop_starts_empty() -> None:
    clock = ManualClock()
    upstream = BatchServer(latency_s=1)
    batcher = bound(upstream, clock, flush_interval=60)

    async def die() -> None:
        await occupy(batcher)
        start(batcher, "a", "b")
        await asyncio.sleep(0.1)

    clock.run(die())
    batcher.rehome()
    gc.collect()

    async def live() -> None:
        assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}
        assert (await batcher(chat_call("again"))).text == "echo: again"

    clock.run(live())


def test_new_loop_keeps_the_group_size_that_was_learned() -> None:
    clock = ManualClock()
    upstream = BatchServer(latency_s=1)
    batcher = bound(upstream, clock, max_size=8, flush_interval=0.01)

    async def step() -> None:
        await asyncio.gather(*start(batcher, *"abcdefgh"), return_exceptions=True)

    upstream._script.append(error_reply(503))
    clock.run(step())
    batcher.rehome()
    clock.run(step())
    assert sizes(upstream) == [8, 4, 4]


@manual_time
async def test_shed_fails_what_waits_for_a_dead_endpoint(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=5)
    batcher = bound(upstream, clock, flush_interval=60)
    busy = await occupy(batcher)
    doomed, other = start(batcher, "a", "a", temperature=0), start(batcher, "a", model="other")
    await asyncio.sleep(0.1)
    assert batcher.shed(chat_call(), lambda: errors.CircuitOpen("dead")) == 2
    outcomes = await asyncio.gather(*doomed, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.CircuitOpen] * 2
    assert outcomes[0] is not outcomes[1]
    assert (await other[0]).ok
    await busy


@manual_time
async def test_shed_fails_who_waits_outside_for_a_dead_endpoint(clock: ManualClock) -> None:
    upstream = BatchServer(latency_s=5)
    batcher = bound(upstream, clock, max_queue=1)
    busy = await occupy(batcher)
    doomed, other, gone = start(batcher, "a", "b"), start(batcher, "a", model="other"), start(batcher, "c")[0]
    await asyncio.sleep(0.1)
    gone.cancel()
    assert batcher.shed(chat_call(), lambda: errors.CircuitOpen("dead")) == 2
    outcomes = await asyncio.gather(*doomed, gone, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.CircuitOpen] * 2 + [asyncio.CancelledError]
    assert (await other[0]).ok
    await busy
    assert len(upstream.calls) == 2
    assert batcher._gathering.entrance.inside == 0


@manual_time
async def test_cancelled_in_the_very_turn_of_being_shed_outside(clock: ManualClock) -> None:
    batcher = bound(BatchServer(latency_s=1), clock, max_queue=1)
    busy = await occupy(batcher)
    (outside,) = start(batcher, "a")
    await asyncio.sleep(0.1)
    assert batcher.shed(chat_call(), lambda: errors.CircuitOpen("dead")) == 1
    outside.cancel()
    assert isinstance((await asyncio.gather(outside, return_exceptions=True))[0], asyncio.CancelledError)
    assert (await busy).ok
    assert batcher._gathering.entrance.inside == 0


@manual_time
async def test_broken_exchange_fails_its_callers(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmmw.layers import exchange

    def broken(*_: object) -> None:
        raise Broken("a bug of ours")

    monkeypatch.setattr(exchange, "joint_call", broken)
    batcher = bound(BatchServer(), clock)
    outcomes = await asyncio.gather(*start(batcher, "a", "b"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Broken] * 2
    assert (await batcher(chat_call("c"))).ok


@pytest.mark.parametrize("where", ["Exchange", "due", "drain"])
def test_dying_flusher_fails_its_waiters_and_goes_on(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from llmmw.algo.batchplan import Plan
    from llmmw.layers import gather

    @manual_time
    async def run(clock: ManualClock) -> None:
        batcher = bound(BatchServer(), clock)
        busy = [] if where == "drain" else [await occupy(batcher)]

        def broken(*_: object, **__: object) -> None:
            raise Broken("a bug of ours")

        with monkeypatch.context() as patch:
            patch.setattr(gather if where == "Exchange" else Plan, where, broken)
            outcomes = await asyncio.gather(*start(batcher, "a", "a", "b", temperature=0), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Broken] * 3
        assert len({id(outcome) for outcome in outcomes}) == 3
        replies = await asyncio.gather(*busy, *start(batcher, "c", "d"))
        assert all(reply.ok for reply in replies)
        assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}
        assert not batcher._gathering._twins

    run()


@manual_time
async def test_exchange_cancelled_by_a_stranger_is_a_typed_error(clock: ManualClock) -> None:
    batcher = bound(BatchServer(), clock)
    tasks = start(batcher, "a", "b")
    await asyncio.sleep(0.5)
    for task in batcher._gathering._tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.AmbiguousOutcome] * 2


@manual_time
async def test_random_cancellation_leaves_nothing_behind(clock: ManualClock) -> None:
    import random

    chance = random.Random(3)
    upstream = BatchServer(latency_s=0.03)
    batcher = bound(upstream, clock, max_size=5, max_queue=20)
    tasks: list[asyncio.Task[Reply]] = []
    for number in range(300):
        tasks += start(batcher, str(number), temperature=chance.choice([0, 1]))
        if chance.random() < 0.4:
            chance.choice(tasks).cancel()
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.02)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, asyncio.CancelledError) or outcome.text == f"echo: {number}"  # type: ignore[union-attr]
    await asyncio.sleep(1)
    assert batcher.gauges() == {"waiting": 0, "active": 0, "joint": True}
    assert batcher._gathering.entrance.inside == 0
    assert not batcher._gathering._twins
    assert not batcher._gathering._tasks


# ── entrance ────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_entrance_survives_cancellation_at_any_moment(clock: ManualClock) -> None:
    del clock
    entrance = Entrance(1, lambda: False)
    await entrance.enter(chat_call())
    waiting = [asyncio.ensure_future(entrance.enter(chat_call())) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    entrance.leave()
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert entrance.inside == 1
    entrance.leave()
    assert not entrance.full


@pytest.mark.parametrize(
    "options",
    [
        {"max_size": 0},
        {"min_size": 0},
        {"flush_interval": 0},
        {"max_bytes": 0},
        {"max_queue": None},
        {"when_full": "x"},
        {"joint": "x"},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        Batcher(**options)


def test_settings_compare_and_read_text() -> None:
    assert Batcher(flush_interval="20ms") == Batcher()
