"""SIGINT in real processes: what is under way is answered or fails within the grace time, and the exit code stays."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager

import patience

from llmmw.testing.fake import chat_body
from llmmw.testing.rawserver import RawServer, answer_bytes

HEAD = """
import asyncio, logging, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background has it ignored
logging.getLogger("asyncio").setLevel(logging.ERROR)  # a loaded machine's slow callbacks are no news
from llmmw import Batcher, Client, Closed, Coalescer, RateLimiter, Retry, Stack, SyncClient, Timeout, TTLCache
from llmmw.engine import closing
url, directory = sys.argv[1:]
asked = lambda text: {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0}
say = lambda *words: print(*words, flush=True)
"""


class Server:
    """Answers a prompt "x" with "answer x" once `open[x]` is set; prompts that begin with "now" at once."""

    def __init__(self):
        self.open = {}
        self.asked = []
        self.raw = RawServer(self._answer)

    async def _answer(self, request, writer):
        prompt = request.body.split(b'"content":"')[-1].split(b'"')[0].decode()
        gate = self.open.setdefault(prompt, asyncio.Event())
        self.asked.append(prompt)
        if not prompt.startswith("now"):
            await gate.wait()
        writer.write(answer_bytes(body=chat_body(f"answer {prompt}")))

    async def wait_for(self, *prompts):
        async with asyncio.timeout(120):
            while not set(prompts) <= set(self.asked):
                await asyncio.sleep(0.005)


class Program:
    """A Python program under test, and what it says line by line."""

    def __init__(self, process):
        self.process = process

    async def says(self, *words):
        async with asyncio.timeout(120):
            line = (await self.process.stdout.readline()).decode().strip()
        assert line == " ".join(words), (line, (await self.process.stderr.read()).decode() if not line else "")

    def interrupt(self):
        os.kill(self.process.pid, signal.SIGINT)

    async def ends(self):
        """Its exit status, and the rest of what it said."""
        async with asyncio.timeout(120):
            out, err = await self.process.communicate()
        return self.process.returncode, out.decode().split("\n")[:-1], err.decode()


@asynccontextmanager
async def running(body, server, place):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-c", patience.FOR_A_CHILD + HEAD + body, f"{server.raw.origin}/v1", str(place),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def is_plain_interrupt(err):
    """One traceback, of the interrupt itself: no task destroyed, no exception never retrieved, nothing left open."""
    return err.count("Traceback") <= 2 and err.rstrip().endswith("KeyboardInterrupt") and "Warning" not in err


WAITING = """
stack = Stack(TTLCache(300, directory=directory), Coalescer(), Batcher(flush_interval=1000))
async def main():
    async with Client(url, stack=stack) as client:
        async def ask(text):
            try:
                say("got", (await client.chat(**asked(text))).text)
            except BaseException as error:
                say("failed", type(error).__name__)
        await client.chat(**asked("now warm"))
        first = asyncio.create_task(ask("held"))
        while client.get_performance_stats()["upstream_requests"] < 2: await asyncio.sleep(0)  # so others must wait
        others = [asyncio.create_task(ask("now batched")) for n in range(3)]
        while client.get_performance_stats()["layers"]["batch"]["waiting"] < 1: await asyncio.sleep(0)
        say("ready")
        try:
            await asyncio.Event().wait()
        finally:
            say("interrupted")
asyncio.run(main())
"""


async def test_async_02_an_interrupt_flushes_what_waits_and_waits_for_what_is_under_way(place):
    server = Server()
    async with server.raw, running(WAITING, server, place) as program:
        await program.says("ready")
        await server.wait_for("held")
        program.interrupt()
        await program.says("interrupted")
        await server.wait_for("now batched")  # which else waits a thousand seconds for batch mates
        server.open["held"].set()
        status, said, err = await program.ends()
    assert sorted(said) == ["got answer held", *["got answer now batched"] * 3]
    assert status == -signal.SIGINT
    assert is_plain_interrupt(err), err


HANGING = """
closing.GRACE_S = 0.5
async def main():
    async with Client(url, stack=Stack(TTLCache(300, directory=directory), Coalescer(), RateLimiter())) as client:
        async def ask(text):
            try:
                say("got", (await client.chat(**asked(text))).text)
            except BaseException as error:
                say("failed", type(error).__name__)
        task = asyncio.create_task(ask("held"))
        while client.get_performance_stats()["in_flight"] < 1: await asyncio.sleep(0)
        say("ready")
        await asyncio.Event().wait()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    say("over")
    sys.exit(7)
"""


async def test_async_02_what_outlives_the_grace_time_fails_and_the_exit_code_is_the_programs(place):
    server = Server()
    async with server.raw, running(HANGING, server, place) as program:
        await program.says("ready")
        await server.wait_for("held")
        program.interrupt()
        assert await program.ends() == (7, ["failed Closed", "over"], "")
        await asyncio.wait_for(server.raw.gone.wait(), 120)  # and the server was told


WATCH = """
        def watch():
            while not client.engine.closed: time.sleep(0.01)
            say("closing")
        threading.Thread(target=watch).start()  # a task could be hit by the interrupt itself
        say("ready")
"""


async def test_async_02_a_second_interrupt_ends_the_wait(place):
    server = Server()
    body = HANGING.replace("= 0.5", "= 3600").replace('say("ready")', WATCH)
    async with server.raw, running(body, server, place) as program:
        await program.says("ready")
        await server.wait_for("held")
        program.interrupt()
        await program.says("closing")
        program.interrupt()
        status, said, err = await program.ends()
    assert (status, said[-1], err) == (7, "over", "")
    assert said[0].startswith("failed ")


CLOSING = """
async def main():
    client = Client(url, stack=Stack(Coalescer(), Batcher()))
    async def ask(text):
        try:
            say("got", (await client.chat(**asked(text))).text)
        except BaseException as error:
            say("failed", type(error).__name__)
    tasks = [asyncio.create_task(ask(text)) for text in ("held", "also held")]
    while client.get_performance_stats()["in_flight"] < 2: await asyncio.sleep(0)
    closing = asyncio.create_task(client.aclose())
    await asyncio.sleep(0)
    say("closing")
    await closing
asyncio.run(main())
"""


async def test_async_02_an_interrupt_while_closing_fails_what_was_waited_for(place):
    server = Server()
    async with server.raw, running(CLOSING, server, place) as program:
        await program.says("closing")
        await server.wait_for("held", "also held")
        program.interrupt()
        status, said, err = await program.ends()
    assert len(said) == 2
    assert all(line.startswith("failed") for line in said)
    assert status == -signal.SIGINT
    assert is_plain_interrupt(err), err


PLAIN = """
with SyncClient(url, stack=Stack.recommended(cache_ttl=300, cache_directory=directory)) as client:
    say(client.chat(**asked("now warm")).text)
    other = threading.Thread(target=lambda: say("other", client.chat(**asked("other")).text))
    other.start()
    try:
        client.chat(**asked("held"))
    except KeyboardInterrupt:
        say("interrupted")
        raise
"""


async def test_async_02_an_interrupt_of_a_plain_call_cancels_that_call_alone(place):
    server = Server()
    async with server.raw, running(PLAIN, server, place) as program:
        await program.says("answer now warm")
        await server.wait_for("held", "other")
        program.interrupt()
        await program.says("interrupted")
        await asyncio.wait_for(server.raw.gone.wait(), 120)  # the server need not finish "held"
        server.open["other"].set()  # which the end of the block waits for
        status, said, err = await program.ends()
    assert said == ["other answer other"]
    assert status == -signal.SIGINT
    assert is_plain_interrupt(err), err


FUNCTION = """
go_on = threading.Event()

@Stack.recommended(cache_ttl=300).wrap
def plain(text):
    say("running")
    go_on.wait(120)
    return text

try:
    plain("x")
except KeyboardInterrupt:
    say("interrupted")
    go_on.set()
    plain.close()
    say("closed", sum(thread.name.startswith("llmmw") for thread in threading.enumerate()))
    raise
"""


async def test_async_02_an_interrupt_reaches_the_caller_of_a_plain_function_at_once(place):
    server = Server()
    async with server.raw, running(FUNCTION, server, place) as program:
        await program.says("running")
        program.interrupt()
        await program.says("interrupted")
        status, said, err = await program.ends()
    assert said == ["closed 0"]
    assert status == -signal.SIGINT
    assert is_plain_interrupt(err), err


STREAM = """
with SyncClient(url, stack=Stack.recommended()) as client:
    say("ready")
    for piece in client.stream(**asked("held")):
        say("piece")
"""


async def test_async_02_an_interrupt_while_a_stream_is_awaited(place):
    server = Server()
    async with server.raw, running(STREAM, server, place) as program:
        await program.says("ready")
        await server.wait_for("held")
        program.interrupt()
        status, said, err = await program.ends()
        await asyncio.wait_for(server.raw.gone.wait(), 120)
    assert (said, status) == ([], -signal.SIGINT)
    assert is_plain_interrupt(err), err
