"""The world around a client breaks: servers die and return, processes are killed, handles and ports run out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
from urllib.parse import urlsplit

import pytest
from chaos import unbalanced

from llmmw import (
    Client,
    ConnectionFailed,
    ConnectionPool,
    DeadlineExceeded,
    LLMMWError,
    RateLimited,
    RateLimiter,
    Retry,
    Stack,
    StreamInterrupted,
    Timeout,
    UpstreamError,
    UpstreamTimeout,
    using,
)
from llmmw.testing.rawserver import RawServer, answer_bytes
from llmmw.testing.server import FaultRule, ServerConfig, ServerProcess, server_process

MODEL = "llmmw-embedded"
ENGINES = ["aiohttp", "httpx", "httpx2", "pyreqwest"]


def client_of(url, engine="aiohttp", **retry):
    stack = Stack(Retry(**{"attempts": 2, "backoff": 0.01, **retry}), RateLimiter(concurrency=64), Timeout(120))
    return Client(url, stack=stack, model=MODEL, pool=ConnectionPool(engine=engine))


def killed(server):
    os.kill(server.pid, signal.SIGKILL)
    port = urlsplit(server.url).port
    server.stop()
    return port


def restarted(server):
    """Another process on the same port, with the same settings."""
    port = killed(server)
    return ServerProcess(ServerConfig(reply="echo", port=port)).start()


async def balanced(engine):
    """Wait until nothing is left of the calls."""
    async with asyncio.timeout(120):
        while unbalanced(engine):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("engine", ENGINES)
async def test_calls_go_on_when_a_server_is_killed_and_comes_back_under_a_live_client(engine):
    server = ServerProcess(ServerConfig(reply="echo")).start()
    try:
        async with client_of(server.base_url, engine, duplicate_ok=True) as client:
            for lap in range(2):
                replies = await asyncio.gather(*(client.chat(f"{lap} {n}") for n in range(20)))
                assert [reply.text for reply in replies] == [f"{lap} {n}" for n in range(20)]
                server = restarted(server)
            killed(server)
            with pytest.raises(UpstreamError):
                await client.chat("to nobody")
            await balanced(client.engine)
    finally:
        server.stop()


async def test_streams_of_a_server_that_is_killed_end_with_what_had_arrived():
    config = ServerConfig(reply_tokens=5000, reply_spread=0, latency="fixed", token_s=0.02)
    server = ServerProcess(config).start()
    arrived = asyncio.Semaphore(0)

    async def reader(number):
        texts = []
        with pytest.raises(StreamInterrupted) as caught:
            async for piece in client.stream(f"question {number}"):
                texts.append(piece.text)
                if len(texts) == 3:
                    arrived.release()
        return "".join(texts), caught.value.partial

    try:
        async with client_of(server.base_url) as client:
            readers = [asyncio.ensure_future(reader(number)) for number in range(20)]
            async with asyncio.timeout(120):
                for _ in readers:
                    await arrived.acquire()
                killed(server)
                for text, partial in await asyncio.gather(*readers):
                    assert text == partial != ""
            await balanced(client.engine)
            assert client.get_performance_stats()["errors"] == 20
    finally:
        server.stop()


def test_a_client_process_that_is_killed_while_it_streams_frees_the_server():
    script = """
        import asyncio, sys
        from llmmw import Client

        async def main():
            async with Client(sys.argv[1], model="llmmw-embedded") as client:
                async for piece in client.stream("question"):
                    print(piece.text, flush=True)

        asyncio.run(main())
    """
    with server_process(ServerConfig(reply_tokens=5000, reply_spread=0, latency="fixed", token_s=0.02)) as server:
        command = [sys.executable, "-c", textwrap.dedent(script), server.base_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline()
            process.kill()
            server.wait(at_least={"aborted": 1}, at_most={"in_flight": 0, "connections.open": 0}, timeout_s=120)


@pytest.mark.parametrize("stream", [False, True])
async def test_five_hundred_callers_of_a_server_that_never_answers_are_told_in_time(stream):
    async def ask(client, number):
        with using(agent=f"agent {number}"):
            if not stream:
                return await client.chat(f"question {number}")
            return [piece async for piece in client.stream(f"question {number}")]

    with server_process(ServerConfig(reply="echo")) as server:
        async with client_of(server.base_url) as client:
            assert (await client.chat("warm")).text == "warm"
            server.add_fault(FaultRule(kind="hang"))
            # One moment for all: a place that came free in it would be taken before the server had noticed.
            with using(deadline=1.5):
                told = await asyncio.gather(*(ask(client, number) for number in range(500)), return_exceptions=True)
            assert {type(error) for error in told} <= {DeadlineExceeded, RateLimited, UpstreamTimeout}
            await balanced(client.engine)
            server.clear_faults()
            server.wait(at_most={"in_flight": 0})
            assert server.stats(0)["peak_in_flight"] <= 64
            assert (await client.chat("again")).text == "again"
            assert client.get_performance_stats()["errors"] == 500


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_connection_that_the_server_half_closes_is_neither_waited_for_nor_used_again(engine):
    async def half(request, writer):
        if b"early" in request.body:
            writer.write_eof()
            await asyncio.sleep(30)
        whole = answer_bytes(body=b'{"choices":[{"finish_reason":"stop","message":{"content":"%d"}}]}' % request.number)
        writer.write(whole)
        writer.write_eof()
        await asyncio.sleep(0.01)

    async with RawServer(half) as server, client_of(f"{server.origin}/v1", engine, attempts=1) as client:
        async with asyncio.timeout(120):
            for number in range(1, 6):
                assert (await client.chat("late")).text == str(number)
            with pytest.raises(UpstreamError):
                await client.chat("early")
        await balanced(client.engine)


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2"])
@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EMFILE])
async def test_no_ports_left_is_said_clearly_and_over_when_there_are_some(monkeypatch, engine, number):
    """Every local port towards a busy server can be in use (TIME_WAIT); the system then refuses to connect."""
    original, are_left = asyncio.SelectorEventLoop.sock_connect, False

    async def sock_connect(self, sock, address):
        if not are_left:
            raise OSError(number, os.strerror(number))
        return await original(self, sock, address)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", sock_connect)
    with server_process(ServerConfig(reply="echo", keepalive_s=3600)) as server:
        async with client_of(server.base_url, engine) as client:
            refused = await asyncio.gather(*(client.chat(f"{n}") for n in range(100)), return_exceptions=True)
            assert {type(error) for error in refused} == {ConnectionFailed}
            assert os.strerror(number) in str(refused[0]) or "connect" in str(refused[0]).lower()
            await balanced(client.engine)
            are_left = True
            replies = await asyncio.gather(*(client.chat(f"{n}") for n in range(100)))
            assert [reply.text for reply in replies] == [f"{n}" for n in range(100)]


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2"])
def test_no_file_handles_left_is_an_error_of_the_call_and_over_when_there_are_some(engine):
    script = """
        import asyncio, os, resource, sys
        from llmmw import Client, ConnectionPool, LLMMWError, Retry, Stack

        async def main(url, engine):
            stack = Stack(Retry(attempts=1))
            async with Client(url, stack=stack, model="llmmw-embedded", pool=ConnectionPool(engine=engine)) as client:
                assert (await client.chat("warm")).text == "warm"
                resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
                taken = []
                try:
                    while True:
                        taken.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    pass
                told = await asyncio.gather(*(client.chat(str(n)) for n in range(50)), return_exceptions=True)
                assert any(isinstance(each, LLMMWError) for each in told), told[:3]
                assert all(isinstance(each, LLMMWError) or each.ok for each in told), told[:3]
                print(next(each for each in told if isinstance(each, LLMMWError)))
                for handle in taken:
                    os.close(handle)
                replies = await asyncio.gather(*(client.chat(str(n)) for n in range(50)))
                assert [reply.text for reply in replies] == [str(n) for n in range(50)]
            assert len(os.listdir("/proc/self/fd")) < 20

        asyncio.run(main(*sys.argv[1:]))
    """
    with server_process(ServerConfig(reply="echo", latency="fixed", latency_s=0.01)) as server:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), server.base_url, engine]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert "Too many open files" in done.stdout or "no connection" in done.stdout


async def test_a_listener_whose_backlog_is_full_is_a_connect_time_out_not_a_wait_for_ever():
    import socket

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):  # whoever connects now waits in the kernel
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        own = Stack(Retry(attempts=1), Timeout(600, connect=0.2))
        async with Client(url, stack=own, model=MODEL) as client, asyncio.timeout(120):
            with pytest.raises(LLMMWError) as caught:
                await client.chat("hello")
            assert isinstance(caught.value, ConnectionFailed)
            await balanced(client.engine)
