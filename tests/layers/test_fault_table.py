# ruff: noqa: E501 — a table reads better one row per line
"""The table of SPEC 7, cell by cell: what each class of failure does at its endpoint, elsewhere, to breaker and budget."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
import pytest

from llmmw import errors
from llmmw.call import Call, Reply
from llmmw.env import Env
from llmmw.fault import FaultKind, classify
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter, Fallback
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, chat_body, chat_call, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.engine import Engine
    from llmmw.layers.base import Layer

K = FaultKind
LENGTH = error_reply(400, message="This model's maximum context length is 1024 tokens.")


def from_(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class Row(msgspec.Struct, frozen=True):
    """One class: requests at the endpoint with three attempts, whether another is asked, what opens, what it costs."""

    kind: FaultKind
    outcomes: tuple[Reply | BaseException, ...]
    same: int = 1
    other: bool = False
    opens: bool = False
    credential: bool = False
    cost: int = 0


TABLE = (
    Row(K.NOT_SENT, (errors.ConnectionFailed("refused"), errors.UpstreamTimeout("connect", sent=False), ConnectionRefusedError()), same=3, other=True, opens=True, cost=5),
    Row(K.NOT_SENT, (errors.PoolTimeout("our own pool is full"),), same=3, other=True, opens=False, cost=5),
    Row(K.RATE, (error_reply(429), error_reply(429, retry_after="1")), same=3, other=True, cost=5),
    Row(K.QUOTA, (error_reply(429, code="insufficient_quota"), error_reply(402)), other=True, credential=True),
    Row(K.AUTH, (error_reply(401), error_reply(403)), other=True, credential=True),
    Row(K.SERVER, tuple(error_reply(status) for status in (500, 502, 503, 504, 529, 408, 409)), same=3, other=True, opens=True, cost=5),
    Row(K.AMBIGUOUS, (errors.UpstreamTimeout("read"), errors.StaleConnection("reset"), ConnectionResetError()), opens=True, cost=10),
    Row(K.CONTEXT_LENGTH, (LENGTH, error_reply(413)), other=True),
    Row(K.INVALID, (error_reply(400), error_reply(404), error_reply(422), ValueError("own"))),
    Row(K.CONTENT_FILTER, (error_reply(400, code="content_filter"), Reply(data=chat_body("x", finish="content_filter")))),
    Row(K.MALFORMED, (errors.ProtocolError("html"), errors.TruncatedStream("cut")), same=3, other=True, opens=True, cost=10),
    Row(K.CANCELLED, (from_(RuntimeError("wrapped"), asyncio.CancelledError()),)),
)  # fmt: skip
CELLS = [(row, outcome) for row in TABLE for outcome in row.outcomes]


def names(value: object) -> str:
    return value.kind.value if isinstance(value, Row) else repr(value)[:60]


each_cell = pytest.mark.parametrize(("row", "outcome"), CELLS, ids=names)


def engine(clock: ManualClock, upstream: FakeUpstream, *layers: Layer) -> Engine:
    return Stack(*layers).bind(upstream, env=Env(clock=clock, seed=1))


async def ask(upstream_engine: Engine, call: Call | None = None) -> Reply | None:
    with contextlib.suppress(errors.LLMMWError, OSError, ValueError, RuntimeError):
        return await upstream_engine.call(call or chat_call())
    return None


def in_virtual_time(test: Callable[..., object]) -> None:
    manual_time(test)()  # type: ignore[arg-type]


@each_cell
def test_class(row: Row, outcome: Reply | BaseException) -> None:
    fault = classify(outcome, wall=0.0)
    assert fault is not None
    assert fault.kind is row.kind


@each_cell
def test_same_endpoint(row: Row, outcome: Reply | BaseException) -> None:
    async def run(clock: ManualClock) -> None:
        upstream = FakeUpstream([outcome] * 9)
        await ask(engine(clock, upstream, Retry(attempts=3, rate_patience=0)))
        assert len(upstream.calls) == row.same

    in_virtual_time(run)


@each_cell
def test_other_endpoint(row: Row, outcome: Reply | BaseException) -> None:
    async def run(clock: ManualClock) -> None:
        for allowing in (False, True):
            upstream, other = FakeUpstream([outcome] * 9), FakeUpstream(name="http://other.test/v1")
            router = ErrorRouter(fallbacks=[Fallback(other)], duplicate_ok=allowing, on_content_filter=allowing)
            await ask(engine(clock, upstream, router))
            opted = allowing and row.kind in {K.AMBIGUOUS, K.CONTENT_FILTER}
            assert len(other.calls) == (row.other or opted)

    in_virtual_time(run)


@each_cell
def test_breaker(row: Row, outcome: Reply | BaseException) -> None:
    async def run(clock: ManualClock) -> None:
        upstream = FakeUpstream([outcome] * 20)
        breaking = engine(clock, upstream, CircuitBreaker())
        for _ in range(12):
            await ask(breaking)
        layer = breaking.get_performance_stats()["layers"]["breaker"]
        assert (layer["not_closed"], layer["credentials_not_closed"]) == (row.opens, row.credential)
        assert len(upstream.calls) == (
            5 if row.opens or names(outcome) == names(error_reply(403)) else 1 if row.credential else 12
        )
        await ask(breaking, chat_call().replace(namespace="another key"))
        assert (len(upstream.calls) in {2, 6, 13}) is not row.opens

    in_virtual_time(run)


@each_cell
def test_half_open_probe(row: Row, outcome: Reply | BaseException) -> None:
    """What says nothing about the endpoint frees the probe's place for the next call."""

    async def run(clock: ManualClock) -> None:
        upstream = FakeUpstream([*[error_reply(500)] * 5, outcome])
        breaking = engine(clock, upstream, CircuitBreaker())
        for _ in range(5):
            await ask(breaking)
        clock.advance(5.6)
        await ask(breaking)
        found = await ask(breaking, chat_call().replace(namespace="another key"))
        assert (found is None) is row.opens

    in_virtual_time(run)


@each_cell
def test_cost(row: Row, outcome: Reply | BaseException) -> None:
    async def run(clock: ManualClock) -> None:
        retrying = engine(clock, FakeUpstream([outcome] * 9), Retry(attempts=2, rate_patience=0, duplicate_ok=True))
        await ask(retrying)
        assert retrying.get_performance_stats()["layers"]["retry"]["budget"] == 500 - row.cost

    in_virtual_time(run)


@pytest.mark.parametrize("outcome", TABLE[6].outcomes, ids=names)
def test_lost_at_a_local_server_is_repeated_once(outcome: BaseException) -> None:
    async def run(clock: ManualClock) -> None:
        upstream, other = FakeUpstream([outcome] * 9), FakeUpstream(name="http://other.test/v1")
        upstream.capabilities = frozenset({"idempotent"})  # type: ignore[attr-defined]
        await ask(engine(clock, upstream, Retry(attempts=5)))
        assert len(upstream.calls) == 2
        await ask(engine(clock, upstream, ErrorRouter(fallbacks=[other]), Retry(attempts=5)))
        assert len(other.calls) == 1

    in_virtual_time(run)


@pytest.mark.parametrize("larger", [None, 4096, 1025])
@pytest.mark.parametrize("smaller", [1024, 512])
def test_route_07_prompt_too_long_goes_to_the_first_that_is_larger(larger: int | None, smaller: int) -> None:
    async def run(clock: ManualClock) -> None:
        small, large = FakeUpstream(name="http://small.test/v1"), FakeUpstream(name="http://large.test/v1")
        router = ErrorRouter(fallbacks=[Fallback(small, max_context=smaller), Fallback(large, max_context=larger)])
        reply = await ask(engine(clock, FakeUpstream([LENGTH]), router, Retry()))
        assert reply is not None
        assert reply.endpoint == "http://large.test/v1"
        assert not small.calls

    in_virtual_time(run)


@pytest.mark.parametrize("wish", ["true", "false"])
@each_cell
def test_route_10_wish_of_the_server(row: Row, outcome: Reply | BaseException, wish: str) -> None:
    """`x-should-retry` is obeyed, but revives neither what is invalid nor a spent quota."""

    async def run(clock: ManualClock) -> None:
        if not isinstance(outcome, Reply) or outcome.ok:
            return
        wishing = outcome.replace(headers=(*outcome.headers, ("x-should-retry", wish)))
        upstream = FakeUpstream([wishing] * 9)
        await ask(engine(clock, upstream, Retry(attempts=3, rate_patience=0)))
        hopeless = row.kind in {K.INVALID, K.QUOTA}
        assert len(upstream.calls) == (3 if wish == "true" and not hopeless else 1)

    in_virtual_time(run)
