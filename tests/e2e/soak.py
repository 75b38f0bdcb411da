"""The soak: many callers, every way in, real servers that go wrong, and what must hold when all is quiet again."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import resource
import subprocess
import sys
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import openai
from chaos import Watch, own_objects, own_tasks, own_threads, unbalanced

import llmmw
from llmmw import Client, ConnectionPool, Env, Stack, SyncClient, using
from llmmw.testing.server import FaultRule
from llmmw.testing.server.faults import Match

MODEL = "llmmw-embedded"
QUESTIONS = 150
QUIET_S = 120.0
"""How long it may take, on a busy machine, until the last call is over and the last socket closed."""
STUCK_S = 300.0
BOUNDED = ("llmmw.stores.", "llmmw.algo.bucket.Cell", "llmmw.algo.evict.Slot", "llmmw.answer.", "llmmw.call.Reply")
SLACK, SLACK_MB = 40, 60.0
REFUSALS = (llmmw.LLMMWError, openai.OpenAIError, httpx.HTTPError)


def faults(share, *, hanging):
    """Rules for everything a server can do wrong; each hits its share of the requests."""
    rules = [
        {"kind": "status", "status": 429, "headers": {"retry-after-ms": "30"}},
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "retry_after": "0"},
        {"kind": "status", "status": 529},
        {"kind": "status", "status": 400},
        {"kind": "hang", "seconds": 0.3},
        {"kind": "reset"},
        {"kind": "close"},
        {"kind": "html"},
        {"kind": "error_200"},
        {"kind": "garbage"},
        {"kind": "gzip_bomb", "size": 3_000_000},
        {"kind": "delay", "seconds": 0.05},
        {"kind": "truncate"},
        {"kind": "reset_mid"},
        {"kind": "close_mid"},
        {"kind": "slow", "parts": 5, "seconds": 0.01},
        {"kind": "empty"},
        {"kind": "no_finish"},
        {"kind": "no_done"},
        {"kind": "sse_error", "after": 0},
        {"kind": "sse_error"},
        {"kind": "close_after"},
        {"kind": "duplicate_header"},
        *([{"kind": "hang"}] if hanging else []),
    ]
    made = [FaultRule(**rule, id=f"{n} {rule['kind']}", match=Match(probability=share)) for n, rule in enumerate(rules)]
    return msgspec.to_builtins(made)


class RawProcess:
    """The server of `raw_damage.py` as a process."""

    def __init__(self, seed):
        script = Path(__file__).with_name("raw_damage.py")
        self._process = subprocess.Popen(
            [sys.executable, script, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.origin = self._process.stdout.readline().strip()

    def count(self):
        return int(httpx.get(f"{self.origin}/count", trust_env=False).text)

    def stop(self):
        self._process.stdin.close()
        self._process.wait(120)
        self._process.stdout.close()


class Way:
    """One way into one engine; `ask` gives the answer's text, and None for a stream that was not read to its end."""

    name = ""

    def __init__(self, soak, url):
        self.soak = soak
        self.url = url
        self.env = Env(seed=soak.rng.randrange(1000), sinks=(soak.watch_of(self),))
        self.stack = soak.random_stack()
        self.pool = soak.random_pool()
        self.open()
        self.users = 0

    def body(self, question, greedy):
        found = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
        return {**found, "temperature": 0} if greedy else found


class AsyncWay(Way):
    name = "client"

    def open(self):
        self.client = Client(self.url, "key", stack=self.stack, pool=self.pool, env=self.env)
        self.engine = self.client.engine

    async def ask(self, question, greedy, most):
        if most is None:
            return (await self.client.chat(**self.body(question, greedy))).text
        return await _joined(self.client.stream(**self.body(question, greedy)), most, lambda piece: piece.text)

    async def close(self):
        await self.client.aclose()


class BatchWay(AsyncWay):
    name = "batch"

    async def ask(self, question, greedy, most):
        if most is not None:
            return await super().ask(question, greedy, most)
        questions = [f"{question} {n}" for n in range(3)]
        asked = [self.body(each, greedy)["messages"] for each in questions]
        done = await self.client.generate_batch(model=MODEL, messages=asked, **({"temperature": 0} if greedy else {}))
        for each, outcome in zip(questions, done, strict=True):
            if outcome.ok and outcome.text != each:
                self.soak.problems.append(("wrong answer in a batch", self.pool, each, outcome.text))
            if not outcome.ok and not isinstance(outcome.error, REFUSALS):
                self.soak.problems.append(("unexpected", repr(outcome.error)))
        return None


class GuestWay(AsyncWay):
    """The engine lives on the main loop; callers come from threads with loops of their own."""

    name = "guest loops"

    async def ask(self, question, greedy, most):
        self.engine._home.adopt()
        ask = super().ask
        context = llmmw.call.current_context()

        def guest():
            token = llmmw.context._context.set(context)
            try:
                return asyncio.run(ask(question, greedy, most))
            finally:
                llmmw.context._context.reset(token)

        return await self.soak.on_thread(guest)


class SyncWay(Way):
    name = "sync client"

    def open(self):
        self.client = SyncClient(self.url, "key", stack=self.stack, pool=self.pool, env=self.env)
        self.engine = self.client.engine

    async def ask(self, question, greedy, most):
        body = self.body(question, greedy)

        def plain():
            if most is None:
                return self.client.chat(**body).text
            return _joined_sync(self.client.stream(**body), most, lambda piece: piece.text)

        return await self.soak.on_thread(plain)

    async def close(self):
        await self.soak.on_thread(self.client.close)


class TransportWay(Way):
    name = "openai over httpx2"

    def open(self):
        self.http = llmmw.httpx2_client(self.stack, pool=self.pool, env=self.env)
        self.client = openai.AsyncOpenAI(base_url=self.url, api_key="key", max_retries=0, http_client=self.http)
        self.engine = self.http.engine

    async def ask(self, question, greedy, most):
        body = self.body(question, greedy)
        if most is None:
            return (await self.client.chat.completions.create(**body)).choices[0].message.content
        return await _joined(await self.client.chat.completions.create(**body, stream=True), most, _delta)

    async def close(self):
        await self.client.close()


class WrappedSDKWay(TransportWay):
    name = "wrapped openai"

    def open(self):
        self.client = openai.AsyncOpenAI(base_url=self.url, api_key="key", max_retries=0)
        llmmw.wrap_client(self.client, self.stack, env=self.env)
        self.engine = self.client.engine


class SyncTransportWay(Way):
    name = "plain httpx"

    def open(self):
        self.http = llmmw.httpx_sync_client(self.stack, pool=self.pool, env=self.env)
        self.engine = self.http.engine

    async def ask(self, question, greedy, most):
        body = self.body(question, greedy)

        def plain():
            response = self.http.post(
                f"{self.url}/chat/completions", json=body, headers={"authorization": "Bearer key"}
            )
            response.raise_for_status()
            return response.json()["choices"][0]["message"]["content"]

        return await self.soak.on_thread(plain)

    async def close(self):
        await self.soak.on_thread(self.http.close)


class FunctionWay(Way):
    """No server: a user's function that fails by itself."""

    name = "function"

    def open(self):
        rng = random.Random(self.soak.rng.random())

        async def answer(question: str, temperature: float | None = None) -> str:
            await asyncio.sleep(rng.choice([0, 0.001, 0.02]))
            if rng.random() < 0.2:
                raise rng.choice([httpx.ConnectError("refused"), httpx.ReadTimeout("late"), httpx.DecodingError("no")])
            return question

        self.function = self.stack.wrap(answer, env=self.env)
        self.engine = self.function.engine

    async def ask(self, question, greedy, most):
        return await self.function(question, 0 if greedy else None)

    async def close(self):
        await self.function.aclose()


WAYS = (AsyncWay, BatchWay, GuestWay, SyncWay, TransportWay, WrappedSDKWay, SyncTransportWay, FunctionWay)


def _delta(chunk):
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


async def _joined(stream, most, text_of):
    """The whole text, or None after `most` pieces; the stream is closed in either case."""
    texts, whole = [], True
    try:
        async for piece in stream:
            texts.append(text_of(piece))
            if len(texts) == most:
                whole = False
                break
    finally:
        await (stream.aclose() if hasattr(stream, "aclose") else stream.close())
    return "".join(texts) if whole else None


def _joined_sync(stream, most, text_of):
    texts = []
    for piece in stream:
        texts.append(text_of(piece))
        if len(texts) == most:
            stream.close()
            return None
    return "".join(texts)


class Soak:
    """One seed.

    Args:
        seed: of everything that is drawn on this side.
        servers: embedded model servers; the first is asked, the others are fallbacks of some stacks.
        raw: a server that goes wrong on the wire.
        wild: also cancel, let deadlines pass, leave streams, close clients and open them again. Else only the servers
            go wrong, and then what they counted is exactly what was sent.
        directory: for caches on disk.
    """

    def __init__(self, seed, servers, raw, directory, *, wild):
        self.rng = random.Random(seed)
        self.servers = servers
        self.raw = raw
        self.directory = directory
        self.wild = wild
        self.problems = []
        self.outcomes = Counter()
        self.watches = {}
        self.sent = Counter()
        self.threads = ThreadPoolExecutor(6, thread_name_prefix="caller")
        self.closing = set()
        self.closed = []

    def watch_of(self, way):
        watch = self.watches[way] = Watch()
        return watch

    def random_stack(self):
        rng = self.rng
        layers = [llmmw.Deadline(30)] if rng.random() < 0.5 else []
        if rng.random() < 0.8:
            directory = rng.choice([None, str(self.directory / rng.choice("ab"))])
            layers.append(
                llmmw.TTLCache(
                    rng.choice([0.2, 60]),
                    directory=directory,
                    max_bytes=rng.choice([50_000, 50_000_000]),
                    sampling=rng.choice(["share", "deterministic"]),
                    stale_while_revalidate=rng.choice([0, 0.5]),
                    stale_if_error=rng.choice([0, 10]),
                    early_refresh=rng.random() < 0.5,
                )
            )
        if rng.random() < 0.8:
            layers.append(llmmw.Coalescer(finish_orphans=rng.random() < 0.3))
        if rng.random() < 0.4:
            layers.append(llmmw.ErrorRouter(fallbacks=[server.base_url for server in self.servers[1:]]))
        layers.append(
            llmmw.Retry(
                attempts=rng.choice([1, 3]),
                backoff=0.01,
                rate_patience=rng.choice([0, 1]),
                budget=100_000,
                hedge=self.wild and rng.random() < 0.3,
            )
        )
        layers.append(llmmw.CircuitBreaker(consecutive=rng.choice([6, 10_000]), min_calls=10_000, open_for=0.05))
        if rng.random() < 0.3:
            layers.append(llmmw.Batcher(max_size=rng.choice([2, 20]), flush_interval=0.005))
        tpm = rng.choice([None, 100_000_000])
        # The rate is told: learnt from refusals that mean nothing it would make the rest of the day slow.
        layers.append(llmmw.RateLimiter(rpm=600_000, tpm=tpm, concurrency=rng.choice([4, 64, "2-8-32"]), adaptive=True))
        layers.append(llmmw.Timeout(5.0 if self.wild else 120.0))
        return Stack(*layers)

    def random_pool(self):
        rng = self.rng
        engine = rng.choice(["aiohttp", "aiohttp", "httpx", "httpx2", "pyreqwest"])
        if self.wild and engine == "pyreqwest":
            engine = "aiohttp"  # pyreqwest does not stop a request whose caller left: its sockets outlive everything
        return ConnectionPool(
            engine=engine, max_connections=rng.choice([3, 100]), keepalive_expiry=rng.choice([0.05, 4])
        )

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, calls, rounds):
        """All of it, between two looks at what the process holds."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.problems.append(("loop", context)))
        self.ways = [kind(self, self._url_for(kind)) for kind in WAYS]
        self.memory = []
        for number in range(rounds):
            await self._round(number, calls // rounds)
            for _ in range(3):
                gc.collect()
                await asyncio.sleep(0.02)  # generators that were dropped are closed in tasks
            self.memory.append((resource_mb(), own_objects()))
        await asyncio.gather(*self.closing, *map(self._closed, self.ways))
        self.ways.clear()
        self.threads.shutdown()
        await self._until(lambda: sum(engine() is not None for engine in self.closed), "closed engines are still there")
        await self._until(lambda: own_threads() + own_tasks(), "left behind")
        self._compare_with_servers()
        self._compare_memory()
        loop.set_exception_handler(None)

    def _url_for(self, kind):
        if kind is WrappedSDKWay:
            return self.servers[0].base_url
        return self.rng.choice([self.servers[0].base_url, self.servers[0].base_url, f"{self.raw.origin}/v1"])

    async def _round(self, number, calls):
        waiting = iter(range(calls))

        async def caller():
            for n in waiting:
                await self._one(n)

        async with asyncio.timeout(STUCK_S + calls / 20):
            await asyncio.gather(*(caller() for _ in range(40)))
        for way in self.ways:
            await self._until(lambda way=way: unbalanced(way.engine, self.watches[way]), (number, way.name, way.stack))
        await self._until(lambda: [len(way_tasks) for way_tasks in [own_refreshes(self.ways)] if way_tasks], number)

    async def _one(self, number):
        """One call; one outcome; and the right answer, if any."""
        rng = self.rng
        index = rng.randrange(len(self.ways))
        way = self.ways[index]
        if self.wild and rng.random() < 0.002:
            self.ways[index] = type(way)(self, way.url)
            closing = asyncio.ensure_future(self._closed(way))
            self.closing.add(closing)
            closing.add_done_callback(self.closing.discard)
        question = f"question {rng.randrange(QUESTIONS)} " + "and so on " * rng.randrange(4)
        question = question.strip()
        most = rng.choice([None, None, 10_000])
        deadline = None
        if self.wild:
            most = rng.choice([None, None, None, 10_000, 10_000, 1, 2, 5])
            deadline = rng.random() * 0.2 if rng.random() < 0.2 else None
        context = using(agent=f"call {number}", deadline=deadline, priority=rng.randrange(3))
        with context:
            task = asyncio.ensure_future(way.ask(question, rng.random() < 0.7, most))
        if self.wild and rng.random() < 0.2:
            asyncio.get_running_loop().call_later(rng.random() * rng.choice([0.001, 0.01, 0.1]), task.cancel)
        try:
            async with asyncio.timeout(STUCK_S):
                text = await task
        except TimeoutError:
            self.problems.append(("stuck", way.name, way.stack, unbalanced(way.engine)))
            self.outcomes["stuck"] += 1
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            self.outcomes["cancelled"] += 1
        except REFUSALS as error:
            self.outcomes[type(error).__name__] += 1
        except Exception as error:
            if "the client has been closed" in str(error):  # httpx2's own words for it
                self.outcomes["Closed"] += 1
                return
            self.problems.append(("unexpected", way.name, repr(error)))
            self.outcomes["unexpected"] += 1
        else:
            self.outcomes["left" if text is None else "answered"] += 1
            if text is not None and text != question:
                self.problems.append(("wrong answer", way.name, way.pool, question, text))

    async def on_thread(self, work):
        """Run plain code with this task's context; who is cancelled stops waiting, the thread finishes."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, context.run, work)

    async def _closed(self, way):
        try:
            async with asyncio.timeout(STUCK_S):
                await way.close()
        except TimeoutError:
            self.problems.append(("close is stuck", way.name, unbalanced(way.engine)))
        watch = self.watches.pop(way)
        await self._until(lambda: unbalanced(way.engine, watch), ("closed", way.name, way.stack))
        stats = way.engine.get_performance_stats()
        if way.name != "function":
            self.sent["attempts"] += stats["upstream_requests"]
            self.sent["sent"] += stats["connections_opened"] + stats["connections_reused"]
            # The SDK's own client and pyreqwest do not tell what they sent over which connection.
            if way.name == "wrapped openai" or way.pool.engine == "pyreqwest":
                told = stats["layers"].get("endpoints", {})
                self.sent["untold"] += sum(count for name, count in told.items() if way.url.startswith(name))
        self.closed.append(weakref.ref(way.engine))

    async def _until(self, left, where):
        """Wait for a condition: that nothing is left."""
        loop = asyncio.get_running_loop()
        end = loop.time() + QUIET_S
        while found := left():
            if loop.time() > end:
                self.problems.append((where, found))
                return
            gc.collect()
            await asyncio.sleep(0.02)

    def _compare_memory(self):
        """Flat: nothing of ours but what is bounded (entries of caches, cells of ledgers) is there more often."""
        (first_mb, first), (last_mb, last) = self.memory[0], self.memory[-1]
        more = {
            name: count - first[name]
            for name, count in last.items()
            if count - first[name] > SLACK and not name.startswith(BOUNDED)
        }
        if more or last_mb - first_mb > SLACK_MB:
            self.problems.append(("memory", more, first_mb, last_mb))

    def _compare_with_servers(self):
        received = sum(server.stats(0)["received"] for server in self.servers) + self.raw.count()
        self.sent["received"] = received
        sent = self.sent["sent"] + self.sent["untold"]
        # A request over a connection that the server just closed does not arrive, and is sent again; what is given up
        # at the moment of sending may or may not arrive.
        if received > sent or (received < self.sent["attempts"] and not self.wild):
            self.problems.append(("servers counted", dict(self.sent)))


def own_refreshes(ways):
    """Refreshes of caches that still run."""
    return [
        key
        for way in ways
        for _, bound in way.engine._bounds
        for key in getattr(getattr(bound, "_filler", None), "_refreshes", ())
    ]


def resource_mb():
    """Resident memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6
