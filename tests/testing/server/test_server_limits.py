from contextlib import suppress

import pytest

from llmmw.testing.server import ServerConfig
from llmmw.testing.server.errors import ApiError
from llmmw.testing.server.limits import Limits, go_duration

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def admitted(limits, times, tokens=1, key=""):
    passed = []
    for now in times:
        with suppress(ApiError):
            limits.admit(key, tokens, now)
            passed.append(now)
    return passed


def test_bucket_allows_a_burst_and_refills_evenly():
    limits = Limits(ServerConfig(rpm=2, limit_window_s=10))
    assert admitted(limits, [0, 0, 0, 4, 5, 6, 10, 100, 100, 100]) == [0, 0, 5, 10, 100, 100]


def test_sliding_window_never_exceeds_the_limit_in_any_window():
    limits = Limits(ServerConfig(rpm=2, limit_window_s=10, limit_kind="sliding"))
    assert admitted(limits, [0, 3, 5, 9, 10, 11, 13, 14]) == [0, 3, 10, 13]


@pytest.mark.parametrize("kind", ["bucket", "sliding"])
def test_tokens_are_limited_and_the_wait_is_exact(kind):
    limits = Limits(ServerConfig(tpm=100, limit_window_s=10, limit_kind=kind))
    limits.admit("", 80, 0.0)
    with pytest.raises(ApiError) as caught:
        limits.admit("", 40, 0.0)
    wait_s = float(caught.value.message.rsplit(" ", 1)[1].rstrip("s."))
    assert admitted(limits, [wait_s - 0.1, wait_s], 40) == [wait_s]
    # More than the whole limit passes once everything is free, instead of never.
    assert admitted(limits, [1000.0], 500) == [1000.0]


def test_keys_are_limited_apart_and_quota_ends_for_good():
    limits = Limits(ServerConfig(rpm=1, quota_requests=2))
    assert admitted(limits, [0, 0], key="a") == [0]
    assert admitted(limits, [0, 0], key="b") == [0]
    assert admitted(limits, [100], key="a") == [100]
    with pytest.raises(ApiError) as caught:
        limits.admit("a", 1, 1e9)
    assert caught.value.code == "insufficient_quota"


def test_keys_not_seen_for_long_are_forgotten(monkeypatch):
    monkeypatch.setattr("llmmw.testing.server.limits.MAX_KEYS", 2)
    limits = Limits(ServerConfig(rpm=1))
    assert [bool(admitted(limits, [0], key=key)) for key in "abacab"] == [True, True, False, True, False, True]


def test_durations_are_spelled_as_openai_does():
    assert [go_duration(s) for s in (0.012, 1.0, 1.5, 360.0, 3600.0)] == ["12ms", "1s", "1.5s", "6m0s", "1h0m0s"]


@pytest.mark.parametrize(
    ("style", "announced", "retry_after"),
    [
        ("openai", "x-ratelimit-remaining-requests", True),
        ("anthropic", "anthropic-ratelimit-requests-remaining", True),
        ("plain", None, True),
        ("none", None, False),
    ],
)
async def test_header_styles(serve, post, style, announced, retry_after):
    server = await serve(rpm=1, limit_style=style, error_style="openai")
    status, _, good = await post(server, CHAT, ASK)
    refused, body, bad = await post(server, CHAT, ASK)
    assert (status, refused) == (200, 429)
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert ("Retry-After" in bad) is retry_after
    if announced:
        assert (good[announced], bad[announced]) == ("0", "0")
    else:
        assert not any("ratelimit" in name.lower() for name in good)
    stats = server.stats()
    assert stats["refused_by_limit"] == 1
    assert stats["by_outcome"] == {"ok": 1, "http_429": 1}


async def test_limits_hold_per_key_and_reset_restores_them(serve, post):
    server = await serve(rpm=1)
    keys = [{"Authorization": f"Bearer {key}"} for key in "abba"]
    statuses = [(await post(server, CHAT, ASK, headers=key))[0] for key in keys]
    assert statuses == [200, 200, 429, 429]
    server.reset()
    assert (await post(server, CHAT, ASK, headers=keys[0]))[0] == 200
    server.configure(rpm=None)
    assert [(await post(server, CHAT, ASK, headers=keys[0]))[0] for _ in range(3)] == [200] * 3


async def test_quota_error_has_openais_code(serve, post):
    server = await serve(quota_requests=0, error_style="openai")
    status, body, headers = await post(server, CHAT, ASK)
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    assert "Retry-After" not in headers


async def test_streams_embeddings_and_lists_are_limited_too(serve, post):
    server = await serve(tpm=100)
    for path, body in (
        (CHAT, {**ASK, "stream": True}),
        ("/v1/embeddings", {"input": "x" * 40}),
        ("/v1/completions", {"prompt": ["x"] * 4, "max_tokens": 10, "ignore_eos": True}),
    ):
        assert (await post(server, path, body))[0] == 200
    assert (await post(server, "/v1/embeddings", {"input": "x" * 400}))[0] == 429
