"""A call cancelled at any moment (attempt, back-off, queue, stream) ends in that moment and leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw import errors
from llmmw.call import Reply
from llmmw.env import Env
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.deadline import Deadline
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter
from llmmw.layers.timeout import Timeout
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Call
    from llmmw.engine import Engine

OUTCOMES: dict[str, Callable[[bool], Reply | Exception]] = {
    "ok": lambda stream: (
        Reply(chunks=ScriptedChunks(chat_chunks("a b c"), gap_s=0.7)) if stream else Reply(data=chat_body("x"))
    ),
    "500": lambda _: error_reply(500),
    "429": lambda _: error_reply(429, retry_after="3"),
    "400": lambda _: error_reply(400),
    "lost": lambda _: errors.ConnectionFailed("x"),
    "ambiguous": lambda _: errors.UpstreamTimeout("x"),
    "cut": lambda stream: (
        Reply(chunks=ScriptedChunks([*chat_chunks("a b")[:1], errors.ConnectionFailed("x")], gap_s=0.7))
        if stream
        else errors.ProtocolError("x")
    ),
}
steps = st.tuples(st.sampled_from(sorted(OUTCOMES)), st.sampled_from([0.0, 0.3, 1.0, 2.5]))


class Scripted(FakeUpstream):
    def __init__(self, script: list[tuple[str, float]], name: str) -> None:
        super().__init__(name=name)
        self.script = iter(script)

    async def _answer(self, call: Call, number: int) -> Reply:
        del number
        outcome, latency = next(self.script, ("ok", 0.1))
        await asyncio.sleep(latency)
        found = OUTCOMES[outcome](call.stream)
        if isinstance(found, Exception):
            raise found
        return found


async def use(engine: Engine, stream: bool) -> None:
    reply = await engine.call(chat_call(temperature=0, stream=stream))
    if reply.chunks is not None:
        try:
            async for _ in reply.chunks:
                pass
        finally:
            await reply.chunks.aclose()


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    st.lists(steps, max_size=6),
    st.lists(steps, max_size=6),
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 1.2, 2.5, 3.1, 5.0, 8.0]), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_route_16_cancelled_anywhere_ends_at_once_and_gives_everything_back(
    first: list[tuple[str, float]],
    second: list[tuple[str, float]],
    moments: list[float],
    stream: bool,
    hedge: bool,
) -> None:
    clock = ManualClock()

    async def run() -> None:
        one, two = Scripted(first, "http://fake.test/v1"), Scripted(second, "http://two.test/v1")
        layers = Deadline(30), ErrorRouter(fallbacks=[two]), Retry(hedge=hedge), CircuitBreaker(consecutive=2)
        stack = Stack(*layers, RateLimiter(concurrency=1), Timeout(20))
        engine = stack.bind(one, env=Env(clock=clock, seed=1))
        for moment in moments:
            crowd = [asyncio.ensure_future(use(engine, stream)) for _ in range(3)]
            await asyncio.sleep(moment)
            cancelled_at = clock.monotonic()
            for task in crowd:
                task.cancel()
            ends = await asyncio.gather(*crowd, return_exceptions=True)
            assert clock.monotonic() == cancelled_at
            assert all(end is None or isinstance(end, errors.LLMMWError | asyncio.CancelledError) for end in ends)
            assert (one.in_flight, two.in_flight) == (0, 0)
            assert len(asyncio.all_tasks()) == 1
            stats = engine.get_performance_stats()
            limiter = stats["layers"]["limit"]
            assert (stats["in_flight"], limiter["in_use"], limiter["waiting"]) == (0, 0, 0)
        one.script = two.script = iter(())
        await asyncio.sleep(200)  # whatever was open by then, nobody is locked out for ever
        await use(engine, stream)
        await engine.aclose()

    clock.run(run())
