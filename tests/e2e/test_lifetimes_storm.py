"""Threads whose loops come and go, plain callers, cancelled tasks, streams left or dropped, closes in between."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import warnings
from contextlib import suppress

import pytest

from llmmw import Closed, Stack
from llmmw.call import Reply
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks

ENDINGS = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")


def answer(call):
    if call.stream:
        return Reply(chunks=ScriptedChunks(chat_chunks("one two three four"), gap_s=0.001))
    return Reply(data=chat_body("whole"))


class Storm:
    """One engine and six threads that do what they like with it."""

    def __init__(self, seed):
        self.seed = seed
        self.engine = Stack.recommended(cache_ttl=0.05, attempts=2).bind(FakeUpstream([answer] * 5000, latency_s=0.003))

    async def one_call(self, rng):
        with suppress(Closed):
            call = chat_call(str(rng.randrange(5)), temperature=0, stream=rng.random() < 0.5)
            reply = await self.engine.call(call)
            if reply.chunks is None:
                return
            left = rng.randrange(8)
            async for _ in reply.chunks:
                left -= 1
                if left < 0:
                    break
            if rng.random() < 0.5:
                await reply.chunks.aclose()

    async def a_run(self, rng):
        tasks = [asyncio.create_task(self.one_call(rng)) for _ in range(rng.randrange(1, 6))]
        if rng.random() < 0.3:
            await asyncio.sleep(0.002)
            for task in tasks:
                if rng.random() < 0.5:
                    task.cancel()
        if rng.random() < 0.8:  # else the run ends under them
            await asyncio.gather(*tasks, return_exceptions=True)

    def a_thread(self, number):
        rng = random.Random(100 * self.seed + number)
        for _ in range(8):
            if rng.random() < 0.7:
                asyncio.run(self.a_run(rng), debug=rng.random() < 0.3)
            else:
                with suppress(Closed):
                    self.engine.call_sync(chat_call(str(rng.randrange(5)), temperature=0))

    def rages(self):
        threads = [threading.Thread(target=self.a_thread, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        if self.seed % 2:
            time.sleep(0.05)  # somewhere in the middle; wherever that is, the books balance
            self.engine.close()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        self.engine.close()


@pytest.mark.parametrize("seed", range(8))
def test_async_a_storm_of_threads_and_loops_leaves_nothing(seed, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storm = Storm(seed)
        storm.rages()
    gc.collect()
    stats = storm.engine.get_performance_stats()
    assert stats["request_count"] == sum(stats[name] for name in ENDINGS)
    assert stats["in_flight"] == 0
    layers = stats["layers"]
    assert (layers["limit"]["in_use"], layers["limit"]["waiting"]) == (0, 0)
    assert (layers["coalesce"]["flights"], layers["coalesce"]["waiting"]) == (0, 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llmmw")]
    assert [record.message for record in caplog.records if "took" not in record.message] == []
