"""Random schedules over a cache in a stack: no foreign answer, none from before an invalidation, no half one."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from llmmw import Coalescer, LLMMWError, Stack, TTLCache
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.keys.identity import namespace_of
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

PROMPTS = "abcd"
TENANTS = ("", "acme")


class World:
    """An upstream whose answers say what was asked, for whom, and when asking began."""

    def __init__(self, seed, stack):
        self.rng = random.Random(seed)
        self.env = Env(seed=seed)
        self.engine = stack.bind(self.upstream, env=self.env)
        self.now = self.env.clock.monotonic
        self.forgotten_at = {}
        self.answers = self.upstream_calls = 0

    async def upstream(self, call):
        self.upstream_calls += 1
        began, rng = self.now(), self.rng
        text = f"{call.payload['messages'][0]['content']} {call.namespace or '-'} {began:.3f}"
        await asyncio.sleep(rng.uniform(0, 3))
        trouble = rng.random()
        if trouble < 0.1:
            return error_reply(rng.choice([404, 429, 503]))
        if trouble < 0.15:
            raise RuntimeError("upstream")
        if trouble < 0.25:
            cut = msgspec.json.decode(chat_body(text + " CUT"))
            cut["choices"][0]["finish_reason"] = "length"
            return Reply(data=msgspec.json.encode(cut))
        if not call.stream:
            return Reply(data=chat_body(text))
        chunks = chat_chunks(text)
        if trouble < 0.35:
            chunks = [*chunks[:-3], RuntimeError("in the middle")]
        return Reply(chunks=ScriptedChunks(chunks, gap_s=rng.uniform(0, 0.5)))

    def call(self):
        rng = self.rng
        tenant, prompt = rng.choice(TENANTS), rng.choice(PROMPTS)
        context = Context(agent=rng.choice("xy"), tenant=tenant or None, tags=(f"t{prompt}",))
        call = chat_call(prompt, stream=rng.random() < 0.4, context=context)
        return call.replace(namespace=namespace_of(tenant) if tenant else "")

    async def ask(self):
        call = self.call()
        asked = self.now()
        try:
            async with asyncio.timeout(self.rng.choice([None, None, 0.5, 2])):
                reply = await self.engine.call(call)
                if reply.chunks is not None:
                    data = b"".join([chunk async for chunk in reply.chunks])
                    text = joined(data)
                else:
                    text = reply.text
        except (TimeoutError, RuntimeError, LLMMWError):
            return
        if reply.ok:
            self.check(call, reply, text, asked)

    def check(self, call, reply, text, asked):
        self.answers += 1
        prompt, namespace, began = text.removesuffix(" CUT").split()
        assert prompt == call.payload["messages"][0]["content"]
        assert namespace == (call.namespace or "-")
        assert reply.source in {"upstream", "coalesced"} or not text.endswith("CUT")
        lives = 20 * 1.1 + (10 if reply.stale else 0)
        assert reply.source != "cache" or asked - float(began) <= lives + 3 + 5
        for matches, at in self.forgotten_at.items():
            if at < asked and matches in {(prompt,), (prompt, call.namespace), call.namespace}:
                assert float(began) >= at, "an answer from before it was forgotten"

    def forget(self):
        rng, engine = self.rng, self.engine
        way = rng.randrange(3)
        prompt = rng.choice(PROMPTS)
        if way == 0:
            engine.invalidate_tag(f"t{prompt}")
            self.forgotten_at[prompt,] = self.now()
        elif way == 1:
            engine.invalidate_tenant("acme")
            self.forgotten_at[namespace_of("acme")] = self.now()
        else:
            call = self.call()
            engine.invalidate(call)
            self.forgotten_at[call.payload["messages"][0]["content"], call.namespace] = self.now()

    async def run(self):
        async with self.engine, asyncio.TaskGroup() as group:
            for _ in range(150):
                for _ in range(self.rng.randrange(1, 5)):
                    group.create_task(self.ask())
                if self.rng.random() < 0.2:
                    self.forget()
                await asyncio.sleep(self.rng.choice([0, 0.3, 1, 4]))
        stats = self.engine.get_performance_stats()
        endings = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")
        assert stats["request_count"] == sum(stats[name] for name in endings)
        assert stats["layers"]["cache"]["bytes"] >= 0
        assert self.answers > 100
        assert self.upstream_calls <= stats["request_count"] + stats["layers"]["cache"].get("stale hits", 0)


def joined(data):
    events = [msgspec.json.decode(line[6:]) for line in data.split(b"\n\n") if line[6:] not in {b"", b"[DONE]"}]
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])


OPTIONS = [
    {},
    {"sampling": "lanes"},
    {"stale_while_revalidate": 10, "stale_if_error": 10, "early_refresh": True, "negative_ttl": 5, "auth_check": True},
    {"max_bytes": 20_000},
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["coalesced", "alone"])
def test_nobody_ever_gets_a_foreign_an_old_or_a_broken_answer(seed, options, shared):
    layers = [TTLCache(20, **options)] + ([Coalescer()] if shared else [])
    clock = ManualClock()

    async def main():
        await World(seed, Stack(*layers)).run()

    clock.run(main())
