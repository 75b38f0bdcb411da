"""Values: contexts nest, replies are private copies."""

from __future__ import annotations

import pytest

from llmmw.call import NO_CONTEXT, Context, Outcome, Reply, current_context, using
from llmmw.errors import ConfigError
from llmmw.testing import ManualClock, manual_time
from llmmw.testing.fake import chat_body


def test_nested_contexts_inherit_what_is_not_given():
    with using(agent="alice", tags="day") as outer:
        assert outer == Context(agent="alice", tags=("day",))
        with using(step=3, priority=-1, tenant="t", sample=2, tags=["night", "day"]):
            assert current_context() == Context("alice", 3, 2, -1, None, "t", ("day", "night"))
        assert current_context() is outer
    assert current_context() is NO_CONTEXT


@manual_time
async def test_a_deadline_is_seconds_from_now_and_cannot_be_extended_inside(clock: ManualClock):
    with using(deadline="20s"):
        assert current_context().deadline == clock.monotonic() + 20
        with using(deadline=60):
            assert current_context().deadline == clock.monotonic() + 20
        with using(deadline=5):
            assert current_context().deadline == clock.monotonic() + 5


def test_a_context_ends_with_its_block_even_when_it_raises():
    with pytest.raises(RuntimeError), using(agent="a"):
        raise RuntimeError
    assert current_context() is NO_CONTEXT
    with pytest.raises(ConfigError, match="deadline"), using(deadline="soon"):
        pass


def test_cache_15_changing_a_body_reaches_nobody_else():
    reply = Reply(data=chat_body("hi"))
    reply.body["choices"].clear()
    assert reply.text == "hi"


def test_a_reply_of_a_function_has_its_value_as_body():
    value = object()
    assert Reply(native=value).body is value
    assert Reply(native=value).text == ""


def test_outcomes_are_one_of_two():
    assert Outcome(reply=Reply(data=chat_body("hi"))).text == "hi"
    failed = Outcome(error=ValueError())
    assert (failed.ok, failed.text) == (False, "")


def test_headers_are_found_by_name():
    reply = Reply(headers=(("a", "1"), ("a", "2")))
    assert (reply.header("a"), reply.header("b")) == ("1", None)
