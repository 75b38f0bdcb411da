"""The public contract of the design: names, error tree, attributes, statistics keys."""

from __future__ import annotations

import inspect

import pytest

import llmmw

NAMES = [
    "Stack", "TTLCache", "Coalescer", "ErrorRouter", "Retry", "CircuitBreaker", "Batcher", "RateLimiter", "Timeout",
    "Deadline", "ConnectionPool", "Client", "SyncClient", "middleware", "httpx_client", "httpx2_client",
    "httpx_sync_client", "httpx2_sync_client", "wrap_client", "using", "Call", "Reply", "Usage", "Context", "Outcome",
    "OfflineBatch", "Balancer", "Replica", "VLLMEndpoint",
    "Engine", "Env", "Rule", "Layer", "Bound", "Handler", "LLMMWError", "ConfigError", "OrderError", "MissingExtra",
    "Refused", "RateLimited", "CircuitOpen", "QueueFull", "DeadlineExceeded", "Closed", "UpstreamError",
    "StatusError", "UpstreamTimeout", "ConnectionFailed", "StaleConnection", "AmbiguousOutcome", "ProtocolError",
    "ResponseTooLarge", "TruncatedStream", "StreamInterrupted", "AllEndpointsFailed",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_design_exists_and_is_documented(name):
    value = getattr(llmmw, name)
    assert (value.__doc__ or "").strip()
    assert name in dir(llmmw)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = llmmw.nonsense


def test_a_star_import_works_without_any_extra():
    assert "Client" in llmmw.__all__
    assert "httpx2_client" not in llmmw.__all__


def test_value_objects_have_the_fields_of_the_design():
    for kind, fields in {
        llmmw.Call: "op model payload stream context native",
        llmmw.Reply: "chunks usage source endpoint native",
        llmmw.Context: "agent step sample priority deadline tenant tags",
        llmmw.Outcome: "reply error",
    }.items():
        assert set(fields.split()) <= set(kind.__struct_fields__)
        assert kind.__struct_config__.frozen
    for attribute in ("body", "text", "ok"):
        assert isinstance(inspect.getattr_static(llmmw.Reply, attribute), property)


def test_a_stack_has_the_methods_of_the_design():
    for method in ["check", "explain", "wrap", "bind", "inside", "outside", "replacing", "without", "recommended"]:
        assert callable(getattr(llmmw.Stack, method))


def test_clients_have_the_methods_of_the_design():
    for method in [
        "chat",
        "complete",
        "stream",
        "generate_batch",
        "embed",
        "map",
        "invalidate",
        "invalidate_tag",
        "invalidate_tenant",
        "get_performance_stats",
    ]:
        assert callable(getattr(llmmw.Client, method))
    assert callable(llmmw.Client.aclose)
    assert callable(llmmw.SyncClient.close)


def test_a_wrapped_function_carries_its_engine():
    @llmmw.middleware(cache_ttl=300, rpm=600, tpm=200_000, concurrency=64)
    async def ask(prompt: str) -> str:
        return prompt

    for attribute in ["engine", "get_performance_stats", "invalidate", "invalidate_tag", "invalidate_tenant", "aclose"]:
        assert hasattr(ask, attribute)
    ask.close()


def test_the_stack_of_the_design_is_accepted_as_written(tmp_path):
    from llmmw import (
        Batcher,
        CircuitBreaker,
        Coalescer,
        Deadline,
        ErrorRouter,
        RateLimiter,
        Retry,
        Stack,
        Timeout,
        TTLCache,
    )  # fmt: skip

    stack = Stack(
        Deadline(60), TTLCache(ttl=300, directory=str(tmp_path)), Coalescer(),
        ErrorRouter(fallbacks=["http://127.0.0.1:1/v1"]), Retry(attempts=3), CircuitBreaker(),
        Batcher(max_size=20, flush_interval=0.02), RateLimiter(rpm=600, tpm=200_000, concurrency=64), Timeout(30),
    )  # fmt: skip
    assert stack.check() == ()
    assert "once per endpoint" in stack.explain()
