from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.batchplan import (
    Due,
    Flush,
    Limits,
    Plan,
    bisect_budget,
    divide,
    grouping,
    joint_call,
    split_answer,
    when_due,
)
from llmmw.answer import Usage
from llmmw.call import Call, Context, Urgency
from llmmw.testing.fake import chat_call
from llmmw.wire import HTTPRequest

QUICK = settings(max_examples=150, derandomize=True, deadline=None)
LATER = Due(1e9)


# ── who belongs together ────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_that_differ_only_in_their_prompt_belong_together() -> None:
    one, two = grouping(chat_call("a", temperature=1)), grouping(chat_call("b", temperature=1))
    assert one is not None
    assert two is not None
    assert one.kind == two.kind
    assert one.joint
    assert one.twin is None


@pytest.mark.parametrize(
    "other",
    [
        chat_call("a", model="other"),
        chat_call("a", temperature=0.5),
        chat_call("a", max_tokens=5),
        chat_call("a", seed=1),
        chat_call("a").replace(target="elsewhere"),
        chat_call("a").replace(namespace="key-2"),
        chat_call("a").replace(variant=(("anthropic-beta", "x"),)),
        chat_call("a", context=Context(tenant="t")),
        chat_call("a", context=Context(priority=1)),
        chat_call("a").replace(urgency=Urgency(priority=-1)),
        Call("complete", "m", {"model": "m", "prompt": "a"}, target="http://fake.test/v1"),
        chat_call("a").replace(native=(("x-trace", "1"),)),
    ],
    ids=range(12),
)
def test_batch_07_what_differs_never_travels_together(other: Call) -> None:
    mine, theirs = grouping(chat_call("a")), grouping(other)
    assert mine is not None
    assert theirs is not None
    assert mine.kind != theirs.kind


@pytest.mark.parametrize(
    "call",
    [
        chat_call("a", stream=True),
        chat_call("a", n=2),
        chat_call("a", tools=[]),
        chat_call("a", ignore_eos=True),
        chat_call("a", seed=object()),
        chat_call("a").replace(direct=True),
        chat_call("a").replace(op="embed"),
        chat_call("a").replace(payload={"messages": []}),
        chat_call("a").replace(payload={}),
        Call("complete", "m", {"prompt": ["a", "b"]}),
    ],
    ids=range(10),
)
def test_what_always_goes_alone(call: Call) -> None:
    assert grouping(call) is None


def test_who_may_share_a_request() -> None:
    def joint(call: Call) -> bool:
        found = grouping(call)
        assert found is not None
        return found.joint

    assert joint(chat_call("a"))
    assert joint(Call("complete", "m", {"prompt": [1, 2, 3]}))
    assert joint(chat_call("a").replace(native=(("x-trace", "1"),)))
    assert not joint(Call("function", "f", {"x": object()}))
    assert not joint(chat_call("a").replace(native=HTTPRequest("POST", "http://x")))


def test_greedy_calls_with_one_prompt_are_twins() -> None:
    def twin(call: Call) -> bytes | None:
        found = grouping(call)
        assert found is not None
        return found.twin

    assert twin(chat_call("a", temperature=0)) == twin(chat_call("a", temperature=0))
    assert twin(chat_call("a", temperature=0)) != twin(chat_call("b", temperature=0))
    assert twin(chat_call("a", temperature=1)) is None


def test_joint_call_is_as_urgent_and_patient_as_its_members() -> None:
    one = chat_call("a", context=Context(agent="x", step=2, deadline=5.0, priority=1, tags=("t",)))
    one = one.replace(key=b"k")
    two = chat_call("b", context=Context(agent="y", step=2, deadline=9.0))
    call = joint_call([one, two])
    assert (call.op, call.native, call.key, call.urgency) == ("chat_batch", None, b"", None)
    assert call.payload["messages"] == [one.payload["messages"], two.payload["messages"]]
    assert call.context == Context(step=2, priority=0, deadline=9.0)
    assert joint_call([one, chat_call("c")]).context.deadline is None
    listed = joint_call([Call("complete", "m", {"prompt": "a"}), Call("complete", "m", {"prompt": "b"})])
    assert (listed.op, listed.payload["prompt"]) == ("complete", ["a", "b"])


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_interval_and_deadline_say_how_long_to_wait() -> None:
    assert when_due(10.0, 0.5, None) == Due(10.5)
    assert when_due(10.0, 0.5, 100.0) == Due(10.5)
    assert when_due(10.0, 0.5, 10.05) == Due(10.025, hurried=True)
    assert when_due(10.0, 0.5, 9.0) == Due(10.0, hurried=True)


def causes(flushes: list[Flush[str]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(flush.cause, flush.items) for flush in flushes]


def test_full_group_goes() -> None:
    plan: Plan[str, str] = Plan(Limits(max_size=2))
    assert plan.add("k", "a", LATER) == []
    assert plan.add("other", "x", LATER) == []
    assert causes(plan.add("k", "b", LATER)) == [("size", ("a", "b"))]
    assert len(plan) == 1


@pytest.mark.parametrize("what", ["bytes", "tokens"])
def test_batch_02_item_that_no_longer_fits_goes_in_the_next_group(what: str) -> None:
    limits = Limits(max_bytes=10) if what == "bytes" else Limits(max_tokens=10)
    name = "size_bytes" if what == "bytes" else "tokens"
    plan: Plan[str, str] = Plan(limits)
    plan.add("k", "a", LATER, **{name: 6})
    assert causes(plan.add("k", "b", LATER, **{name: 6})) == [(what, ("a",))]
    assert causes(plan.add("k", "huge", LATER, **{name: 11})) == [(what, ("b",)), (what, ("huge",))]
    assert len(plan) == 0


def test_late_groups_go_and_say_why() -> None:
    plan: Plan[str, str] = Plan(Limits())
    plan.add("k", "a", Due(5.0))
    plan.add("k", "b", Due(9.0))
    plan.add("other", "c", Due(6.0, hurried=True))
    assert plan.next_at() == 5.0
    assert plan.due(4.9) == []
    assert causes(plan.due(6.0)) == [("interval", ("a", "b")), ("deadline", ("c",))]
    assert plan.next_at() is None


def test_chosen_groups_are_drained() -> None:
    plan: Plan[str, str] = Plan(Limits())
    plan.add("k", "a", LATER)
    plan.add("other", "b", LATER)
    assert causes(plan.drain("close", lambda key: key == "k")) == [("close", ("a",))]
    assert causes(plan.drain("close")) == [("close", ("b",))]
    assert not plan.remove("k", "a")


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "due", "drain", "shrink"]),
        st.sampled_from(["k1", "k2"]),
        st.integers(0, 8),
        st.integers(0, 8),
        st.floats(0, 3),
    ),
    max_size=80,
)


@QUICK
@given(steps, st.integers(1, 6), st.none() | st.integers(1, 12), st.none() | st.integers(1, 12))
def test_every_item_goes_exactly_once_in_order_and_within_the_limits(
    script: list[tuple[str, str, int, int, float]], max_size: int, max_bytes: int | None, max_tokens: int | None
) -> None:
    plan: Plan[str, tuple[str, int, int, int]] = Plan(Limits(max_size, max_bytes, max_tokens))
    waiting: dict[tuple[str, int, int, int], None] = {}
    now = 0.0

    def check(flushes: list[Flush[tuple[str, int, int, int]]], limit: int) -> None:
        for flush in flushes:
            keys = {item[0] for item in flush.items}
            assert len(keys) == 1
            assert list(flush.items) == [item for item in waiting if item[0] in keys][: len(flush.items)]
            for item in flush.items:
                del waiting[item]
            assert len(flush.items) <= limit
            if len(flush.items) > 1:
                assert max_bytes is None or sum(item[2] for item in flush.items) <= max_bytes
                assert max_tokens is None or sum(item[3] for item in flush.items) <= max_tokens

    for number, (action, key, size, tokens, gap) in enumerate(script):
        now += gap
        if action == "add":
            item = (key, number, size, tokens)
            waiting[item] = None
            check(plan.add(key, item, Due(now + 2), size_bytes=size, tokens=tokens), max_size)
        elif action == "remove" and waiting:
            item = list(waiting)[number % len(waiting)]
            assert plan.remove(item[0], item)
            del waiting[item]
        elif action == "due":
            check(plan.due(now), max_size)
            at = plan.next_at()
            assert at is None or at > now
        elif action == "drain":
            check(plan.drain("barrier", lambda place: place == "k1"), max_size)
        elif action == "shrink":
            plan.max_size = max(1, plan.max_size // 2)
        assert len(plan) == len(waiting)
    check(plan.drain("close"), max_size)
    assert not waiting


def test_bisection_is_budgeted() -> None:
    assert [bisect_budget(size) for size in (1, 2, 3, 8, 9, 64)] == [1, 3, 5, 7, 9, 13]


# ── whose part is whose ─────────────────────────────────────────────────────────────────────────────────────────────


def choice(index: object, text: str) -> dict[str, object]:
    return {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}


CALLS = [chat_call("a"), chat_call("bb" * 50), chat_call("c")]


def test_parts_are_matched_by_index() -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 9}
    body = {"id": "x", "choices": [choice(2, "C"), choice(0, "A"), choice(1, "BBBB")], "usage": usage}
    parts = split_answer(body, CALLS)
    assert not any(isinstance(part, str) for part in parts)
    bodies = [part[0] for part in parts]
    assert [own["choices"][0]["message"]["content"] for own in bodies] == ["A", "BBBB", "C"]
    assert {own["choices"][0]["index"] for own in bodies} == {0}
    assert sum(own["usage"]["prompt_tokens"] for own in bodies) == 30
    assert sum(own["usage"]["completion_tokens"] for own in bodies) == 9
    assert bodies[1]["usage"]["prompt_tokens"] > bodies[0]["usage"]["prompt_tokens"]
    assert body["usage"] == usage


def test_wrong_indices_fail_their_items_only() -> None:
    body = {"choices": [choice(0, "A"), choice(1, "B"), choice(1, "B2"), choice(7, "?"), choice("2", "C"), 5]}
    first, second, third = split_answer(body, CALLS)
    assert isinstance(first, tuple)
    assert first[1] == Usage()
    assert "usage" not in first[0]
    assert second == "2 answers instead of one in the batch's answer"
    assert third == "0 answers instead of one in the batch's answer"


@pytest.mark.parametrize("body", [None, [], {}, {"choices": "x"}, {"choices": [None]}])
def test_no_answer_at_all_fails_everybody(body: object) -> None:
    assert all(isinstance(part, str) for part in split_answer(body, CALLS))


@QUICK
@given(st.integers(0, 10_000), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_division_loses_nothing(total: int, weights: list[int]) -> None:
    shares = divide(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 0
    weight = sum(weights)
    if weight:
        assert all(abs(share - total * part / weight) < 1 for share, part in zip(shares, weights, strict=True))


@QUICK
@given(st.lists(st.integers(-1, 4), max_size=8), st.integers(0, 500))
def test_every_item_gets_exactly_one_outcome(indices: list[int], tokens: int) -> None:
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    body = msgspec.json.decode(msgspec.json.encode({"choices": [choice(i, str(i)) for i in indices], "usage": usage}))
    parts = split_answer(body, CALLS)
    assert len(parts) == 3
    for number, part in enumerate(parts):
        assert isinstance(part, str) is (indices.count(number) != 1)
        if not isinstance(part, str):
            assert part[0]["choices"][0]["message"]["content"] == str(number)
