"""Every call has one outcome and is counted as what its caller saw, whatever stands in the stack and whatever happens.

request_count = hits + coalesced + upstream answers + failures + cancellations, exactly (SPEC 8), under random stacks,
errors, refusals, deadlines, cancellations, streams left early or dropped, and closes in the middle.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter

from llmmw import (
    Batcher,
    CircuitBreaker,
    Coalescer,
    Deadline,
    ErrorRouter,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
)
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import Closed, ConnectionFailed, LLMMWError
from llmmw.events import CallEnded, CallStarted
from llmmw.stats import result_of
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

HELD = (("coalesce", "flights"), ("coalesce", "waiting"), ("limit", "in_use"), ("limit", "waiting"))
ENDINGS = {
    "hit": "cache_hits",
    "coalesced": "coalesced",
    "upstream": "answered_upstream",
    "failed": "errors",
    "cancelled": "cancelled",
}


def answers(rng):
    """What an upstream may come up with."""

    def answer(call):
        luck = rng.random()
        if luck < 0.1:
            raise rng.choice([ValueError("broke"), ConnectionFailed("broke"), OSError("broke")])
        if luck < 0.25:
            return error_reply(rng.choice([400, 429, 500, 503]))
        if luck < 0.27:
            raise asyncio.CancelledError
        if not call.stream:
            return Reply(data=chat_body("whole"))
        chunks = chat_chunks("one two three")
        if luck < 0.4:
            chunks[rng.randrange(4)] = rng.choice([ValueError("broke"), ConnectionFailed("broke")])
        return Reply(chunks=ScriptedChunks(chunks, gap_s=rng.choice([0, 0, 1])))

    return answer


def upstream(rng, name):
    return FakeUpstream([answers(rng)] * 400, latency_s=rng.choice([0, 0.1, 1, 3]), name=name)


def random_stack(rng):
    every = [
        Deadline(rng.choice([2, 30])),
        TTLCache(
            rng.choice([2, 300]),
            sampling=rng.choice(["share", "lanes", "deterministic"]),
            stale_while_revalidate=rng.choice([0, 5]),
            stale_if_error=rng.choice([0, 50]),
            negative_ttl=rng.choice([0, 5]),
        ),
        Coalescer(finish_orphans=rng.random() < 0.3, buffer_bytes=rng.choice([100, 1 << 20])),
        ErrorRouter(fallbacks=[upstream(rng, "http://other.test/v1")]),
        Retry(attempts=rng.choice([1, 3]), backoff=0.1),
        CircuitBreaker(consecutive=3),
        Batcher(max_size=4, flush_interval=0.05),
        RateLimiter(concurrency=rng.choice([1, 2, 64])),
        Timeout(rng.choice([2, 60])),
    ]
    return Stack(*(layer for layer in every if rng.random() < 0.7))


class Life:
    """One engine, many callers, and what each of them saw."""

    def __init__(self, clock, seed):
        self.clock = clock
        self.rng = rng = random.Random(seed)
        self.events = []
        env = Env(clock=clock, seed=seed, sinks=(self.events.append,) if rng.random() < 0.5 else ())
        self.engine = random_stack(rng).bind(upstream(rng, "http://fake.test/v1"), env=env)
        self.saw = Counter()
        self.kills = Counter()

    def a_call(self):
        rng, now = self.rng, self.clock.monotonic()
        context = Context(
            agent=rng.choice([None, "a", "b"]),
            priority=rng.randrange(3),
            deadline=now + rng.choice([0, 0.5, 2, 5]) if rng.random() < 0.3 else None,
        )
        temperature = rng.choice([0, 1])
        return chat_call(str(rng.randrange(4)), context=context, stream=rng.random() < 0.4, temperature=temperature)

    def kill(self, task):
        self.kills[task] += task.cancel()

    async def caller(self, call):
        task, patience = asyncio.current_task(), asyncio.timeout(self.rng.choice([None, None, None, 0.5, 1, 2]))
        try:
            async with patience:
                reply = await self.engine.call(call)
                seen, _ = result_of(reply)
                if reply.chunks is not None:
                    seen = await self.read(reply, seen)
                    del reply
        except asyncio.CancelledError:
            seen = "cancelled"
        except TimeoutError as error:
            seen = "cancelled" if patience.expired() and not isinstance(error, LLMMWError) else "failed"
        except Closed:
            seen = "closed"  # refused at the door, or cancelled by the close
        except (LLMMWError, ValueError, OSError):
            seen = "failed"
        self.saw[seen] += 1
        assert task.cancelling() == self.kills[task]  # async-4: no cancellation lost, none left over

    async def read(self, reply, seen):
        """To the end, or not."""
        rng = self.rng
        stop_after = rng.randrange(6) if rng.random() < 0.3 else 99
        drops = rng.random() < 0.3
        while stop_after:
            await asyncio.sleep(rng.choice([0, 0, 0, 1]))
            try:
                await reply.chunks.__anext__()
            except StopAsyncIteration:
                return seen
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
                return "failed"  # the upstream's own
            stop_after -= 1
        if not drops:
            await reply.chunks.aclose()
        return "cancelled"

    async def live(self):
        rng, loop, tasks = self.rng, asyncio.get_running_loop(), []
        closes_at = rng.randrange(40) if rng.random() < 0.3 else None
        closing = None
        for number in range(40):
            tasks.append(asyncio.create_task(self.caller(self.a_call())))
            if rng.random() < 0.3:
                loop.call_later(rng.choice([0, 0, 0.05, 0.5, 1, 2, 3.5]), self.kill, tasks[-1])
            if rng.random() < 0.4:
                await asyncio.sleep(rng.choice([0, 0.1, 1]))
            if number == closes_at:
                closing = asyncio.create_task(self.engine.aclose(drain_timeout=rng.choice([0, 1, 30])))
        async with asyncio.timeout(1000):
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                assert found is None or isinstance(found, asyncio.CancelledError), repr(found)
            cancelled_early = sum(task.cancelled() for task in tasks)  # before their first step
            gc.collect(0)
            await asyncio.sleep(200)
            self.books(len(tasks) - cancelled_early)
            await (closing or self.engine.aclose())
        self.books(len(tasks) - cancelled_early)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def books(self, begun):
        stats, saw = self.engine.get_performance_stats(), self.saw
        assert sum(saw.values()) == begun
        counted = {seen: stats[name] for seen, name in ENDINGS.items()}
        assert stats["in_flight"] == 0
        assert stats["request_count"] == sum(counted.values())
        for layer, reading in HELD:
            assert stats["layers"].get(layer, {}).get(reading, 0) == 0
        told = Counter(type(event) for event in self.events)
        if self.events:
            assert told[CallStarted] == told[CallEnded] == stats["request_count"]
        if not saw["closed"]:
            assert counted == {seen: saw[seen] for seen in ENDINGS}
        else:
            for seen in ("hit", "coalesced", "upstream"):
                assert counted[seen] == saw[seen]
            assert begun - saw["closed"] <= stats["request_count"] <= begun


def test_async_04_every_call_is_counted_once_as_what_its_caller_saw_and_no_cancellation_is_lost():
    total = Counter()
    for seed in range(120):
        clock = ManualClock()
        life = Life(clock, seed)
        try:
            clock.run(life.live())
        except BaseException as error:
            error.add_note(f"seed {seed}: {life.engine!r}")
            raise
        total += life.saw
    assert set(total) >= {*ENDINGS, "closed"}
