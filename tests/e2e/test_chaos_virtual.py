"""Hundreds of random days of one engine in virtual time: whatever happens in whatever order, the books balance.

Every seed is another stack, other endpoints with their moods, other callers, and the same day each time it is lived.
CHAOS_SEEDS=N (or 100-999) lives those; `make chaos` lives many.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter

import msgspec
import pytest
from chaos import Permits, Watch, own_objects, own_tasks, seeds, unbalanced, unpaid_later

from llmmw import (
    Batcher,
    CircuitBreaker,
    Coalescer,
    Deadline,
    Env,
    ErrorRouter,
    LLMMWError,
    RateLimiter,
    Reply,
    Retry,
    Stack,
    Timeout,
    TTLCache,
    Usage,
)
from llmmw.call import Context
from llmmw.errors import (
    Closed,
    ConnectionFailed,
    ProtocolError,
    StaleConnection,
    StreamInterrupted,
    TruncatedStream,
    UpstreamTimeout,
)
from llmmw.testing import FakeUpstream, chat_call
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import ScriptedChunks, chat_body, chat_chunks, error_reply

FOREVER = 1e7
"""Seconds of virtual time after which whoever still waits, waits for ever."""
MOODS = {"well": 0.02, "fair": 0.1, "shaky": 0.3, "sick": 0.8, "dead": 1.0}
CALLERS = 12
FAULTS = (
    lambda rng: error_reply(429, **rng.choice([{}, {"retry_after": "2"}, {"retry_after_ms": "350"}])),
    lambda rng: error_reply(rng.choice([500, 502, 503, 529])),
    lambda rng: error_reply(503, retry_after=rng.choice(["1", "-1", "nonsense"])),
    lambda rng: error_reply(rng.choice([400, 404, 422]), code="invalid"),
    lambda rng: error_reply(rng.choice([401, 403])),
    lambda rng: error_reply(429, code="insufficient_quota"),
    lambda rng: ConnectionFailed("refused"),
    lambda rng: StaleConnection("dead"),
    lambda rng: UpstreamTimeout("no answer", sent=True),
    lambda rng: ProtocolError("no JSON"),
    lambda rng: ValueError("the endpoint's own"),
)
BREAKS = (
    lambda: TruncatedStream("no end"),
    lambda: StreamInterrupted("broke", partial=""),
    lambda: ConnectionFailed("reset"),
    lambda: ValueError("the endpoint's own"),
)


class Moody(FakeUpstream):
    """An endpoint that answers as its mood of the hour is; every answer has a number of its own."""

    def __init__(self, rng, name):
        super().__init__(name=name)
        self._dice = rng
        self._mood = "well"
        self._until = 0.0
        self.capabilities = frozenset(name for name in ("idempotent", "batch:chat") if rng.random() < 0.5)
        self.serial = 0
        self.on_leave = lambda: None
        self.whole = {}

    def mood(self):
        now = asyncio.get_running_loop().time()
        if now >= self._until:
            self._mood = self._dice.choices(list(MOODS), [6, 4, 2, 1, 1])[0]
            self._until = now + self._dice.expovariate(1 / 20)
        return MOODS[self._mood]

    async def _serve(self, call, number):
        self.in_flight += 1
        try:
            await asyncio.sleep(self._dice.choice([0.0, 0.01, 0.2, 1.0, 5.0]) * self._dice.random())
            if self._dice.random() < 0.03:
                await asyncio.sleep(600)
            return self._outcome(call)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
            self.on_leave()

    def _outcome(self, call):
        rng = self._dice
        bad = rng.random() < self.mood()
        if bad and not (call.stream and rng.random() < 0.5):
            found = rng.choice(FAULTS)(rng)
            if isinstance(found, Exception):
                raise found
            return found
        if call.op == "chat_batch":
            return self._jointly(call.payload["messages"])
        text = self._text(call.payload["messages"])
        usage = Usage(rng.randrange(1, 50), rng.randrange(1, 200), reported=rng.random() < 0.9)
        headers = (("content-type", "application/json"),)
        if not call.stream:
            body = chat_body(text, prompt_tokens=usage.input_tokens, completion_tokens=usage.output_tokens)
            return Reply(data=body, usage=usage, headers=headers)
        chunks = chat_chunks(text, prompt_tokens=usage.input_tokens)
        if bad:
            chunks = [*chunks[: rng.randrange(len(chunks) - 1)], rng.choice(BREAKS)()]
        return Reply(chunks=ScriptedChunks(chunks, gap_s=rng.choice([0, 0, 0.01, 0.3])), headers=headers)

    def _text(self, messages):
        self.serial += 1
        question = messages[-1]["content"]
        text = f"{question} answered by {self.name} as number {self.serial} " + "word " * self._dice.randrange(6)
        self.whole[text] = question
        return text

    def _jointly(self, conversations):
        """Answers in any order; some servers lose one, repeat one, invent one, or refuse all for the sake of one."""
        rng = self._dice
        if rng.random() < 0.2:
            return error_reply(400, code="invalid")
        choices = [
            {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": self._text(messages)}}
            for index, messages in enumerate(conversations)
        ]
        rng.shuffle(choices)
        if rng.random() < 0.2:
            choices.pop()
        if rng.random() < 0.1:
            choices += [{**choices[0]}] if choices else []
            choices += [{**choice, "index": 99} for choice in choices[:1]]
        usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        return Reply(data=msgspec.json.encode({"choices": choices, "usage": usage}), usage=Usage(7, 9, reported=True))


def random_stack(rng, fallbacks):
    """Every layer there is, or not, in any setting that makes sense."""

    def maybe(share, layer):
        return [layer] if rng.random() < share else []

    cache = TTLCache(
        rng.choice([1, 30, 600]),
        sampling=rng.choice(["share", "lanes", "deterministic"]),
        mode=rng.choice(["on", "on", "on", "read", "write", "off"]),
        max_bytes=rng.choice([4_000, 256_000_000]),
        negative_ttl=rng.choice([0, 0, 10]),
        stale_while_revalidate=rng.choice([0, 0, 20]),
        stale_if_error=rng.choice([0, 0, 60]),
        early_refresh=rng.random() < 0.3,
        auth_check=rng.random() < 0.3,
        store_fallbacks=rng.random() < 0.3,
    )
    limiter = RateLimiter(
        rpm=rng.choice([None, None, 60, 600, 6000]),
        tpm=rng.choice([None, None, 2_000, 100_000]),
        concurrency=rng.choice([None, 1, 4, 64, "1-4-16"]),
        window=rng.choice([60, 1]),
        per=rng.choice(["key+model", "key", "model", "endpoint"]),
        oversize=rng.choice(["debt", "refuse"]),
        reserve=rng.choice(["learned", "max"]),
        age_bound=rng.choice([0.5, 10]),
    )
    breaker = CircuitBreaker(
        consecutive=rng.choice([2, 5, 1000]), min_calls=rng.choice([4, 1000]), open_for=rng.choice([0.5, 5])
    )
    batcher = Batcher(
        max_size=rng.choice([2, 20]),
        flush_interval=rng.choice([0.01, 1]),
        max_queue=rng.choice([3, 10_000]),
        when_full=rng.choice(["wait", "refuse"]),
        barrier=rng.choice([None, None, 3]),
        drain=rng.random() < 0.7,
    )
    retry = Retry(
        attempts=rng.choice([1, 2, 4]),
        backoff=rng.choice([0.01, 0.5]),
        rate_patience=rng.choice([0, 5, 60]),
        budget=rng.choice([0, 20, 500]),
        duplicate_ok=rng.random() < 0.5,
        hedge=rng.random() < 0.3,
    )
    return Stack(
        *maybe(0.6, Deadline(rng.choice([2, 30, 300]))),
        *maybe(0.8, cache),
        *maybe(0.8, Coalescer(finish_orphans=rng.random() < 0.3, buffer_bytes=rng.choice([100, 1_000_000]))),
        *([ErrorRouter(fallbacks=fallbacks, rate_wait=rng.choice([0, 2]))] if fallbacks else []),
        *maybe(0.8, retry),
        *maybe(0.7, breaker),
        *maybe(0.4, batcher),
        *maybe(0.8, limiter),
        Timeout(rng.choice([1, 8]), between_chunks=rng.choice([None, 0.2])),
    )


class Day:
    """One seed: an engine, its endpoints and its callers, from the first call to the last thing left behind."""

    def __init__(self, seed, calls):
        self.rng = rng = random.Random(seed)
        self.clock = ManualClock()
        self.watch = Watch()
        self.calls = calls
        self.upstreams = [Moody(rng, f"http://{n}.test/v1") for n in range(rng.choice([1, 1, 2, 3]))]
        self.stack = random_stack(rng, self.upstreams[1:])
        self.outcomes = Counter()
        self.under_way = []
        for upstream in self.upstreams:
            upstream.on_leave = self._cancel_somebody
        self.problems = []

    def live(self):
        self.clock.run(self._main())
        assert self.problems == []

    async def _main(self):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.problems.append(context))
        env = Env(clock=self.clock, seed=self.rng.randrange(1000), sinks=(self.watch,))
        self.engine = engine = self.stack.bind(self.upstreams[0], env=env)
        loop.call_later(FOREVER, self._give_up, asyncio.current_task())
        callers = [asyncio.ensure_future(self._caller(number)) for number in range(CALLERS)]
        meddler = asyncio.ensure_future(self._meddle())
        try:
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.random() * 60)
                await engine.aclose(drain_timeout=self.rng.choice([0, 0.5, 30]))
            await asyncio.gather(*callers)
        finally:
            for task in [*callers, meddler]:
                task.cancel()
            await asyncio.wait([*callers, meddler])
        del callers, meddler
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(700)  # dropped streams are closed in turns of the loop, and what hangs times out
        self._check("at rest")
        await engine.aclose()
        self._check("closed")
        loop.set_exception_handler(None)

    def _give_up(self, main):
        self.problems.append(("somebody waits for ever", own_tasks(), unbalanced(self.engine, self.watch)))
        main.cancel()

    def _check(self, when):
        found = unbalanced(self.engine, self.watch) + own_tasks()
        found += unpaid_later(self.engine, self.clock.monotonic() + 4000)
        found += [(upstream.name, upstream.in_flight) for upstream in self.upstreams if upstream.in_flight]
        stats = self.engine.get_performance_stats()
        told = sum(self.outcomes[name] for name in ("hit", "coalesced", "upstream", "failed", "cancelled"))
        if told != stats["request_count"]:
            found.append(("callers saw", dict(self.outcomes), "of", stats["request_count"]))
        asked = sum(len(upstream.calls) for upstream in self.upstreams)
        if asked != stats["upstream_requests"]:
            found.append(("endpoints were asked", asked, "counted", stats["upstream_requests"]))
        self.problems += [(when, what) for what in found]

    # ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _meddle(self):
        rng = self.rng
        for _ in range(1000):
            await asyncio.sleep(rng.expovariate(1))
            if rng.random() < 0.5:
                self.engine.tick()
            else:
                self.engine.invalidate(self._call())

    async def _caller(self, number):
        rng = self.rng
        await asyncio.sleep(rng.random() * 5)
        for _ in range(self.calls // CALLERS):
            if rng.random() < 0.4:
                await asyncio.sleep(rng.expovariate(1))
            call = self._call(number)
            if rng.random() < 0.15:
                await asyncio.gather(*(self._one(self._like(call, each)) for each in range(rng.randrange(2, 12))))
            else:
                await self._one(call)

    def _like(self, call, number):
        """The same question by somebody else."""
        rng = self.rng
        deadline = asyncio.get_running_loop().time() + rng.expovariate(1)
        return call.within(
            agent=f"agent {number}",
            priority=rng.choice([0, 0, -2, 3]),
            deadline=rng.choice([None, None, call.context.deadline, deadline]),
        )

    def _call(self, number=0):
        rng = self.rng
        now = asyncio.get_running_loop().time()
        context = Context(
            agent=f"agent {number}",
            step=rng.choice([None, 1, 2]),
            priority=rng.choice([0, 0, 0, -1, 5]),
            deadline=now + rng.choice([0.0, 0.1, 1, 10, 100]) * rng.random() if rng.random() < 0.25 else None,
            tenant=rng.choice([None, None, None, "t"]),
        )
        fields = {"temperature": 0} if rng.random() < 0.6 else {}
        if rng.random() < 0.3:
            fields["max_tokens"] = rng.choice([10, 1000, 5000])
        call = chat_call(f"question {rng.randrange(5)}", context=context, stream=rng.random() < 0.4, **fields)
        return call.replace(namespace=rng.choice(["", "", "", "other"]), target=self.upstreams[0].name)

    async def _one(self, call):
        """Make one call, get into its way, and note its one outcome."""
        rng, loop = self.rng, asyncio.get_running_loop()
        notes = {}
        task = asyncio.ensure_future(self._answered(call, notes))
        self.under_way.append(task)
        way = rng.randrange(10)
        if way == 0:
            loop.call_later(rng.choice([0, 0.01, 0.1, 1, 10]) * rng.random(), task.cancel)
        elif way == 1:
            self._cancel_after_turns(task, rng.randrange(40))
        elif way == 2:
            loop.call_later(rng.random(), task.cancel)
            loop.call_later(rng.random() * 2, task.cancel)
        try:
            how = await task
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            how = notes.get("how", "cancelled")
        except Closed:
            how = "failed" if notes.get("entered") else "at the door"
        except (LLMMWError, ValueError):
            how = "failed"
        if not notes.get("entered") and "how" not in notes:  # a hit is served while the engine closes, too
            how = "at the door"
        self.outcomes[how] += 1
        self.under_way.remove(task)

    def _cancel_somebody(self):
        """Just when a call ends others are woken, and some of those who are woken leave in the same moment."""
        rng = self.rng
        if self.under_way and rng.random() < 0.15:
            for task in rng.sample(self.under_way, min(3, len(self.under_way))):
                self._cancel_after_turns(task, rng.randrange(8))

    def _cancel_after_turns(self, task, turns):
        if turns and not task.done():
            asyncio.get_running_loop().call_soon(self._cancel_after_turns, task, turns - 1)
        else:
            task.cancel()

    async def _answered(self, call, notes):
        notes["entered"] = not self.engine.closed
        reply = await self.engine.call(call)
        notes["how"] = how = (
            "failed" if not reply.ok else {"cache": "hit", "batch": "upstream"}.get(reply.source, reply.source)
        )
        if reply.chunks is None:
            if reply.ok:
                self._judge(call, reply, reply.text)
            return how
        return await self._read(call, reply, notes)

    async def _read(self, call, reply, notes):
        rng, chunks, how = self.rng, reply.chunks, notes["how"]
        manner = rng.choice(["whole", "whole", "whole", "some", "dropped", "slow", "never"])
        notes["how"] = "cancelled"
        got = []
        if manner != "never":
            async for chunk in chunks:
                got.append(chunk)
                if manner == "slow":
                    await asyncio.sleep(rng.random())
                if manner in {"some", "dropped"} and rng.random() < 0.4:
                    break
            else:
                text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in _events(got))
                self._judge(call, reply, text)
                return how
        if manner != "dropped":
            await chunks.aclose()
        return "cancelled"

    def _judge(self, call, reply, text):
        question = call.payload["messages"][-1]["content"]
        asked = [upstream for upstream in self.upstreams if text in upstream.whole]
        if not asked or asked[0].whole[text] != question:
            self.problems.append(("wrong or partial answer", question, text, reply.source))


def _events(chunks):
    for line in b"".join(chunks).split(b"\n\n"):
        data = line.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            event = msgspec.json.decode(data)
            if event["choices"]:
                yield event


@pytest.fixture(scope="module", autouse=True)
def imported_world_aside():
    gc.freeze()  # collecting it as well would take most of the time
    yield
    gc.unfreeze()


def live(seed, calls, monkeypatch):
    permits = Permits(monkeypatch)
    day = Day(seed, calls)
    try:
        day.live()
        assert permits.counts["grant"] == permits.counts["_release"]
    except AssertionError as error:
        error.add_note(f"seed {seed}: {day.stack!r}")
        raise


@pytest.mark.parametrize("seed", seeds(range(60)))
def test_the_books_of_a_random_day_balance(seed, monkeypatch):
    live(seed, 120, monkeypatch)


def test_days_leave_no_objects_behind(monkeypatch):
    live(1000, 60, monkeypatch)
    before = own_objects()
    for seed in range(1001, 1004):
        live(seed, 60, monkeypatch)
    after = own_objects()
    assert {name: (before[name], count) for name, count in after.items() if count > before[name] + 2} == {}
