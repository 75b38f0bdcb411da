"""Replicas that fail in every way while callers leave: nothing is lost, repeated without leave, or counted for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw import Balancer, CircuitBreaker, Context, ErrorRouter, RateLimiter, Reply, Retry, Stack, errors
from llmmw.env import Env
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from llmmw.call import Call

QUICK = settings(max_examples=40, derandomize=True, deadline=None)
WAYS = ("ok", "refused", "500", "429", "400", "lost", "slow", "cut")
MAYBE_DONE = {"ok", "lost", "slow", "cut"}
ATTEMPTS = 3


class Server(FakeUpstream):
    """Goes through its ways, again and again, and remembers for which calls it may have done the work."""

    def __init__(self, number: int, ways: list[str]) -> None:
        super().__init__(name=f"http://r{number}.test/v1")
        self.ways = ways
        self.done: list[str] = []

    async def _answer(self, call: Call, number: int) -> Reply:
        way = self.ways[number % len(self.ways)]
        if way in MAYBE_DONE:
            self.done.append(call.payload["messages"][0]["content"])
        await asyncio.sleep(30 if way == "slow" else 0.5)
        if way == "refused":
            raise errors.ConnectionFailed("refused")
        if way == "lost":
            raise errors.UpstreamTimeout("lost", sent=True)
        if way in {"500", "429", "400"}:
            return error_reply(int(way), **({"retry_after": "2"} if way == "429" else {}))
        if way == "cut" and call.stream:
            return Reply(chunks=ScriptedChunks([*chat_chunks("one two")[:1], errors.AmbiguousOutcome("cut")]))
        return await super()._answer(call, number)


async def outcome_of(engine: Any, prompt: str, agent: str | None, *, stream: bool) -> str:
    call = chat_call(prompt, context=Context(agent=agent), stream=stream)
    try:
        reply = await engine.call(call)
        if reply.chunks is not None:
            async for _ in reply.chunks:
                pass
    except errors.LLMMWError as error:
        return type(error).__name__
    return "ok" if reply.ok else str(reply.status)


@QUICK
@given(
    ways=st.lists(st.lists(st.sampled_from(WAYS), min_size=1, max_size=6), min_size=2, max_size=4),
    calls=st.lists(
        st.tuples(
            st.sampled_from([None, "alice", "bob"]),
            st.booleans(),
            st.floats(0, 20),
            st.one_of(st.none(), st.floats(0.1, 40)),
        ),
        min_size=1,
        max_size=25,
    ),
    layers=st.sets(st.sampled_from(["route", "retry", "limit"])),
)
def test_every_call_ends_once_and_the_books_balance(
    ways: list[list[str]], calls: list[tuple[str | None, bool, float, float | None]], layers: set[str]
) -> None:
    clock = ManualClock()
    upstreams = [Server(number, each) for number, each in enumerate(ways)]
    made = {"route": ErrorRouter(), "retry": Retry(attempts=ATTEMPTS), "limit": RateLimiter(rpm=600, concurrency=3)}
    stack = Stack(*[made[name] for name in ("route",) if name in layers], Balancer(slow_start=5),
                  *[made["retry"] for name in ("retry",) if name in layers], CircuitBreaker(open_for=2, max_open=8),
                  *[made["limit"] for name in ("limit",) if name in layers])  # fmt: skip

    async def run() -> None:
        engine = stack.bind(upstreams, env=Env(clock=clock, seed=1))

        async def one(number: int) -> str:
            agent, stream, begins, leaves = calls[number]
            await asyncio.sleep(begins)
            try:
                async with asyncio.timeout(leaves):
                    return await outcome_of(engine, f"p{number}", agent, stream=stream)
            except TimeoutError:
                return "left"

        outcomes = await asyncio.gather(*(one(number) for number in range(len(calls))))
        stats = engine.get_performance_stats()
        for figures in stats["layers"]["balance"]["replicas"].values():
            assert figures["in_flight"] == 0
            assert 0 < figures["ease"] <= 1
        assert stats["in_flight"] == 0
        for number, outcome in enumerate(outcomes):
            prompt = f"p{number}"
            asked = [
                len([c for c in each.calls if c.payload["messages"][0]["content"] == prompt]) for each in upstreams
            ]
            # What may be done is not made again.
            assert sum(each.done.count(prompt) for each in upstreams) <= 1
            assert sum(asked) <= len(ways) + ATTEMPTS + 10 * any("429" in each for each in ways)
            if outcome == "ok":
                assert sum(each.done.count(prompt) for each in upstreams) == 1
        await engine.aclose()
        assert all(upstream.in_flight == 0 and upstream.closed for upstream in upstreams)

    clock.run(run())
