"""The SDKs' own exceptions for every refusal and loss, nobody's retries multiplied, abandoned calls aborted."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import anthropic
import httpx
import httpx2
import openai
import pytest

from llmmw import CircuitBreaker, Coalescer, Deadline, RateLimiter, Retry, Stack, TTLCache
from llmmw.testing.server import FaultRule

CACHED = Stack(TTLCache(300), Coalescer())
RETRYING = Stack(Retry(attempts=3, backoff=0.001))
only = pytest.mark.only


ERRORS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "InternalServerError",
}


@pytest.mark.parametrize("status", ERRORS)
async def test_refusals_become_the_sdks_exceptions_with_body_and_request_id(connect, server, status):
    driver = connect()
    headers = {"x-request-id": "req-1", "request-id": "req-1"}
    server.add_fault(FaultRule(kind="status", status=status, headers=headers))
    with pytest.raises(getattr(driver.errors, ERRORS[status])) as caught:
        await driver.ask()
    error = caught.value
    assert error.status_code == status
    assert "injected" in str(error)
    assert "injected_fault" in str(error.body)
    assert error.request_id == "req-1"
    assert server.stats(0)["received"] == 1


async def test_a_refusal_of_a_stream_is_the_same_exception(connect, server):
    driver = connect()
    server.add_fault(FaultRule(kind="status", status=404))
    with pytest.raises(driver.errors.NotFoundError, match="injected"):
        await driver.stream()


@pytest.mark.parametrize("damage", ["html", "garbage", "error_200", "empty"])
async def test_route_08_a_success_that_is_no_answer_is_an_error(connect, server, damage):
    driver = connect(RETRYING)
    server.add_fault(FaultRule(kind=damage))
    if driver.sdk == "anthropic" and damage == "empty":
        assert (await driver.ask()).content == []  # which is an answer there
        return
    with pytest.raises(driver.errors.InternalServerError) as caught:
        await driver.ask()
    assert caught.value.status_code == 502
    assert "protocol_error" in str(caught.value.body)
    assert server.stats(0)["received"] == 3


async def test_route_04_the_sdk_does_not_multiply_our_attempts(connect, server):
    driver = connect(RETRYING, max_retries=2)
    driver.without_sleeps()
    server.add_fault(FaultRule(kind="status", status=500))
    with pytest.raises(driver.errors.InternalServerError):
        await driver.ask()
    assert server.stats(0)["received"] == 3
    assert driver.stats["retries"] == 2


FINAL = {
    "503": FaultRule(kind="status", status=503, retry_after="0"),
    "529": FaultRule(kind="status", status=529, headers={"x-should-retry": "true"}),
    "reset": FaultRule(kind="reset"),
    "html": FaultRule(kind="html"),
    "truncate": FaultRule(kind="truncate"),
}


@pytest.mark.parametrize("way", FINAL)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_route_04_final_failures_reach_the_server_three_times_at_most(connect, server, way, stream):
    driver = connect(RETRYING, max_retries=2)
    driver.without_sleeps()
    server.add_fault(FINAL[way])
    ask = driver.stream if stream else driver.ask
    with pytest.raises((driver.errors.APIError, httpx.HTTPError, httpx2.HTTPError)):
        await ask()
    assert server.stats(0)["received"] <= 3
    assert driver.stats["request_count"] == 1


@pytest.mark.parametrize("refused", ["circuit open", "no permit in time"])
async def test_route_04_refusals_of_ours_are_not_repeated(connect, server, refused):
    if refused == "circuit open":
        driver = connect(Stack(Retry(attempts=1), CircuitBreaker(consecutive=1)), max_retries=2)
        server.add_fault(FaultRule(kind="status", status=500))
        with pytest.raises(driver.errors.InternalServerError):
            await driver.ask()
        status, received = 503, 1
    else:  # the next permit is there in a minute
        driver = connect(Stack(Deadline(25), Retry(), RateLimiter(rpm=1)), max_retries=2)
        await driver.ask()
        status, received = 429, 1
    driver.without_sleeps()
    with pytest.raises(driver.errors.APIStatusError) as caught:
        await driver.ask("another")
    assert caught.value.status_code == status
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert server.stats(0)["received"] == received
    assert driver.stats["request_count"] == 2


async def test_without_a_retry_layer_the_sdk_retries_as_it_always_did(connect, server):
    driver = connect(max_retries=2)
    driver.without_sleeps()
    server.add_fault(FaultRule(kind="status", status=500))
    with pytest.raises(driver.errors.InternalServerError):
        await driver.ask()
    assert server.stats(0)["received"] == 3


def within(kind, seconds):
    """A time-out of the SDK's for the answer."""
    kinds = httpx2 if kind.endswith("httpx2") else anthropic if kind.startswith("anthropic") else openai
    return kinds.Timeout(240, read=seconds)


async def test_route_03_a_time_out_is_the_sdks_and_nobody_repeats_it(connect, server, kind):
    server.add_fault(FaultRule(kind="hang"))
    for seconds in (0.08, 2, 30):
        driver = connect(RETRYING, timeout=within(kind, seconds), max_retries=2)
        driver.without_sleeps()
        with pytest.raises(driver.errors.APITimeoutError):
            await driver.ask()
        stats = driver.stats
        with contextlib.suppress(TimeoutError):
            server.wait(at_least={"received": stats["upstream_requests"]}, timeout_s=2)
            break
        server.reset()  # the machine was too busy to send it in time
    assert stats["request_count"] == 1
    # Our own Retry may repeat a lost call once where it knows the server to be local; the SDK's loop adds nothing.
    ours = 1 if driver.edge == "wrap" else 0
    assert server.stats(0)["received"] == stats["upstream_requests"] == 1 + ours
    assert stats["retries"] == ours


async def test_order_doubled_retries_are_noticed_once(connect, server, kind):
    driver = connect(RETRYING, timeout=within(kind, 0.05), max_retries=2)
    driver.without_sleeps()
    server.add_fault(FaultRule(kind="hang"))
    with pytest.raises(driver.errors.APITimeoutError):
        await driver.ask()
    warnings = driver.stats["warnings"]
    if driver.edge == "wrap":
        assert warnings == {}
        assert driver.client.max_retries == 0
    else:
        assert "max_retries=0" in warnings["doubled-retries"]


async def test_a_refused_connection_is_the_sdks_connection_error(connect):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        driver = connect(RETRYING, base_url=url, max_retries=1)
        driver.without_sleeps()
        with pytest.raises(driver.errors.APIConnectionError) as caught:
            await driver.ask()
    assert not isinstance(caught.value, driver.errors.APITimeoutError)
    assert driver.stats["request_count"] == 1


@only("async")  # a thread cannot be cancelled
async def test_cancelling_the_caller_aborts_the_upstream_request(connect, server):
    driver = connect()
    server.add_fault(FaultRule(kind="hang"))
    task = asyncio.create_task(driver.ask())
    await asyncio.to_thread(server.wait, at_least={"in_flight": 1})
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(server.wait, at_least={"aborted": 1}, at_most={"in_flight": 0})
    assert driver.stats["cancelled"] == 1
    assert driver.stats["in_flight"] == 0


async def test_leaving_a_stream_early_aborts_the_upstream_request(connect, server):
    driver = connect()
    server.add_fault(FaultRule(kind="slow", seconds=0.05))
    arguments = driver.arguments(stream=True)
    if driver.is_async:
        stream = await driver.resource.create(**arguments)
        async for _ in stream:
            break
        await stream.close()
    else:

        def read():
            with driver.resource.create(**arguments) as stream:
                next(iter(stream))

        await driver.run(read)
    await asyncio.to_thread(server.wait, at_most={"in_flight": 0})
    assert driver.stats["cancelled"] == 1


async def test_route_09_an_error_inside_a_stream_is_the_sdks(connect, server):
    driver = connect()
    server.add_fault(FaultRule(kind="sse_error", after=3))
    with pytest.raises(driver.errors.APIError) as caught:
        await driver.stream()
    assert "Engine died" in f"{caught.value} {getattr(caught.value, 'body', '')}"


async def test_cache_13_a_truncated_stream_is_an_error_and_not_stored(connect, server):
    driver = connect(CACHED)
    server.add_fault(FaultRule(kind="no_finish"))
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)ended early|connection"):
            await driver.stream()
    assert server.stats(0)["received"] == 2
