"""Calls made from inside other calls of the same batcher: whoever waits for them must not keep them out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.env import Env
from llmmw.layers.batch import Batcher, BoundBatcher
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, chat_call

if TYPE_CHECKING:
    from llmmw.call import Call, Reply
    from llmmw.engine import Engine
    from llmmw.layers.base import Layer

STACKS: list[tuple[Layer, ...]] = [(), (Coalescer(),), (TTLCache(60), Coalescer())]
TINY = [Batcher(max_queue=1), Batcher(max_queue=1, when_full="refuse")]
stacks = pytest.mark.parametrize("outside", STACKS, ids=["bare", "coalesced", "cached"])
tiny = pytest.mark.parametrize("batcher", TINY, ids=["wait", "refuse"])


@stacks
@tiny
def test_batch_08_function_that_calls_itself_needs_no_room(batcher: Batcher, outside: tuple[Layer, ...]) -> None:
    @manual_time
    async def go(clock: ManualClock) -> None:
        async def depth(levels: int) -> int:
            return 1 + max(await asyncio.gather(deeper(levels - 1), deeper(0))) if levels else 0

        deeper = Stack(*outside, batcher).wrap(depth, env=Env(clock=clock, seed=1))
        assert await deeper(3) == 3
        await deeper.engine.aclose()

    go()


@stacks
def test_batch_08_plain_function_that_calls_itself_needs_no_room(outside: tuple[Layer, ...]) -> None:
    def depth(levels: int) -> int:
        return 1 + deeper(levels - 1) if levels else 0

    deeper = Stack(*outside, Batcher(max_queue=1, when_full="refuse")).wrap(depth)
    with deeper.engine:
        assert deeper(3) == 3


class Asking(FakeUpstream):
    """An endpoint that asks its own engine again."""

    engine: Engine

    async def _answer(self, call: Call, number: int) -> Reply:
        level = int(call.payload["messages"][-1]["content"])
        if level:
            await self.engine.call(chat_call(str(level - 1), temperature=0))
        return await super()._answer(call, number)


@stacks
@tiny
def test_batch_08_endpoint_that_asks_its_engine_needs_no_room(batcher: Batcher, outside: tuple[Layer, ...]) -> None:
    @manual_time
    async def go(clock: ManualClock) -> None:
        upstream = Asking()
        engine = upstream.engine = Stack(*outside, batcher).bind(upstream, env=Env(clock=clock, seed=1))
        assert (await engine.call(chat_call("3", temperature=0))).ok
        assert len(upstream.calls) == 4
        await engine.aclose()

    go()


@manual_time
async def test_what_a_call_left_running_needs_room_again(clock: ManualClock) -> None:
    left: list[asyncio.Task[int]] = []
    go_on = asyncio.Event()

    async def late() -> int:
        await go_on.wait()
        return await ask(0)

    async def work(how: int) -> int:
        if how == 1:
            left.append(asyncio.create_task(late()))
        if how == 2:
            await asyncio.sleep(1)
        return how

    ask = Stack(Batcher(max_queue=1, when_full="refuse")).wrap(work, env=Env(clock=clock, seed=1))
    await ask(1)
    busy = asyncio.create_task(ask(2))
    await asyncio.sleep(0.1)
    go_on.set()
    with pytest.raises(errors.QueueFull):
        await left[0]
    assert await busy == 2
    await ask.engine.aclose()


@manual_time
async def test_batch_08_who_waits_outside_comes_in_when_a_call_inside_joins_it(clock: ManualClock) -> None:
    upstream = Asking(latency_s=1)
    engine = upstream.engine = Stack(Coalescer(), Batcher(max_queue=1)).bind(upstream, env=Env(clock=clock, seed=1))
    busy = asyncio.create_task(engine.call(chat_call("0", model="other")))
    await asyncio.sleep(0.5)
    outer = asyncio.create_task(engine.call(chat_call("1", temperature=0)))
    await asyncio.sleep(0.1)
    others = [asyncio.create_task(engine.call(chat_call("0", temperature=0, model=name))) for name in ("third", "m")]
    assert all(reply.ok for reply in await asyncio.gather(busy, outer, *others))
    assert [call.model for call in upstream.calls] == ["other", "m", "m", "third"]
    (gathering,) = [bound._gathering for _, bound in engine._bounds if isinstance(bound, BoundBatcher)]
    assert gathering.entrance.inside == 0
    await engine.aclose()
