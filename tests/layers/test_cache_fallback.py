"""Whose answers the cache keeps: the asked endpoint's, whatever it calls itself; another's only where it is told to."""

from __future__ import annotations

import pytest

from llmmw import ErrorRouter, Stack, TTLCache
from llmmw.testing.fake import FakeUpstream, chat_call, error_reply


@pytest.mark.parametrize("target", ["", "http://127.0.0.1:8000/v1", "fake"])
async def test_an_answer_is_stored_whatever_its_endpoint_calls_itself(target):
    upstream = FakeUpstream()
    call = chat_call("hi", temperature=0).replace(target=target)
    async with Stack(TTLCache(300)).bind(upstream) as engine:
        assert [(await engine.call(call)).source for _ in range(2)] == ["upstream", "cache"]


@pytest.mark.parametrize(("wanted", "second"), [(False, "upstream"), (True, "cache")])
async def test_an_answer_of_a_fallback_is_stored_only_where_that_is_wanted(wanted, second):
    primary, other = FakeUpstream([error_reply(503)] * 2), FakeUpstream()
    stack = Stack(TTLCache(300, store_fallbacks=wanted), ErrorRouter(fallbacks=[other]))
    async with stack.bind(primary) as engine:
        call = chat_call("hi", temperature=0)
        assert [(await engine.call(call)).source for _ in range(2)] == ["upstream", second]
