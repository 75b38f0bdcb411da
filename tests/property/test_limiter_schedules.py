"""The limiter under random arrivals, outcomes and cancellations: limits hold, nothing is lost, nobody starves."""

import asyncio
import contextlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmmw.answer import Usage
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import ConnectionFailed, RateLimited, UpstreamTimeout
from llmmw.layers.limit import RateLimiter
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import ScriptedChunks, chat_call, chat_chunks, error_reply

WINDOW = 10.0

calls = st.fixed_dictionaries({
    "after": st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.5, 3.0, 11.0]),
    "tokens": st.integers(1, 40),
    "service": st.sampled_from([0.0, 0.0, 0.05, 1.0, 7.0]),
    "priority": st.integers(-1, 1),
    "tenant": st.sampled_from([None, "a", "b"]),
    "cancel": st.sampled_from([None, None, None, 0.0, 0.01, 0.6, 4.0]),
    "deadline": st.sampled_from([None, None, None, 0.5, 20.0]),
    "outcome": st.sampled_from(["ok", "ok", "ok", "ok", "429", "503", "not_sent", "timeout", "stream", "dropped"]),
})  # fmt: skip

limits = st.fixed_dictionaries({
    "rpm": st.sampled_from([None, 1, 3, 12, 30]),
    "tpm": st.sampled_from([None, 40, 100]),
    "concurrency": st.sampled_from([None, 1, 3]),
    "burst": st.just(None),
    "age_bound": st.sampled_from([0.5, 10.0]),
    "adaptive": st.booleans(),
})  # fmt: skip


class World:
    """The upstream, and what it saw."""

    def __init__(self, clock, plan, config):
        self.clock = clock
        self.plan = plan
        self.config = config
        self.sent = []  # (time, tokens) of what really went out
        self.busy = 0

    async def __call__(self, call):
        spec = self.plan[int(call.native)]
        if spec["outcome"] == "not_sent":
            await asyncio.sleep(spec["service"])
            raise ConnectionFailed("no connection")
        self.sent.append((self.clock.monotonic(), 0 if spec["outcome"] == "429" else spec["tokens"]))
        self.busy += 1
        assert self.busy <= (self.config["concurrency"] or 10_000)
        held = True
        try:
            await asyncio.sleep(spec["service"])
            if spec["outcome"] in {"stream", "dropped"}:
                held = False
                return Reply(chunks=Watched(chat_chunks("a b"), self, spec["service"]))
            return self.answer(spec)
        finally:
            self.busy -= held

    def answer(self, spec):
        if spec["outcome"] == "429":
            return error_reply(429, retry_after="2")
        if spec["outcome"] == "503":
            return error_reply(503)
        if spec["outcome"] == "timeout":
            raise UpstreamTimeout("slow")
        return Reply(data=b"{}", usage=Usage(spec["tokens"], 0, reported=True))


class Watched(ScriptedChunks):
    """A stream that holds its slot until it ends."""

    def __init__(self, chunks, world, gap):
        super().__init__(chunks, gap_s=gap / 10)
        self.world = world
        self.held = True

    async def __anext__(self):
        try:
            return await super().__anext__()
        except BaseException:
            self.release()
            raise

    async def aclose(self):
        self.release()
        await super().aclose()

    def release(self):
        self.world.busy -= self.held
        self.held = False


async def use(bound, clock, number, spec):
    context = Context(
        priority=spec["priority"],
        tenant=spec["tenant"],
        deadline=None if spec["deadline"] is None else clock.monotonic() + spec["deadline"],
    )
    # every text is about as long in tokens as the upstream will report, and reserves nothing for output
    call = chat_call("x" * (4 * (spec["tokens"] - 1)), context=context, max_tokens=1).replace(native=number)
    reply = await bound(call)
    if reply.chunks is not None:
        async for _ in reply.chunks:
            if spec["outcome"] == "dropped":
                break
        await reply.chunks.aclose()


async def scenario(clock, config, plan):
    world = World(clock, plan, config)
    bound = RateLimiter(window=WINDOW, **config).bind(world, Env(clock=clock, seed=3))
    loop = asyncio.get_running_loop()
    tasks = []
    for number, spec in enumerate(plan):
        await asyncio.sleep(spec["after"])
        task = asyncio.ensure_future(use(bound, clock, number, spec))
        tasks.append(task)
        if spec["cancel"] is not None:
            loop.call_later(spec["cancel"], task.cancel)
    async with asyncio.timeout(len(plan) * 80):
        await asyncio.wait(tasks)
    gauges = bound.gauges()
    assert gauges["in_use"] == 0
    assert gauges["waiting"] == 0
    assert world.busy == 0
    for spec, task in zip(plan, tasks, strict=True):
        if task.cancelled():
            assert spec["cancel"] is not None
        elif task.exception() is not None:
            expected = {"not_sent": ConnectionFailed, "timeout": UpstreamTimeout}
            allowed = [expected.get(spec["outcome"], RateLimited)] + [RateLimited] * (spec["deadline"] is not None)
            assert isinstance(task.exception(), tuple(allowed)), task.exception()
            assert not isinstance(task.exception(), RateLimited) or spec["deadline"] is not None
    check_windows(world, config)
    await bound.aclose()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def check_windows(world, config):
    for began, _ in world.sent:
        inside = [tokens for at, tokens in world.sent if began <= at < began + WINDOW - 1e-6]
        if config["rpm"] is not None:
            assert len(inside) <= config["rpm"]
        if config["tpm"] is not None:
            assert sum(inside) <= config["tpm"]


@settings(max_examples=120, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=limits, plan=st.lists(calls, min_size=1, max_size=25))
def test_limits_hold_and_no_permit_is_lost_whatever_happens(config, plan):
    clock = ManualClock()
    clock.run(scenario(clock, config, plan))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    cancels=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 12)), max_size=20),
    slots=st.integers(1, 3),
)
def test_limit_05_cancellation_in_any_turn_of_the_loop_loses_nothing(cancels, slots):
    clock = ManualClock()

    async def inner(call):
        for _ in range(3):
            await asyncio.sleep(0)
        return Reply(data=b"{}", usage=Usage(5, 0, reported=True))

    async def main():
        bound = RateLimiter(rpm=1000, tpm=10_000, concurrency=slots).bind(inner, Env(clock=clock, seed=1))
        tasks = [asyncio.ensure_future(bound(chat_call("x" * 16))) for _ in range(20)]
        for turn in range(13):
            for number, when in cancels:
                if when == turn:
                    tasks[number].cancel()
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        gauges = bound.gauges()
        assert gauges["in_use"] == 0
        assert gauges["waiting"] == 0
        assert {number for number, task in enumerate(tasks) if task.cancelled()} <= {number for number, _ in cancels}
        await asyncio.gather(*(bound(chat_call()) for _ in range(3)))

    clock.run(main())
